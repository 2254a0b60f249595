/* Functions of 16 floats. */
#ifndef BDM_AVX512_MATH_H
#define BDM_AVX512_MATH_H

#include <immintrin.h>
#include <math.h>
#include "exp.h"

/* See exp.h. NaN stays NaN: the second operand of MAXPS and MINPS. */
static inline __m512 exp_512(__m512 x) {
    x = _mm512_min_ps(_mm512_set1_ps(BDM_EXP_MOST), _mm512_max_ps(_mm512_set1_ps(BDM_EXP_LEAST), x));
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(BDM_LOG2_E)), 0);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(BDM_LN_2), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(BDM_LN_2_REST), r);
    __m512 e = _mm512_set1_ps(bdm_exp_terms[0]);
    for (int i = 1; i < BDM_EXP_TERMS; i++) e = _mm512_fmadd_ps(e, r, _mm512_set1_ps(bdm_exp_terms[i]));
    e = _mm512_fmadd_ps(_mm512_mul_ps(e, r), r, _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
    return _mm512_scalef_ps(e, n);
}

static inline __m512 silu_512(__m512 x) {
    __m512 one = _mm512_set1_ps(1.0f);
    return _mm512_div_ps(x, _mm512_add_ps(one, exp_512(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

#endif
