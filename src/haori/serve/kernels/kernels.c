/* Decoding kernels for a CPU, in bf16 with sums in fp32. Each has a twin in plain torch, and tests compare the two.
 *
 * C with OpenMP and the vector types of GCC and clang: no intrinsics. All tensors are contiguous in their last dimension;
 * strides are in elements. GOMP_* symbols are resolved against the OpenMP runtime that torch has loaded, so both share
 * one set of threads.
 */

#include "numbers.h"

#define ROWS 4         /* rows under the same adapters that are worked on at once: ROWS_TOGETHER in kernels.py */
#define LINES_AHEAD 16 /* lines of A that are asked for before they are needed */

/* t[g][j] = sum over i of x[g][i] a[i][j] for LANES * n columns j, for rows * n * steps <= 16. `rows`, `n` and `steps`
 * are known when this is compiled, so sums stay in registers; each of `steps` sums takes every steps-th i, so that the
 * processor does not wait for one sum. */
INLINE void inner_block(float *t, int64_t t_stride, const float *x, int64_t x_stride, const bf16 *a, int64_t width,
                        int64_t rank, const int rows, const int n, const int steps) {
    numbers sum[16];
    for (int k = 0; k < rows * n * steps; k++) sum[k] = (numbers){0};
    for (int64_t i = 0; i + steps <= width; i += steps) {
#pragma GCC unroll 8
        for (int s = 0; s < steps; s++) {
            const bf16 *line = a + (i + s) * rank;
            __builtin_prefetch(line + LINES_AHEAD * rank);
#pragma GCC unroll 8
            for (int v = 0; v < n; v++) {
                numbers factor = wide_lanes(line + LANES * v);
#pragma GCC unroll 8
                for (int g = 0; g < rows; g++) sum[(g * steps + s) * n + v] += x[g * x_stride + i + s] * factor;
            }
        }
    }
    for (int64_t i = width - width % steps; i < width; i++)
        for (int v = 0; v < n; v++)
            for (int g = 0; g < rows; g++)
                sum[g * steps * n + v] += x[g * x_stride + i] * wide_lanes(a + i * rank + LANES * v);
#pragma GCC unroll 8
    for (int g = 0; g < rows; g++) {
#pragma GCC unroll 8
        for (int v = 0; v < n; v++) {
            numbers total = sum[g * steps * n + v];
#pragma GCC unroll 8
            for (int s = 1; s < steps; s++) total += sum[(g * steps + s) * n + v];
            memcpy(t + g * t_stride + LANES * v, &total, sizeof total);
        }
    }
}

/* t = x a for `rows` rows; t has room for `rank` rounded up to LANES, and what is behind rank in a line is ignored. */
INLINE void inner(float *t, int64_t t_stride, const float *x, int64_t x_stride, const bf16 *a, int64_t width,
                  int64_t rank, const int rows) {
    int64_t j = 0;
    for (; rank - j > 3 * LANES; j += 4 * LANES) inner_block(t + j, t_stride, x, x_stride, a + j, width, rank, rows, 4, 1);
    if (rank - j > 2 * LANES)
        inner_block(t + j, t_stride, x, x_stride, a + j, width, rank, rows, 3, rows == 1 ? 4 : 1);
    else if (rank - j > LANES)
        inner_block(t + j, t_stride, x, x_stride, a + j, width, rank, rows, 2, rows == 1 ? 4 : rows == 2 ? 2 : 1);
    else if (rank - j > 0)
        inner_block(t + j, t_stride, x, x_stride, a + j, width, rank, rows, 1, rows == 1 ? 8 : 4);
}

/* y[g][j] += sum over r of t[g][r] b[r][j] for LANES * n columns j, with sums in registers. */
INLINE void outer_block(bf16 *const *y, int64_t column, const float *t, int64_t t_stride, const bf16 *b, int64_t size,
                        int64_t rank, const int rows, const int n) {
    numbers sum[16];
    for (int g = 0; g < rows; g++)
        for (int v = 0; v < n; v++) sum[g * n + v] = wide_lanes(y[g] + column + LANES * v);
    for (int64_t r = 0; r < rank; r++) {
#pragma GCC unroll 8
        for (int v = 0; v < n; v++) {
            numbers factor = wide_lanes(b + r * size + column + LANES * v);
#pragma GCC unroll 8
            for (int g = 0; g < rows; g++) sum[g * n + v] += t[g * t_stride + r] * factor;
        }
    }
    for (int g = 0; g < rows; g++)
        for (int v = 0; v < n; v++) narrow_lanes(y[g] + column + LANES * v, sum[g * n + v]);
}

