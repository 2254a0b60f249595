/* exp(x) for x in BDM_EXP_LEAST .. BDM_EXP_MOST, to about 1 unit in the last place: with n = round(x / ln 2) and
   r = x - n ln 2, it is 2^n (1 + r + r^2 p(r)). What every vector width shares: the limits, ln 2 in two parts, p. */
#ifndef BDM_EXP_H
#define BDM_EXP_H

#define BDM_EXP_LEAST (-87.3f)
#define BDM_EXP_MOST 88.3f
#define BDM_LOG2_E 1.44269504f
#define BDM_LN_2 0.693359375f
#define BDM_LN_2_REST (-2.12194440e-4f)
#define BDM_EXP_TERMS 6

/* p's coefficients, from the highest power down. */
static const float bdm_exp_terms[BDM_EXP_TERMS] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                                                   4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};

#endif
