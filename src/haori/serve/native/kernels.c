/* Decoding kernels for a CPU, in bf16 with sums in fp32. Each has a twin in plain torch, and tests compare the two.
 *
 * Plain C with OpenMP: no intrinsics, the compiler vectorises. All tensors are contiguous in their last dimension;
 * strides are in elements. GOMP_* symbols are resolved against the OpenMP runtime that torch has loaded, so both share
 * one set of threads.
 */

#include <math.h>
#include <stdint.h>
#include <string.h>

typedef uint16_t bf16;

static inline float wide(bf16 value) {
    union { uint32_t bits; float number; } u = {(uint32_t)value << 16};
    return u.number;
}

static inline bf16 narrow(float number) {
    union { float number; uint32_t bits; } u = {number};
    return (bf16)((u.bits + 0x7FFF + ((u.bits >> 16) & 1)) >> 16); /* to the nearest, ties to even */
}

/* e^x to about 2e-7, for x <= 88: 2^n times a polynomial over half an octave either side; the compiler vectorises it. */
static inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    float n = __builtin_rintf(x * 1.44269504f);
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    union { uint32_t bits; float number; } power = {(uint32_t)((int32_t)n + 127) << 23};
    return (p * r * r + r + 1.0f) * power.number;
}

/* sum[j] += strength * sum over i of x[i] matrix[i][j], for x in fp32; four rows of the matrix at a time. */
static void add_products(float *restrict sum, const float *restrict x, float strength, const bf16 *restrict matrix,
                         int64_t rows, int64_t columns) {
    int64_t i = 0;
    for (; i + 4 <= rows; i += 4) {
        float x0 = strength * x[i], x1 = strength * x[i + 1], x2 = strength * x[i + 2], x3 = strength * x[i + 3];
        const bf16 *m0 = matrix + i * columns, *m1 = m0 + columns, *m2 = m1 + columns, *m3 = m2 + columns;
#pragma omp simd
        for (int64_t j = 0; j < columns; j++)
            sum[j] += x0 * wide(m0[j]) + x1 * wide(m1[j]) + x2 * wide(m2[j]) + x3 * wide(m3[j]);
    }
    for (; i < rows; i++) {
        float value = strength * x[i];
#pragma omp simd
        for (int64_t j = 0; j < columns; j++) sum[j] += value * wide(matrix[i * columns + j]);
    }
}

/* The same for x in bf16, converted 256 at a time. */
static void add_rows(float *restrict sum, const bf16 *restrict x, float strength, const bf16 *restrict matrix,
                     int64_t rows, int64_t columns) {
    float part[256];
    for (int64_t start = 0; start < rows; start += 256) {
        int64_t count = rows - start < 256 ? rows - start : 256;
#pragma omp simd
        for (int64_t i = 0; i < count; i++) part[i] = wide(x[start + i]);
        add_products(sum, part, strength, matrix + start * columns, count, columns);
    }
}

/* y[row] += sum over the row's parts of strength * (x[row] A[slot]) B[slot].
 *
 * rows: `count` rows with parts; the parts of rows[i] are first[i] .. first[i + 1].
 * a: [slots, width, rank]; the B of module m is b[m]: [slots, high[m] - low[m], right[m] - left[m]].
 */
void haori_update(const bf16 *x, int64_t x_stride, bf16 *y, int64_t y_stride, int64_t count, const int64_t *rows,
                  const int64_t *first, const int64_t *slots, const float *strengths, const bf16 *a, int64_t width,
                  int64_t rank, int64_t modules, const bf16 *const *b, const int64_t *low, const int64_t *high,
                  const int64_t *left, const int64_t *right, float *scratch, int64_t scratch_stride) {
#pragma omp parallel for schedule(dynamic, 1)
    for (int64_t i = 0; i < count; i++) {
        const bf16 *input = x + rows[i] * x_stride;
        bf16 *output = y + rows[i] * y_stride;
        float *sum = scratch + i * scratch_stride;
        float *t = sum + right[modules - 1];
        memset(sum, 0, right[modules - 1] * sizeof(float));
        for (int64_t part = first[i]; part < first[i + 1]; part++) {
            const bf16 *factor = a + slots[part] * width * rank;
            memset(t, 0, rank * sizeof(float));
            add_rows(t, input, 1.0f, factor, width, rank);
            for (int64_t m = 0; m < modules; m++) {
                int64_t size = right[m] - left[m];
                const bf16 *outer = b[m] + slots[part] * (high[m] - low[m]) * size;
                add_products(sum + left[m], t + low[m], strengths[part], outer, high[m] - low[m], size);
            }
        }
        for (int64_t m = 0; m < modules; m++) {
#pragma omp simd
            for (int64_t o = left[m]; o < right[m]; o++) output[o] = narrow(wide(output[o]) + sum[o]);
        }
    }
}