INLINE void outer(bf16 *const *y, const float *t, int64_t t_stride, const bf16 *b, int64_t size, int64_t rank,
                  const int rows) {
    int64_t j = 0;
    for (; j + 4 * LANES <= size; j += 4 * LANES) outer_block(y, j, t, t_stride, b, size, rank, rows, 4);
    for (; j + LANES <= size; j += LANES) outer_block(y, j, t, t_stride, b, size, rank, rows, 1);
    for (; j < size; j++) {
        for (int g = 0; g < rows; g++) {
            float sum = wide(y[g][j]);
            for (int64_t r = 0; r < rank; r++) sum += t[g * t_stride + r] * wide(b[r * size + j]);
            y[g][j] = narrow(sum);
        }
    }
}

/* Compile a call for each number of rows or heads, R. */
#define FOR_ROWS(rows, call)             \
    switch (rows) {                      \
        case 1: { enum { R = 1 }; call; break; } \
        case 2: { enum { R = 2 }; call; break; } \
        case 3: { enum { R = 3 }; call; break; } \
        default: { enum { R = 4 }; call; }       \
    }

/* y[row] += sum over the row's parts of strength * (x[row] A) B, A and B of the part's adapter.
 *
 * Group g: up to ROWS rows under the same adapters, rows[starts[g]] .. rows[starts[g + 1] - 1]; its parts are first[g]
 * .. first[g + 1], each with the address of an adapter and strengths[part][ROWS]. In an adapter's memory A [width, rank]
 * begins at element a, the B of module m [high[m] - low[m], right[m] - left[m]] at b[m]. 64 bytes behind A may be read.
 */
void haori_update(const bf16 *x, int64_t x_stride, bf16 *y, int64_t y_stride, int64_t groups, const int64_t *starts,
                  const int64_t *rows, const int64_t *first, const bf16 *const *adapters, const float *strengths,
                  int64_t a, int64_t width, int64_t rank, int64_t modules, const int64_t *low, const int64_t *high,
                  const int64_t *left, const int64_t *right, const int64_t *b) {
    int64_t t_stride = (rank + LANES - 1) / LANES * LANES;
#pragma omp parallel
    {
        float input[ROWS * width], t[ROWS * t_stride];
#pragma omp for schedule(dynamic, 1)
        for (int64_t k = 0; k < groups; k++) {
            const int64_t *row = rows + starts[k];
            int count = (int)(starts[k + 1] - starts[k]);
            for (int g = 0; g < count; g++) {
                const bf16 *source = x + row[g] * x_stride;
#pragma omp simd
                for (int64_t i = 0; i < width; i++) input[g * width + i] = wide(source[i]);
            }
            for (int64_t part = first[k]; part < first[k + 1]; part++) {
                const bf16 *factor = adapters[part] + a;
                FOR_ROWS(count, inner(t, t_stride, input, width, factor, width, rank, R))
                for (int g = 0; g < count; g++)
                    for (int64_t r = 0; r < rank; r++) t[g * t_stride + r] *= strengths[part * ROWS + g];
                for (int64_t m = 0; m < modules; m++) {
                    const bf16 *own = adapters[part] + b[m];
                    bf16 *target[ROWS] = {y, y, y, y};
                    for (int g = 0; g < count; g++) target[g] = y + row[g] * y_stride + left[m];
                    FOR_ROWS(count, outer(target, t + low[m], t_stride, own, right[m] - left[m], high[m] - low[m], R))
                }
            }
        }
    }
}

INLINE numbers load_lanes(const float *source) {
    numbers value;
    memcpy(&value, source, sizeof value);
    return value;
}

INLINE float lane_sum(numbers value) {
    typedef float half __attribute__((vector_size(32)));
    typedef float quarter __attribute__((vector_size(16)));
    half two[2];
    memcpy(two, &value, sizeof two);
    half one = two[0] + two[1];
    quarter four[2];
    memcpy(four, &one, sizeof four);
    quarter last = four[0] + four[1];
    return last[0] + last[2] + (last[1] + last[3]);
}

