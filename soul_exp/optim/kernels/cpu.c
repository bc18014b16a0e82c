/* One pass over memory for every elementwise rule. Compiled at first use by cpu.py; held to plain.py bit for bit.
 *
 * Blocks of BLOCK coordinates stay in the first-level cache: expand to fp32 (nothing to do where a tensor is fp32, it
 * is worked on in place), apply the rule, shrink to what is stored, look at what was stored. So dtypes, roundings and
 * rules add up and do not multiply. Contraction is off (-ffp-contract=off): every operation is rounded once.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

enum { BLOCK = 256, AHEAD = 1024 }; /* coordinates; the fastest of 128 to 1024 and of 512 to 2048 */
enum { REFRESH, REFRESH_SQUARED, SOPHIA, SOPHIA_REFRESH, SIGNUM, LION, ADAMW }; /* the order of kernels.RULES */
enum { NEAREST, MASTER, KAHAN, STOCHASTIC };                                    /* and of kernels.ROUNDINGS */
enum { WON, UNTOUCHED, TOTAL, CHANGED, SUM_M2, SUM_H2, SUM_DW2, NONFINITE };    /* and of kernels.STATISTICS */

typedef struct {
    float lr, decay, beta1, rest1, beta2, rest2, scale, eps;
} Numbers;

typedef struct { /* one row of the table that cpu.py fills; a null pointer is a tensor that the rule does not have */
    const void *grad;
    void *weight, *m, *h, *spare;
    int64_t size;
    uint64_t key;
} Operands;

typedef struct {
    int rule, rounding, grad_bf16, weight_bf16, m_bf16, h_bf16, counting;
    Numbers numbers;
} Pass;

#define EACH for (int i = 0; i < n; i++)
#define SIMD _Pragma("omp simd")

static inline uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

static inline float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

static inline float of_bf16(uint16_t x) { return float_of((uint32_t)x << 16); }

static inline uint16_t to_bf16(float x) { /* to nearest, ties to even; NaN stays NaN */
    uint32_t bits = bits_of(x);
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return (uint16_t)(x != x ? 0x7fc0 : rounded);
}

static inline uint32_t mix(uint32_t x) { /* plain.mix */
    x = (x ^ x >> 16) * 0x7feb352du;
    x = (x ^ x >> 15) * 0x846ca68bu;
    return x ^ x >> 16;
}

/* The n coordinates from `start` as fp32: the tensor itself, or `buffer` filled from bf16. */
static float *expand(const void *tensor, int bf16, int64_t start, int n, float *restrict buffer) {
    if (!tensor) return 0;
    if (!bf16) return (float *)tensor + start;
    const uint16_t *stored = (const uint16_t *)tensor + start;
    SIMD EACH buffer[i] = of_bf16(stored[i]);
    return buffer;
}

static void shrink(const float *restrict x, void *tensor, int bf16, int64_t start, int n) {
    if (!tensor || !bf16) return;
    uint16_t *restrict stored = (uint16_t *)tensor + start;
    SIMD EACH stored[i] = to_bf16(x[i]);
}

static inline float curvature(float h, float c, Numbers k) { return h * k.beta2 + c * k.rest2; }

static inline float sign(float x) { return (float)((x > 0) - (x < 0)); }

static inline float clipped(float m, float h, Numbers k) {
    float d = h * k.scale;
    d = d > k.eps ? d : k.eps;
    float u = m / d;
    u = u > 1 ? 1 : u;
    return u < -1 ? -1 : u;
}

static void apply(int rule, Numbers k, const float *restrict g, float *restrict w, float *restrict m,
                  float *restrict h, int n) {
    switch (rule) {
    case REFRESH: SIMD EACH h[i] = curvature(h[i], g[i], k); break;
    case REFRESH_SQUARED: SIMD EACH h[i] = curvature(h[i], g[i] * g[i], k); break;
    case SOPHIA:
        SIMD EACH {
            m[i] = m[i] * k.beta1 + g[i] * k.rest1;
            w[i] = w[i] * k.decay - clipped(m[i], h[i], k) * k.lr;
        }
        break;
    case SOPHIA_REFRESH:
        SIMD EACH {
            m[i] = m[i] * k.beta1 + g[i] * k.rest1;
            h[i] = curvature(h[i], g[i] * g[i], k);
            w[i] = w[i] * k.decay - clipped(m[i], h[i], k) * k.lr;
        }
        break;
    case SIGNUM:
        SIMD EACH {
            m[i] = m[i] * k.beta1 + g[i] * k.rest1;
            w[i] = w[i] * k.decay - sign(m[i]) * k.lr;
        }
        break;
    case LION:
        SIMD EACH {
            float u = sign(m[i] * k.beta1 + g[i] * k.rest1);
            w[i] = w[i] * k.decay - u * k.lr;
            m[i] = m[i] * k.beta2 + g[i] * k.rest2;
        }
        break;
    case ADAMW:
        SIMD EACH {
            m[i] = m[i] * k.beta1 + g[i] * k.rest1;
            h[i] = curvature(h[i], g[i] * g[i], k);
            float u = m[i] / (sqrtf(h[i]) * k.scale + k.eps);
            w[i] = w[i] * k.decay - u * k.lr;
        }
    }
}

/* Weights of a mixed precision: `w` rounded into what the model holds, and the rest into the spare. */
static void shrink_weight(Pass p, const float *restrict w, Operands o, int64_t start, int n) {
    if (p.rounding == STOCHASTIC) {
        uint16_t *restrict stored = (uint16_t *)o.weight + start;
        uint32_t low = (uint32_t)o.key, high = (uint32_t)(o.key >> 32);
        SIMD EACH {
            uint32_t noise = mix(mix((uint32_t)start + (uint32_t)i + low) ^ high) & 0xffff;
            stored[i] = (uint16_t)((bits_of(w[i]) + noise) >> 16);
        }
        return;
    }
    shrink(w, o.weight, p.weight_bf16, start, n);
    if (p.rounding == KAHAN) {
        const uint16_t *stored = (const uint16_t *)o.weight + start;
        uint16_t *restrict rest = (uint16_t *)o.spare + start;
        SIMD EACH rest[i] = to_bf16(w[i] - of_bf16(stored[i]));
    }
}

