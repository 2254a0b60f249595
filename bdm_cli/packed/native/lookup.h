/* Convolution by lookup: the part that all vector instruction sets share. Included by a file that has defined

   CHANNELS   input channels of one table            PIXELS      output pixels that the kernel takes at a time
   TABLE      bytes of one table                     UNIT        output channels of one index vector
   JOIN       steps that the kernel takes at a time  UNIT_INDEX  bytes of a unit's indices for one step
   LIMIT      steps (a multiple of JOIN) that 16 bits hold
   PLANE_BITS bits of an activation in a table

   and these functions:
   put_index     the index bytes of one unit for one step
   fill_tables   one pixel's tables from its u
   kernel        adds the table entries of some steps to 16-bit sums [PIXELS][units * UNIT], or begins them
   quantize_last, quantize_first   neighbouring pixels to u, from channels-last and channels-first images
   sum_bytes     the sum of one pixel's u
   finish_16     sums of 16 bits to y, where nothing is to be corrected
   store_first   a tile into a channels-first image

   A table holds the sums of u over all subsets of CHANNELS channels of one pixel; the weights of an output channel for
   these channels are its index. A step is one (table, tap). Tables are made once per input pixel, row by row, in a ring
   of kh rows; every output channel and every tap uses them. */

#include <stdlib.h>
#include <string.h>
#ifdef __linux__
#include <sys/mman.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

#define LARGE_PAGE ((size_t)2 << 20)
#define UNITS 3           /* of the largest block of output channels */
#ifndef NEAR
#define NEAR (18 << 10)   /* bytes of tables to keep in the first cache */
#endif

typedef struct {
    int tables, taps, steps, planes;     /* per plane: tables of a pixel, taps, steps (padded to a multiple of JOIN) */
    int out_h, out_w, columns, row;      /* columns: per phase of the horizontal stride; row = columns * sw */
    int u_stride;                        /* bytes of one pixel's u, zero beyond its channels */
    int units, blocks;                   /* of output channels; a block has two units, the last one up to three */
    int chunk, group;                    /* steps whose tables stay in the first cache; chunks' steps that 16 bits hold */
    size_t unit_size;                    /* bytes of one unit's indices */
} plan;

static plan make_plan(const bdm_shape *s) {
    plan p;
    p.tables = up(s->c, CHANNELS);
    p.taps = s->kh * s->kw;
    p.steps = up(p.tables * p.taps, JOIN) * JOIN;
    p.planes = up(s->bits, PLANE_BITS);
    p.out_h = bdm_out(s->h, s->kh, s->sh, s->ph);
    p.out_w = bdm_out(s->w, s->kw, s->sw, s->pw);
    p.columns = up(up(p.out_w, PIXELS) * PIXELS * s->sw + s->kw, s->sw);
    p.row = p.columns * s->sw;
    p.u_stride = up(p.tables * CHANNELS + 32, 64) * 64;
    p.units = up(s->k, UNIT);
    p.blocks = p.units < 2 ? 1 : p.units / 2;
    p.unit_size = (size_t)p.steps * UNIT_INDEX;
    /* of all a tile's pixels; without other taps they are read less often, and calls of the kernel count for more */
    const int near = NEAR * (p.taps == 1 ? 2 : 1) / (TABLE * s->kh * ((PIXELS - 1) * s->sw + s->kw));
    p.chunk = up((near ? near : 1) * p.taps, JOIN) * JOIN;
    if (p.chunk > LIMIT) p.chunk = LIMIT;
    p.group = p.steps <= LIMIT ? p.steps : LIMIT / p.chunk * p.chunk;
    return p;
}

static inline int block_units(const plan *p, int block) { return block < p->blocks - 1 ? 2 : p->units - 2 * block; }

static size_t arranged_size(const bdm_shape *s) {
    plan p = make_plan(s);
    return bdm_sums_size(s) + p.units * p.unit_size;
}

static void arrange(const bdm_shape *s, const uint8_t *bits, uint8_t *arranged) {
    plan p = make_plan(s);
    memset(arranged, 0, arranged_size(s));
    bdm_put_sums(s, bits, (int32_t *)arranged);
    uint8_t *at = arranged + bdm_sums_size(s);
    for (int block = 0; block < p.blocks; block++)
        for (int step = 0; step < p.steps; step++)
            for (int unit = 0; unit < block_units(&p, block); unit++, at += UNIT_INDEX)
                if (step < p.tables * p.taps)
                    put_index(s, bits, (2 * block + unit) * UNIT, step / p.taps, step % p.taps, at);
}