#define HEADS 4   /* query heads of one key head that are worked on at once */
#define TOKENS 64 /* tokens that are, between two looks at the greatest score */

/* scores[g][t] = q[g] . keys[t] for `count` tokens; q in fp32, width divides by LANES. */
INLINE void score(float *scores, const float *q, const bf16 *keys, int64_t count, int64_t width, const int heads) {
    for (int64_t t = 0; t < count; t++) {
        numbers dot[HEADS] = {{0}};
        for (int64_t j = 0; j < width; j += LANES) {
            numbers key = wide_lanes(keys + t * width + j);
#pragma GCC unroll 4
            for (int g = 0; g < heads; g++) dot[g] += key * load_lanes(q + g * width + j);
        }
#pragma GCC unroll 4
        for (int g = 0; g < heads; g++) scores[g * TOKENS + t] = lane_sum(dot[g]);
    }
}

/* sum[g][j] = sum[g][j] * fade[g] + sum over t of shares[g][t] values[t][j] for LANES * n numbers j. */
INLINE void gather_values(float *sum, const float *fade, const float *shares, const bf16 *values, int64_t count,
                          int64_t width, const int heads, const int n) {
    numbers part[16];
#pragma GCC unroll 4
    for (int g = 0; g < heads; g++)
#pragma GCC unroll 4
        for (int v = 0; v < n; v++) part[g * n + v] = load_lanes(sum + g * width + LANES * v) * fade[g];
    for (int64_t t = 0; t < count; t++) {
#pragma GCC unroll 4
        for (int v = 0; v < n; v++) {
            numbers value = wide_lanes(values + t * width + LANES * v);
#pragma GCC unroll 4
            for (int g = 0; g < heads; g++) part[g * n + v] += shares[g * TOKENS + t] * value;
        }
    }
#pragma GCC unroll 4
    for (int g = 0; g < heads; g++)
#pragma GCC unroll 4
        for (int v = 0; v < n; v++) memcpy(sum + g * width + LANES * v, &part[g * n + v], sizeof(numbers));
}

/* Attention of up to HEADS query heads over `length` tokens of one key head, block by block (arXiv 2205.14135). */
INLINE void attend_heads(bf16 *out, const float *q, const bf16 *keys, const bf16 *values, int64_t length, int64_t width,
                         const int heads) {
    float sum[HEADS * width], scores[HEADS * TOKENS], most[HEADS], total[HEADS], fade[HEADS];
    memset(sum, 0, sizeof sum);
    for (int g = 0; g < heads; g++) most[g] = -1e30f, total[g] = 0.0f;
    for (int64_t start = 0; start < length; start += TOKENS) {
        int64_t count = length - start < TOKENS ? length - start : TOKENS, j = 0;
        score(scores, q, keys + start * width, count, width, heads);
        for (int g = 0; g < heads; g++) {
            float *line = scores + g * TOKENS, greatest = most[g], part = 0.0f;
#pragma omp simd reduction(max : greatest)
            for (int64_t t = 0; t < count; t++) greatest = line[t] > greatest ? line[t] : greatest;
#pragma omp simd reduction(+ : part)
            for (int64_t t = 0; t < count; t++) {
                line[t] = exponential(line[t] - greatest);
                part += line[t];
            }
            fade[g] = exponential(most[g] - greatest);
            total[g] = total[g] * fade[g] + part;
            most[g] = greatest;
        }
        const bf16 *some = values + start * width;
        for (; j + 4 * LANES <= width; j += 4 * LANES)
            gather_values(sum + j, fade, scores, some + j, count, width, heads, 4);
        for (; j < width; j += LANES) gather_values(sum + j, fade, scores, some + j, count, width, heads, 1);
    }
    for (int g = 0; g < heads; g++)
        for (int64_t j = 0; j < width; j++) out[g * width + j] = narrow(sum[g * width + j] / total[g]);
}

/* Number j of a head turned by the rotary angles c, s (the first half of s is negative), rounded. */
INLINE float turned(const bf16 *head, const bf16 *c, const bf16 *s, int64_t j, int64_t width) {
    int64_t other = j < width / 2 ? j + width / 2 : j - width / 2;
    return wide(narrow(wide(head[j]) * wide(c[j]) + wide(head[other]) * wide(s[j])));
}