/* One decoding step of attention for `count` sequences with `kv_heads` x `groups` query heads of `width`.
 *
 * qkv: [count, (heads + 2 kv_heads) width], queries and keys not yet turned by the rotary angles cosines, sines [count,
 * width] (the first half of sines is negative). Turned keys and values are written to the cache at places[i]; then each
 * query attends to places 0 .. places[i]. keys, values: [rows, kv_heads, capacity, width]; out: [count, heads width].
 */
void haori_attend(const bf16 *qkv, int64_t qkv_stride, const bf16 *cosines, const bf16 *sines, bf16 *keys, bf16 *values,
                  int64_t capacity, const int64_t *places, int64_t count, int64_t kv_heads, int64_t groups,
                  int64_t width, float scale, bf16 *out, int64_t out_stride, float *scratch, int64_t scratch_stride) {
    int64_t half = width / 2;
#pragma omp parallel for collapse(2) schedule(dynamic, 1)
    for (int64_t i = 0; i < count; i++) {
        for (int64_t h = 0; h < kv_heads; h++) {
            const bf16 *row = qkv + i * qkv_stride, *c = cosines + i * width, *s = sines + i * width;
            bf16 *k = keys + (i * kv_heads + h) * capacity * width, *v = values + (i * kv_heads + h) * capacity * width;
            int64_t length = places[i] + 1;
            float *q = scratch + (i * kv_heads + h) * scratch_stride, *scores = q + groups * width;
            float *sum = scores + groups * capacity;
            for (int64_t g = 0; g < groups; g++) {
                const bf16 *head = row + (h * groups + g) * width;
                for (int64_t j = 0; j < width; j++)
                    q[g * width + j] = scale * wide(narrow(wide(head[j]) * wide(c[j]) +
                                                           wide(head[(j + half) % width]) * wide(s[j])));
            }
            const bf16 *key = row + (kv_heads * groups + h) * width, *value = key + kv_heads * width;
            for (int64_t j = 0; j < width; j++)
                k[places[i] * width + j] = narrow(wide(key[j]) * wide(c[j]) +
                                                  wide(key[(j + half) % width]) * wide(s[j]));
            memcpy(v + places[i] * width, value, width * sizeof(bf16));
            for (int64_t t = 0; t < length; t++) {
                for (int64_t g = 0; g < groups; g++) {
                    float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
                    for (int64_t j = 0; j < width; j++) dot += q[g * width + j] * wide(k[t * width + j]);
                    scores[g * capacity + t] = dot;
                }
            }
            memset(sum, 0, groups * width * sizeof(float));
            for (int64_t g = 0; g < groups; g++) {
                float *score = scores + g * capacity, most = score[0], total = 0.0f;
#pragma omp simd reduction(max : most)
                for (int64_t t = 1; t < length; t++) most = score[t] > most ? score[t] : most;
#pragma omp simd reduction(+ : total)
                for (int64_t t = 0; t < length; t++) {
                    score[t] = exponential(score[t] - most);
                    total += score[t];
                }
                for (int64_t t = 0; t < length; t++) score[t] /= total;
            }
            for (int64_t t = 0; t < length; t++) {
                for (int64_t g = 0; g < groups; g++) {
                    float share = scores[g * capacity + t];
#pragma omp simd
                    for (int64_t j = 0; j < width; j++) sum[g * width + j] += share * wide(v[t * width + j]);
                }
            }
            bf16 *target = out + i * out_stride + h * groups * width;
            for (int64_t j = 0; j < groups * width; j++) target[j] = narrow(sum[j]);
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
            float value = wide(gate[j]), least = value < -80.0f ? -80.0f : value;
            out[i * width + j] = narrow(wide(narrow(value / (1.0f + exponential(-least)))) * wide(up[j]));
        }
    }
}

/* y = W x for a weight in 8 bits with one scale per output: packed [out, width], y [count, out]. For few rows. */
void haori_int8(const bf16 *x, const int8_t *packed, const float *scales, bf16 *y, int64_t count, int64_t width,
                int64_t out) {
#pragma omp parallel for schedule(static)
    for (int64_t o = 0; o < out; o++) {
        const int8_t *row = packed + o * width;
        for (int64_t i = 0; i < count; i++) {
            const bf16 *input = x + i * width;
            float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
            for (int64_t j = 0; j < width; j++) dot += (float)row[j] * wide(input[j]);
            y[i * out + o] = narrow(dot * scales[o]);
        }
    }
}