/* One thread's working memory, kept between calls and until the process ends; in large pages where there are any, since
   small ones may lie so that parts of it displace each other from the second cache. */
static void *scratch(size_t size) {
    static _Thread_local void *held;
    static _Thread_local size_t room;
    if (size > room) {
        free(held);
        room = (size + (size >> 2) + LARGE_PAGE - 1) / LARGE_PAGE * LARGE_PAGE;
        held = aligned_alloc(LARGE_PAGE, room);
        if (!held) room = 0;
#ifdef MADV_HUGEPAGE
        if (held) madvise(held, room, MADV_HUGEPAGE);
#endif
    }
    return held;
}

typedef struct {
    const bdm_shape *s;
    const bdm_input *input;
    const plan *p;
    const float *x, *scale, *bias;
    float *y;
    const int32_t *sums;
    const uint8_t *indices;
} job;

/* to[k] = scale[k] * (factor (2 S - total) - of_zero[k] + more[k]) + bias[k], S = the table entries' sum. */
static inline void finish_32(const int32_t *restrict of, const int32_t *restrict more, int32_t total, int factor,
                             const int32_t *restrict of_zero, const float *restrict scale, const float *restrict bias,
                             int count, float *restrict to) {
    for (int k = 0; k < count; k++) {
        const int32_t sum = factor * (2 * of[k] - total) - of_zero[k] + (more ? more[k] : 0);
        to[k] = (float)sum * scale[k] + (bias ? bias[k] : 0);
    }
}

/* A real zero outside the image counts as w a', and must count as 0: what is to be added for the output pixel whose
   window begins at input row `above` and column `before`. */
static void border_sums(const job *j, int above, int before, int k0, int count, int32_t *restrict more) {
    const bdm_shape *s = j->s;
    const int a = s->bits == 1 ? -1 : bdm_pad(s) - s->zero;
    const int32_t *restrict of = j->sums + s->k + k0;
    memset(more, 0, (size_t)count * 4);
    for (int y = above; y < above + s->kh; y++)
        for (int x = before; x < before + s->kw; x++, of += s->k) {
            if (y >= 0 && y < s->h && x >= 0 && x < s->w) continue;
            for (int k = 0; k < count; k++) more[k] -= a * of[k];
        }
}

/* Rows of the image that are quantized together: where channels are far apart, enough to read long runs of each. */
static inline int rows_at_once(const bdm_shape *s) {
    if (s->channels_last || s->w >= 256) return 1;
    return 256 / s->w < s->h ? 256 / s->w : s->h;
}

/* Output rows that are staged before they go to a channels-first image, in long runs. */
static inline int rows_staged(const plan *p) { return p->out_w >= 64 ? 1 : 64 / p->out_w; }