/* Attention for `count` rows, each a token of some sequence, with `kv_heads` x `groups` query heads of `width`.
 *
 * Row i is row rows[i] of qkv [N, (heads + 2 kv_heads) width], queries and keys not yet turned by the rotary angles
 * cosines, sines [N, width], and of out [N, heads width]. Its sequence's keys and values [kv_heads, capacities[i],
 * width] begin at keys[i], values[i]; its own are written to positions[i], all rows' first of all, and then it attends to
 * positions 0 .. positions[i]. width divides by LANES.
 */
void haori_attend(const bf16 *qkv, int64_t qkv_stride, const bf16 *cosines, const bf16 *sines, bf16 *const *keys,
                  bf16 *const *values, const int64_t *rows, const int64_t *capacities, const int64_t *positions,
                  int64_t count, int64_t kv_heads, int64_t groups, int64_t width, float scale, bf16 *out,
                  int64_t out_stride) {
#pragma omp parallel
    {
        float q[HEADS * width];
#pragma omp for schedule(static)
        for (int64_t i = 0; i < count; i++) {
            const bf16 *row = qkv + rows[i] * qkv_stride, *c = cosines + rows[i] * width, *s = sines + rows[i] * width;
            for (int64_t h = 0; h < kv_heads; h++) {
                const bf16 *key = row + (kv_heads * groups + h) * width, *value = key + kv_heads * width;
                int64_t offset = (h * capacities[i] + positions[i]) * width;
                for (int64_t j = 0; j < width; j++) keys[i][offset + j] = narrow(turned(key, c, s, j, width));
                memcpy(values[i] + offset, value, width * sizeof(bf16));
            }
        }
#pragma omp for collapse(2) schedule(dynamic, 4)
        for (int64_t i = 0; i < count; i++) {
            for (int64_t h = 0; h < kv_heads; h++) {
                const bf16 *row = qkv + rows[i] * qkv_stride, *c = cosines + rows[i] * width, *s = sines + rows[i] * width;
                const bf16 *k = keys[i] + h * capacities[i] * width, *v = values[i] + h * capacities[i] * width;
                for (int64_t g = 0; g < groups; g += HEADS) {
                    int heads = (int)(groups - g < HEADS ? groups - g : HEADS);
                    const bf16 *head = row + (h * groups + g) * width;
                    for (int n = 0; n < heads; n++)
                        for (int64_t j = 0; j < width; j++)
                            q[n * width + j] = scale * turned(head + n * width, c, s, j, width);
                    bf16 *target = out + rows[i] * out_stride + (h * groups + g) * width;
                    FOR_ROWS(heads, attend_heads(target, q, k, v, positions[i] + 1, width, R))
                }
            }
        }
    }
}

/* y = x + the RMS norm's input, in one go: sum[i] = x[i] + added[i] (rounded), y[i] = sum[i] / rms(sum[i]) * weight. */
void haori_add_norm(const bf16 *x, const bf16 *added, bf16 *sum, bf16 *y, const bf16 *weight, int64_t count,
                    int64_t width, float epsilon) {
#pragma omp parallel for schedule(static) if (count > 4)
    for (int64_t i = 0; i < count; i++) {
        const bf16 *one = x + i * width;
        bf16 *whole = sum + i * width, *target = y + i * width;
        float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
        for (int64_t j = 0; j < width; j++) {
            bf16 rounded = added ? narrow(wide(one[j]) + wide(added[i * width + j])) : one[j];
            whole[j] = rounded;
            squares += wide(rounded) * wide(rounded);
        }
        float inverse = 1.0f / sqrtf(squares / width + epsilon);
#pragma omp simd
        for (int64_t j = 0; j < width; j++) target[j] = narrow(wide(whole[j]) * inverse * wide(weight[j]));
    }
}

/* out[i] = silu(gate[i]) * up[i], gate and up side by side in [count, 2 width]. */
void haori_gate(const bf16 *both, bf16 *out, int64_t count, int64_t width) {
#pragma omp parallel for schedule(static) if (count > 4)
    for (int64_t i = 0; i < count; i++) {
        const bf16 *gate = both + i * 2 * width, *up = gate + width;
#pragma omp simd
        for (int64_t j = 0; j < width; j++) {
            out[i * width + j] = narrow(wide(narrow(wide(gate[j]) * logistic(wide(gate[j])))) * wide(up[j]));
        }
    }
}