/* Adds what STATISTICS says of n stored coordinates; `old` are the weights that were stored before. */
static void count(Pass p, Operands o, const float *restrict old, int64_t start, int n, double *sums) {
    float w_buffer[BLOCK], m_buffer[BLOCK], h_buffer[BLOCK];
    const float *w = expand(o.weight, p.weight_bf16, start, n, w_buffer);
    const float *m = expand(o.m, p.m_bf16, start, n, m_buffer);
    const float *h = expand(o.h, p.h_bf16, start, n, h_buffer);
    int won = 0, untouched = 0, changed = 0;
    float m2 = 0, dw2 = 0; /* of one block: not worth a conversion each */
    double h2 = 0;         /* of h, itself a square, the square leaves fp32's range */
    if (!h) h = memset(h_buffer, 0, sizeof h_buffer);
    float scale = p.rule == SOPHIA || p.rule == SOPHIA_REFRESH ? p.numbers.scale : 0;
#pragma omp simd reduction(+ : won, untouched, changed, m2, h2, dw2)
    EACH {
        float move = w[i] - old[i];
        won += fabsf(m[i]) < h[i] * scale;
        untouched += (m[i] == 0) & (h[i] == 0);
        changed += bits_of(w[i]) != bits_of(old[i]);
        m2 += m[i] * m[i];
        h2 += (double)h[i] * h[i];
        dw2 += move * move;
    }
    sums[WON] += won, sums[UNTOUCHED] += untouched, sums[CHANGED] += changed;
    sums[SUM_M2] += m2, sums[SUM_H2] += h2, sums[SUM_DW2] += dw2;
}

/* The whole update of n <= BLOCK coordinates from `start`, whose gradients `g` are all finite. */
static void move(const Pass *pass, Operands o, const float *g, int64_t start, int n, double *sums) {
    float w_buffer[BLOCK], m_buffer[BLOCK], h_buffer[BLOCK], old[BLOCK];
    Pass p = *pass;
    float *m = expand(o.m, p.m_bf16, start, n, m_buffer);
    float *h = expand(o.h, p.h_bf16, start, n, h_buffer);
    float *w = expand(o.weight, p.weight_bf16, start, n, w_buffer);
    int counting = p.counting && w;
    if (counting) memcpy(old, w, n * sizeof(float));
    if (p.rounding == MASTER && w) w = (float *)o.spare + start;
    if (p.rounding == KAHAN && w) {
        const uint16_t *rest = (const uint16_t *)o.spare + start;
        SIMD EACH w[i] = w[i] + of_bf16(rest[i]);
    }
    apply(p.rule, p.numbers, g, w, m, h, n);
    shrink(m, o.m, p.m_bf16, start, n);
    shrink(h, o.h, p.h_bf16, start, n);
    if (w) shrink_weight(p, w, o, start, n);
    if (counting) count(p, o, old, start, n, sums);
}

/* Asks for what a later block will need: the hardware's own look-ahead ends with each page of memory. */
static void prefetch(const void *tensor, int bf16, int64_t start) {
    if (!tensor) return;
    const char *bytes = (const char *)tensor + start * (bf16 ? 2 : 4);
    for (int i = 0; i < BLOCK * (bf16 ? 2 : 4); i += 64) __builtin_prefetch(bytes + i, 1);
}

/* Updates the coordinates [begin, end) of the tensors of `table` laid end to end, and adds to sums[8]. */
void update(const Pass *pass, const Operands *table, int64_t begin, int64_t end, double *sums) {
    int squaring = pass->rule == REFRESH_SQUARED || pass->rule == SOPHIA_REFRESH || pass->rule == ADAMW;
    float limit = squaring ? 0x1p64f : INFINITY; /* g * g is finite in fp32 exactly where |g| < 2^64 */
    float g_buffer[BLOCK];
    while (begin >= table->size) begin -= table->size, end -= table->size, table++;
    for (; end > 0; begin = 0, end -= table->size, table++) {
        int64_t stop = end < table->size ? end : table->size;
        for (int64_t start = begin; start < stop; start += BLOCK) {
            int n = stop - start < BLOCK ? (int)(stop - start) : BLOCK, good = 0;
            if (start + AHEAD + BLOCK <= stop) {
                prefetch(table->grad, pass->grad_bf16, start + AHEAD);
                prefetch(table->weight, pass->weight_bf16, start + AHEAD);
                prefetch(table->m, pass->m_bf16, start + AHEAD);
                prefetch(table->h, pass->h_bf16, start + AHEAD);
                prefetch(table->spare, pass->rounding == KAHAN, start + AHEAD);
            }
            const float *g = expand(table->grad, pass->grad_bf16, start, n, g_buffer);
#pragma omp simd reduction(+ : good)
            EACH good += fabsf(g[i]) < limit;
            if (pass->counting && table->weight) sums[TOTAL] += n;
            if (good == n) {
                move(pass, *table, g, start, n, sums);
                continue;
            }
            sums[NONFINITE] += n - good;
            for (int from = 0, to; from < n; from = to + 1) { /* the runs between the coordinates to be left alone */
                for (to = from; to < n && fabsf(g[to]) < limit; to++) {
                }
                if (to > from) move(pass, *table, g + from, start + from, to - from, sums);
            }
        }
    }
}