/* Output rows top .. bottom - 1 of image n, output blocks first .. last - 1. Returns 0 without memory. */
static int strip(const job *j, int n, int top, int bottom, int first, int last) {
    const bdm_shape *s = j->s;
    const plan *p = j->p;
    const int kh = s->kh, kw = s->kw, planes = p->planes, tables = p->tables, all_tables = planes * tables;
    const size_t row_tables = (size_t)p->row * TABLE, plane_tables = row_tables * tables;
    const size_t slot_tables = plane_tables * planes, sums_size = (size_t)PIXELS * UNIT * (2 * (last - first) + 1);
    const size_t staged = (size_t)(last - first) * 2 * UNIT + UNIT; /* floats of a staged pixel */
    const int stage_rows = s->channels_last ? 0 : rows_staged(p);
    const int at_once = rows_at_once(s);
    size_t size = slot_tables * kh + (size_t)(at_once * s->w + 64) * p->u_stride + (size_t)all_tables * TABLE +
                  (size_t)kh * p->row * 4 + (size_t)planes * p->steps * 8 + sums_size * 6 + staged * (size_t)(stage_rows * p->out_w + 16) * 4;
    uint8_t *memory = scratch(size + (size_t)(UNITS * UNIT + s->k + s->w) * 4 + 14 * 128);
    if (!memory) return 0;
#define TAKE(type, name, count) \
    type *name = (type *)memory; \
    memory += ((count) * sizeof(type) + 127) / 64 * 64
    TAKE(uint8_t, ring, slot_tables * kh);                   /* [kh slots][planes][tables][row] */
    TAKE(uint8_t, u, (size_t)(at_once * s->w + 64) * p->u_stride);     /* [rows][w][u_stride] */
    TAKE(uint8_t, outside, (size_t)all_tables * TABLE);      /* [planes][tables] of a pixel outside the image */
    TAKE(int32_t, totals, (size_t)kh * p->row);              /* [kh slots][row]: sum of u over the channels */
    TAKE(const uint8_t *, points, (size_t)planes * p->steps);
    TAKE(uint16_t, sums16, sums_size);
    TAKE(int32_t, sums32, sums_size);
    TAKE(int32_t, more, UNITS * UNIT);
    TAKE(int32_t, of_zero, s->k);                            /* zero times the sum of an output channel's weights */
    TAKE(int32_t, column, s->w);                             /* where a pixel of a row stands in the ring */
    TAKE(float, stage, staged * (size_t)(stage_rows * p->out_w + 16)); /* [rows][out_w][staged] */
#undef TAKE
#define COLUMN(x) (((x) + s->pw) % s->sw * p->columns + ((x) + s->pw) / s->sw)
    memset(totals, 0, (size_t)kh * p->row * 4); /* columns that nothing fills are added up, too */
    const int pad = bdm_pad(s), corrected = bdm_corrected(s), end = (p->out_w - 1) * s->sw - s->pw + kw;
    const int simple = planes == 1 && p->steps <= p->group, factor = s->bits == 1 ? 2 : 1;
    memset(u, 0, p->u_stride);
    memset(u, pad, s->c);
    for (int plane = 0; plane < planes; plane++)
        fill_tables(u, plane, planes, tables, outside + (size_t)plane * tables * TABLE, TABLE);
#define PUT_OUTSIDE(slot, at) \
    do { \
        for (int t = 0; t < all_tables; t++) \
            memcpy(ring + (slot) * slot_tables + t * row_tables + (size_t)(at) * TABLE, outside + (size_t)t * TABLE, \
                   TABLE); \
        totals[(slot) * p->row + (at)] = pad * s->c; \
    } while (0)
    for (int slot = 0; slot < kh; slot++) {
        for (int x = -s->pw; x < 0; x++) PUT_OUTSIDE(slot, COLUMN(x));
        for (int x = s->w; x < end; x++) PUT_OUTSIDE(slot, COLUMN(x));
    }
    const int inside = s->w < end ? s->w : end; /* no output looks further right */
    for (int x = 0; x < inside; x++) column[x] = COLUMN(x);
    for (int k = 0; k < s->k; k++) of_zero[k] = (s->bits == 1 ? 1 : s->zero) * j->sums[k];
    int made = top * s->sh - s->ph;             /* input rows before this one are in the ring */
    int held = 0, held_end = 0;                 /* input rows whose u is at hand */
    int staged_from = top;                      /* the first output row that is staged */
    const int needed = (bottom - 1) * s->sh - s->ph + kh < s->h ? (bottom - 1) * s->sh - s->ph + kh : s->h;
    for (int out = top; out < bottom; out++) {
        const int above = out * s->sh - s->ph;
        if (made < above) made = above;
        for (; made < above + kh; made++) {
            const int slot = (made + s->ph) % kh;
            if (made < 0 || made >= s->h) {
                for (int x = 0; x < inside; x++) PUT_OUTSIDE(slot, COLUMN(x));
                continue;
            }
            if (made >= held_end) {
                held = made, held_end = made + at_once < needed ? made + at_once : needed;
                if (s->channels_last)
                    quantize_last(s, j->input, n, j->x + ((size_t)n * s->h + made) * s->w * s->c, s->w, u, p->u_stride);
                else
                    quantize_first(s, j->input, n, j->x + ((size_t)n * s->c * s->h + made) * s->w,
                                   (held_end - held) * s->w, u, p->u_stride);
            }
            for (int x = 0; x < inside; x++) {
                const uint8_t *of = u + (size_t)((made - held) * s->w + x) * p->u_stride;
                const int at = column[x];
                uint8_t *to = ring + slot * slot_tables + (size_t)at * TABLE;
                for (int plane = 0; plane < planes; plane++)
                    fill_tables(of, plane, planes, tables, to + plane * plane_tables, row_tables);
                totals[slot * p->row + at] = sum_bytes(of, p->u_stride);
            }
        }
        for (int plane = 0; plane < planes; plane++) {
            const uint8_t **point = points + (size_t)plane * p->steps;
            for (int y = 0; y < kh; y++)
                for (int x = 0; x < kw; x++) {
                    const uint8_t *at = ring + (above + s->ph + y) % kh * slot_tables + plane * plane_tables +
                                        (size_t)COLUMN(x - s->pw) * TABLE;
                    for (int t = 0; t < tables; t++, at += row_tables) point[t * p->taps + y * kw + x] = at;
                }
            for (int step = tables * p->taps; step < p->steps; step++) point[step] = ring; /* index 0, whose entry is 0 */
        }
        if (out == top || (out - staged_from) == stage_rows) staged_from = out;
        for (int left = 0; left < p->out_w; left += PIXELS) {
            const int pixels = p->out_w - left < PIXELS ? p->out_w - left : PIXELS;
            const int border_row = corrected && (above < 0 || above + kh > s->h);
            const int border_columns = corrected && (left * s->sw < s->pw ||
                                                     (left + pixels - 1) * s->sw - s->pw + kw > s->w);
            int32_t window[PIXELS] = {0};
            for (int y = 0; y < kh; y++)
                for (int x = 0; x < kw; x++) {
                    const int32_t *of = totals + (above + s->ph + y) % kh * p->row + COLUMN(x - s->pw) + left;
                    for (int i = 0; i < PIXELS; i++) window[i] += of[i];
                }
            if (!simple) memset(sums32, 0, sums_size * 4);
            for (int plane = 0; plane < planes; plane++)
                for (int step = 0; step < p->steps; step += p->chunk) {
                    const int steps = p->steps - step < p->chunk ? p->steps - step : p->chunk;
                    for (int block = first; block < last; block++) {
                        const int units = block_units(p, block);
                        kernel(units, points + (size_t)plane * p->steps + step,
                               j->indices + 2 * block * p->unit_size + (size_t)step * units * UNIT_INDEX, steps,
                               (size_t)left * TABLE, sums16 + (size_t)(block - first) * 2 * UNIT * PIXELS,
                               step % p->group == 0);
                    }
                    if (!simple && (step + steps == p->steps || (step + steps) % p->group == 0))
                        for (size_t i = 0; i < sums_size; i++) sums32[i] += (int32_t)sums16[i] << plane * PLANE_BITS;
                }
            for (int block = first; block < last; block++) {
                const int outputs = block_units(p, block) * UNIT, k0 = block * 2 * UNIT;
                const int count = s->k - k0 < outputs ? s->k - k0 : outputs;
                const size_t at = (size_t)(block - first) * 2 * UNIT * PIXELS;
                const float *scale = j->scale + k0;
                const float *bias = j->bias ? j->bias + (j->input->bias_per_image ? (size_t)n * s->k : 0) + k0 : NULL;
                float *to = s->channels_last
                    ? j->y + (((size_t)n * p->out_h + out) * p->out_w + left) * s->k + k0
                    : stage + ((size_t)(out - staged_from) * p->out_w + left) * staged + (block - first) * 2 * UNIT;
                const size_t next = s->channels_last ? (size_t)s->k : staged;
                if (simple) finish_16(sums16 + at, outputs, pixels, window, of_zero + k0, scale, bias, count, to, next);
                if (!simple || border_row || border_columns)
                    for (int i = 0; i < pixels; i++) {
                        const int before = (left + i) * s->sw - s->pw;
                        const int border = border_row || (border_columns && (before < 0 || before + kw > s->w));
                        if (simple && !border) continue;
                        int32_t *sum = sums32 + at + i * outputs;
                        if (simple)
                            for (int k = 0; k < count; k++) sum[k] = sums16[at + i * outputs + k];
                        if (border) border_sums(j, above, before, k0, count, more);
                        finish_32(sum, border ? more : NULL, window[i], factor, of_zero + k0, scale, bias, count,
                                  to + i * next);
                    }
                if (j->input->residual && s->channels_last) {
                    const float *more_y = j->input->residual + (to - j->y);
                    for (int i = 0; i < pixels; i++)
                        for (int k = 0; k < count; k++) to[i * next + k] += more_y[i * next + k];
                }
            }
        }
        if (!s->channels_last && (out + 1 == bottom || out + 1 - staged_from == stage_rows)) {
            const int k0 = first * 2 * UNIT, k1 = last == p->blocks ? s->k : last * 2 * UNIT;
            store_first(stage, staged, k1 - k0, (out + 1 - staged_from) * p->out_w, (size_t)p->out_h * p->out_w,
                        j->y + (((size_t)n * s->k + k0) * p->out_h + staged_from) * p->out_w);
        }
    }
#undef COLUMN
#undef PUT_OUTSIDE
    return 1;
}