/* Weights of 8 and 4 bits come in blocks of 64 inputs, STRIPES of LANES: in 8 bits, byte k of word l of a block is input
 * LANES k + l; in 4 bits, bits 4k to 4k + 3 of half l are. So a stripe is a shift away, in the order of the inputs. */
#define STRIPES 4
#define BLOCK (STRIPES * LANES)
#define OUTS 4 /* outputs that are worked on at once: their first blocks lie side by side, then their second ones ... */
#ifndef BYTES_AHEAD
#define BYTES_AHEAD 4096 /* how far ahead of the one in use a stretch of a packed weight is asked for */
#endif

typedef int32_t integers __attribute__((vector_size(64)));

INLINE numbers int8_stripe(const int8_t *block, const int k) {
    words whole;
    memcpy(&whole, block, sizeof whole);
    return __builtin_convertvector((integers)(whole << (24 - 8 * k)) >> 24, numbers);
}

INLINE numbers int4_stripe(const uint16_t *block, const int k) {
    halves packed;
    memcpy(&packed, block, sizeof packed);
    return __builtin_convertvector((integers)(__builtin_convertvector(packed, words) >> (4 * k) & 15), numbers);
}

/* y[g][o] = scales[o] * sum over i of w[o][i] x[g][i], for `outs` outputs of `rows` rows; x is padded to whole blocks. */
INLINE void int8_rows(bf16 *y, int64_t y_stride, const float *x, const int8_t *packed, const float *scales,
                      int64_t blocks, const int rows, const int outs) {
    numbers sum[16];
    for (int k = 0; k < rows * outs; k++) sum[k] = (numbers){0};
    for (int64_t j = 0; j < blocks; j++) {
        for (int o = 0; o < outs; o++) __builtin_prefetch(packed + (j * outs + o) * BLOCK + BYTES_AHEAD);
#pragma GCC unroll 4
        for (int k = 0; k < STRIPES; k++) {
#pragma GCC unroll 4
            for (int o = 0; o < outs; o++) {
                numbers factor = int8_stripe(packed + (j * outs + o) * BLOCK, k);
#pragma GCC unroll 4
                for (int g = 0; g < rows; g++)
                    sum[g * outs + o] += factor * load_lanes(x + (g * blocks + j) * BLOCK + LANES * k);
            }
        }
    }
    for (int g = 0; g < rows; g++)
        for (int o = 0; o < outs; o++) y[g * y_stride + o] = narrow(lane_sum(sum[g * outs + o]) * scales[o]);
}

/* The same for 4 bits: a weight is q * step + low, with steps and lows [outs][2 blocks]; totals[g][2 blocks] are the sums
 * of 32 inputs each. */
INLINE void int4_rows(bf16 *y, int64_t y_stride, const float *x, const float *totals, const uint16_t *packed,
                      const bf16 *steps, const bf16 *lows, int64_t blocks, const int rows, const int outs) {
    numbers sum[16];
    float step[OUTS * 2 * blocks];
    for (int k = 0; k < rows * outs; k++) sum[k] = (numbers){0};
#pragma omp simd
    for (int64_t j = 0; j < outs * 2 * blocks; j++) step[j] = wide(steps[j]);
    for (int64_t j = 0; j < blocks; j++) {
        for (int o = 0; o < outs; o++) __builtin_prefetch(packed + (j * outs + o) * LANES + BYTES_AHEAD / 2);
#pragma GCC unroll 4
        for (int o = 0; o < outs; o++) {
            const uint16_t *block = packed + (j * outs + o) * LANES;
            const float *both = step + (o * blocks + j) * 2;
#pragma GCC unroll 4
            for (int k = 0; k < STRIPES; k++) {
                numbers factor = int4_stripe(block, k) * both[k / 2];
#pragma GCC unroll 4
                for (int g = 0; g < rows; g++)
                    sum[g * outs + o] += factor * load_lanes(x + (g * blocks + j) * BLOCK + LANES * k);
            }
        }
    }
    for (int g = 0; g < rows; g++) {
        for (int o = 0; o < outs; o++) {
            float rest = 0.0f;
#pragma omp simd reduction(+ : rest)
            for (int64_t j = 0; j < 2 * blocks; j++) rest += wide(lows[o * 2 * blocks + j]) * totals[g * 2 * blocks + j];
            y[g * y_stride + o] = narrow(lane_sum(sum[g * outs + o]) + rest);
        }
    }
}

