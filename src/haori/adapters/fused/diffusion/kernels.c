/* What a training step of a diffusion model does between its matrix products and convolutions, each in one pass over
 * numbers that stay in the cache, in bf16 with sums in fp32. Each has a twin in plain torch beside its call, and tests
 * compare the two.
 *
 * Pictures are [batch, places, channels], contiguous. GOMP_* symbols are resolved against the OpenMP runtime that torch
 * has loaded.
 */

#include "numbers.h"

#define WIDEST 4096 /* channels */
#define MANY 32     /* rows that are worth several threads */

/* Sum over the channels of each group, in place: every channel of a group holds the group's sum. */
static inline void spread(float *of_channel, int64_t channels, int64_t groups) {
    int64_t width = channels / groups;
    for (int64_t g = 0; g < groups; g++) {
        float sum = 0.0f;
        for (int64_t c = g * width; c < (g + 1) * width; c++) sum += of_channel[c];
        for (int64_t c = g * width; c < (g + 1) * width; c++) of_channel[c] = sum;
    }
}

/* y = act((x - mean) / sqrt(var + eps) weight + bias) by group; act is silu or nothing. weight and bias are each
 * picture's own. Keeps mean and 1/sqrt of each channel's group. */
void haori_group_norm(const bf16 *x, const float *weight, const float *bias, bf16 *y, float *means, float *inverses,
                      int64_t batch, int64_t places, int64_t channels, int64_t groups, float epsilon, int64_t silu) {
    float share = (float)groups / ((float)places * channels);
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < batch; i++) {
        const bf16 *one = x + i * places * channels;
        bf16 *out = y + i * places * channels;
        float *mean = means + i * channels, *inverse = inverses + i * channels;
        const float *w = weight + i * channels, *b = bias + i * channels;
        float scale[WIDEST], shift[WIDEST];
        memset(mean, 0, channels * sizeof(float));
        memset(inverse, 0, channels * sizeof(float));
        for (int64_t p = 0; p < places; p++) {
            const bf16 *row = one + p * channels;
#pragma omp simd
            for (int64_t c = 0; c < channels; c++) mean[c] += wide(row[c]);
        }
        spread(mean, channels, groups);
        for (int64_t c = 0; c < channels; c++) mean[c] *= share;
        for (int64_t p = 0; p < places; p++) {
            const bf16 *row = one + p * channels;
#pragma omp simd
            for (int64_t c = 0; c < channels; c++) inverse[c] += (wide(row[c]) - mean[c]) * (wide(row[c]) - mean[c]);
        }
        spread(inverse, channels, groups);
        for (int64_t c = 0; c < channels; c++) {
            inverse[c] = 1.0f / sqrtf(inverse[c] * share + epsilon);
            scale[c] = inverse[c] * w[c];
            shift[c] = b[c] - mean[c] * scale[c];
        }
        for (int64_t p = 0; p < places; p++) {
            const bf16 *row = one + p * channels;
            bf16 *to = out + p * channels;
            if (silu) {
#pragma omp simd
                for (int64_t c = 0; c < channels; c++) {
                    float n = wide(row[c]) * scale[c] + shift[c];
                    to[c] = narrow(n * logistic(n));
                }
            } else {
#pragma omp simd
                for (int64_t c = 0; c < channels; c++) to[c] = narrow(wide(row[c]) * scale[c] + shift[c]);
            }
        }
    }
}

/* d y / d n weight, for n what the activation took. */
static inline float back_to_normed(float grad, float normed, float weight, float bias, int64_t silu) {
    float n = normed * weight + bias;
    float share = silu ? logistic(n) : 1.0f;
    return grad * weight * (silu ? share * (1.0f + n * (1.0f - share)) : 1.0f);
}

/* dx = (d - mean(d) - z mean(d z)) / sqrt(var + eps), with z = (x - mean) / sqrt(var + eps), d = dy/dz and means by group. */
void haori_group_norm_back(const bf16 *grad, const bf16 *x, const float *weight, const float *bias, const float *means,
                           const float *inverses, bf16 *dx, int64_t batch, int64_t places, int64_t channels,
                           int64_t groups, int64_t silu) {
    float share = (float)groups / ((float)places * channels);
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < batch; i++) {
        const bf16 *one = x + i * places * channels, *given = grad + i * places * channels;
        bf16 *out = dx + i * places * channels;
        const float *mean = means + i * channels, *inverse = inverses + i * channels;
        const float *w = weight + i * channels, *b = bias + i * channels;
        float sums[WIDEST], dots[WIDEST];
        memset(sums, 0, channels * sizeof(float));
        memset(dots, 0, channels * sizeof(float));
        for (int64_t p = 0; p < places; p++) {
            const bf16 *row = one + p * channels, *g = given + p * channels;
#pragma omp simd
            for (int64_t c = 0; c < channels; c++) {
                float z = (wide(row[c]) - mean[c]) * inverse[c];
                float d = back_to_normed(wide(g[c]), z, w[c], b[c], silu);
                sums[c] += d;
                dots[c] += d * z;
            }
        }
        spread(sums, channels, groups);
        spread(dots, channels, groups);
        for (int64_t c = 0; c < channels; c++) sums[c] *= share, dots[c] *= share;
        for (int64_t p = 0; p < places; p++) {
            const bf16 *row = one + p * channels, *g = given + p * channels;
            bf16 *to = out + p * channels;
#pragma omp simd
            for (int64_t c = 0; c < channels; c++) {
                float z = (wide(row[c]) - mean[c]) * inverse[c];
                float d = back_to_normed(wide(g[c]), z, w[c], b[c], silu);
                to[c] = narrow((d - sums[c] - z * dots[c]) * inverse[c]);
            }
        }
    }
}

/* The normal distribution's share below x and its density there: Abramowitz and Stegun 7.1.26, to 1.5e-7. */
static inline float below(float x, float *density) {
    float size = __builtin_fabsf(x) * 0.70710678f;
    float t = 1.0f / (1.0f + 0.3275911f * size);
    float bell = exponential(-size * size);
    float tail = t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
    float outside = 0.5f * tail * bell;
    *density = 0.39894228f * bell;
    return x < 0.0f ? outside : 1.0f - outside;
}

/* out = left gelu(right), for both = [left, right] [rows, 2 width]. */
void haori_geglu(const bf16 *both, bf16 *out, int64_t rows, int64_t width) {
#pragma omp parallel for schedule(static) if (rows > MANY)
    for (int64_t i = 0; i < rows; i++) {
        const bf16 *left = both + 2 * i * width, *right = left + width;
        bf16 *to = out + i * width;
#pragma omp simd
        for (int64_t c = 0; c < width; c++) {
            float density, x = wide(right[c]);
            to[c] = narrow(wide(left[c]) * x * below(x, &density));
        }
    }
}

/* The gradient of both [rows, 2 width]. */
void haori_geglu_back(const bf16 *grad, const bf16 *both, bf16 *out, int64_t rows, int64_t width) {
#pragma omp parallel for schedule(static) if (rows > MANY)
    for (int64_t i = 0; i < rows; i++) {
        const bf16 *g = grad + i * width, *left = both + 2 * i * width, *right = left + width;
        bf16 *to_left = out + 2 * i * width, *to_right = to_left + width;
#pragma omp simd
        for (int64_t c = 0; c < width; c++) {
            float density, x = wide(right[c]), share = below(x, &density), d = wide(g[c]);
            to_left[c] = narrow(d * x * share);
            to_right[c] = narrow(d * wide(left[c]) * (share + x * density));
        }
    }
}