#define WORTH_A_THREAD 20e6   /* products; about 20 microseconds */
#define RESIDENT (384 << 10)  /* bytes of indices that one thread should stream through its cache */

static int run(const bdm_shape *s, const bdm_input *input, const float *x, const uint8_t *arranged, const float *sigma,
               const float *bias, float *y, int threads) {
    const plan p = make_plan(s);
    float *scale = malloc(s->k * sizeof(float));
    if (!scale) return BDM_NO_MEMORY;
    for (int k = 0; k < s->k; k++) scale[k] = sigma[k] * input->step;
    const job j = {s, input, &p, x, scale, bias, y, (const int32_t *)arranged, arranged + bdm_sums_size(s)};
    const double work = (double)s->n * p.out_h * p.out_w * s->k * s->c * p.taps;
    const int team = threads; /* a team of another size would end threads, and lose their scratch */
    if (work < WORTH_A_THREAD * threads) threads = work < 2 * WORTH_A_THREAD ? 1 : (int)(work / WORTH_A_THREAD);
    /* Threads share the output channels where the indices would not stay in a cache, and the rows otherwise. */
    int parts = (int)(p.units * p.unit_size / RESIDENT) + 1, rows = s->n * p.out_h;
    if (parts > threads) parts = threads;
    while (threads % parts) parts++;
    if (threads / parts > rows) parts = up(threads, rows);
    if (parts > p.blocks) parts = p.blocks;
    int strips = up(threads, parts * s->n), failed = 0;
    if (strips > p.out_h) strips = p.out_h;
    const int items = s->n * strips * parts;
#ifdef _OPENMP
#pragma omp parallel for num_threads(team) schedule(dynamic) if (threads > 1) reduction(|| : failed)
#endif
    for (int item = 0; item < items; item++) {
        const int part = item % parts, rest = item / parts, n = rest / strips, at = rest % strips;
        const int top = (int)((int64_t)p.out_h * at / strips), bottom = (int)((int64_t)p.out_h * (at + 1) / strips);
        failed = failed || !strip(&j, n, top, bottom, p.blocks * part / parts, p.blocks * (part + 1) / parts);
    }
    free(scale);
    if (input->residual && !s->channels_last)
        for (size_t i = 0, size = (size_t)s->n * s->k * p.out_h * p.out_w; i < size; i++) y[i] += input->residual[i];
    return failed ? BDM_NO_MEMORY : BDM_OK;
}

static int convolve(const bdm_shape *given, const bdm_input *input, const float *x, const uint8_t *arranged,
                    const float *sigma, const float *bias, float *y, int threads) {
    bdm_shape s = *given;
    const int by_image = s.n > 1 && (input->gain || input->bias_per_image);
    if (s.kh * s.kw > 1 || s.sh * s.sw > 1 || s.ph + s.pw || !s.channels_last || by_image)
        return run(&s, input, x, arranged, sigma, bias, y, threads);
    /* All pixels are alike: in rows of one tile, whose tables are still in the first cache when they are used. */
    const int64_t pixels = (int64_t)s.n * s.h * s.w, lines = pixels / PIXELS, left = pixels % PIXELS;
    s.n = 1;
    if (lines) {
        s.h = (int32_t)lines, s.w = PIXELS;
        const int failed = run(&s, input, x, arranged, sigma, bias, y, threads);
        if (failed) return failed;
    }
    if (!left) return BDM_OK;
    bdm_input rest = *input;
    if (rest.residual) rest.residual += lines * PIXELS * s.k;
    s.h = 1, s.w = (int32_t)left;
    return run(&s, &rest, x + lines * PIXELS * s.c, arranged, sigma, bias, y + lines * PIXELS * s.k, threads);
}