/* Widen x [count, width] into [count, blocks * BLOCK], zeros behind each row. */
INLINE void pad_rows(float *input, const bf16 *x, int64_t count, int64_t width, int64_t blocks) {
    for (int64_t i = 0; i < count; i++) {
        float *line = input + i * blocks * BLOCK;
#pragma omp simd
        for (int64_t j = 0; j < width; j++) line[j] = wide(x[i * width + j]);
        for (int64_t j = width; j < blocks * BLOCK; j++) line[j] = 0.0f;
    }
}

/* y = W x for a weight in 8 bits with one scale per output, y [count, out]; out divides by OUTS. For few rows: a stretch
 * of the weight is read from memory once, and from the nearest cache for every ROWS rows. */
void haori_int8(const bf16 *x, const int8_t *packed, const float *scales, bf16 *y, int64_t count, int64_t width,
                int64_t out) {
    int64_t blocks = (width + BLOCK - 1) / BLOCK;
#pragma omp parallel
    {
        float input[count * blocks * BLOCK];
        pad_rows(input, x, count, width, blocks);
#pragma omp for schedule(static)
        for (int64_t o = 0; o < out; o += OUTS) {
            for (int64_t i = 0; i < count; i += ROWS) {
                int rows = (int)(count - i < ROWS ? count - i : ROWS);
                FOR_ROWS(rows, int8_rows(y + i * out + o, out, input + i * blocks * BLOCK, packed + o * blocks * BLOCK,
                                         scales + o, blocks, R, OUTS))
            }
        }
    }
}

/* The same for 4 bits. */
void haori_int4(const bf16 *x, const uint16_t *packed, const bf16 *steps, const bf16 *lows, bf16 *y, int64_t count,
                int64_t width, int64_t out) {
    int64_t blocks = (width + BLOCK - 1) / BLOCK;
#pragma omp parallel
    {
        float input[count * blocks * BLOCK], totals[count * 2 * blocks];
        pad_rows(input, x, count, width, blocks);
        for (int64_t j = 0; j < count * 2 * blocks; j++)
            totals[j] = lane_sum(load_lanes(input + j * 2 * LANES) + load_lanes(input + j * 2 * LANES + LANES));
#pragma omp for schedule(static)
        for (int64_t o = 0; o < out; o += OUTS) {
            for (int64_t i = 0; i < count; i += ROWS) {
                int rows = (int)(count - i < ROWS ? count - i : ROWS);
                FOR_ROWS(rows, int4_rows(y + i * out + o, out, input + i * blocks * BLOCK, totals + i * 2 * blocks,
                                         packed + o * blocks * LANES, steps + o * 2 * blocks, lows + o * 2 * blocks, blocks,
                                         R, OUTS))
            }
        }
    }
}

/* A weight of 8 bits in 16: widened [out, blocks * BLOCK]. */
void haori_widen_int8(const int8_t *packed, const float *scales, bf16 *widened, int64_t blocks, int64_t out) {
#pragma omp parallel for schedule(static)
    for (int64_t o = 0; o < out; o++) {
        for (int64_t j = 0; j < blocks; j++) {
            const int8_t *block = packed + ((o / OUTS * blocks + j) * OUTS + o % OUTS) * BLOCK;
            for (int k = 0; k < STRIPES; k++)
                narrow_lanes(widened + (o * blocks + j) * BLOCK + LANES * k, int8_stripe(block, k) * scales[o]);
        }
    }
}

/* A weight of 4 bits in 16: widened [out, blocks * BLOCK]. */
void haori_widen_int4(const uint16_t *packed, const bf16 *steps, const bf16 *lows, bf16 *widened, int64_t blocks,
                      int64_t out) {
#pragma omp parallel for schedule(static)
    for (int64_t o = 0; o < out; o++) {
        for (int64_t j = 0; j < blocks; j++) {
            const uint16_t *block = packed + ((o / OUTS * blocks + j) * OUTS + o % OUTS) * LANES;
            for (int k = 0; k < STRIPES; k++) {
                int64_t group = (o * blocks + j) * 2 + k / 2;
                narrow_lanes(widened + (o * blocks + j) * BLOCK + LANES * k,
                             int4_stripe(block, k) * wide(steps[group]) + wide(lows[group]));
            }
        }
    }
}
