/* What a training step of a Llama-like model does between its matrix products, each in one pass, in bf16 with sums in
 * fp32. Each has a twin in plain torch beside its call, and tests compare the two.
 *
 * All tensors are contiguous. GOMP_* symbols are resolved against the OpenMP runtime that torch has loaded; a thread
 * that torch was told to compute alone on has no others here either.
 */

#include "numbers.h"

#define MANY 32 /* rows that are worth several threads */

/* y = w x / rms(x); inverse[i] = 1 / rms of row i. */
void haori_rms(const bf16 *x, const bf16 *weight, bf16 *y, float *inverse, int64_t rows, int64_t width, float epsilon) {
#pragma omp parallel for schedule(static) if (rows > MANY)
    for (int64_t i = 0; i < rows; i++) {
        const bf16 *one = x + i * width;
        bf16 *out = y + i * width;
        float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
        for (int64_t j = 0; j < width; j++) squares += wide(one[j]) * wide(one[j]);
        float scale = inverse[i] = 1.0f / sqrtf(squares / width + epsilon);
#pragma omp simd
        for (int64_t j = 0; j < width; j++) out[j] = narrow(wide(one[j]) * scale * wide(weight[j]));
    }
}

/* dx = (w g) / rms - x sum(w g x) / (width rms^3). */
void haori_rms_back(const bf16 *grad, const bf16 *x, const bf16 *weight, const float *inverse, bf16 *dx, int64_t rows,
                    int64_t width) {
#pragma omp parallel for schedule(static) if (rows > MANY)
    for (int64_t i = 0; i < rows; i++) {
        const bf16 *g = grad + i * width, *one = x + i * width;
        bf16 *out = dx + i * width;
        float dot = 0.0f, scale = inverse[i];
#pragma omp simd reduction(+ : dot)
        for (int64_t j = 0; j < width; j++) dot += wide(g[j]) * wide(weight[j]) * wide(one[j]);
        float along = dot * scale * scale * scale / width;
#pragma omp simd
        for (int64_t j = 0; j < width; j++) out[j] = narrow(wide(g[j]) * wide(weight[j]) * scale - wide(one[j]) * along);
    }
}

/* y = x cos + rotate_half(x) sin, or back with sign -1. x is [rows, heads, width]; angles repeat after `positions`. */
void haori_rotate(const bf16 *x, const bf16 *cosines, const bf16 *sines, bf16 *y, int64_t rows, int64_t positions,
                  int64_t heads, int64_t width, float sign) {
    int64_t half = width / 2;
#pragma omp parallel for schedule(static) if (rows > MANY)
    for (int64_t i = 0; i < rows; i++) {
        const bf16 *c = cosines + i % positions * width, *s = sines + i % positions * width;
        for (int64_t h = 0; h < heads; h++) {
            const bf16 *one = x + (i * heads + h) * width;
            bf16 *out = y + (i * heads + h) * width;
#pragma omp simd
            for (int64_t j = 0; j < half; j++) {
                float left = wide(one[j]), right = wide(one[half + j]);
                out[j] = narrow(left * wide(c[j]) - sign * right * wide(s[j]));
                out[half + j] = narrow(right * wide(c[half + j]) + sign * left * wide(s[half + j]));
            }
        }
    }
}

/* out = silu(gate) up. */
void haori_gate(const bf16 *gate, const bf16 *up, bf16 *out, int64_t rows, int64_t width) {
#pragma omp parallel for schedule(static) if (rows > MANY)
    for (int64_t i = 0; i < rows; i++) {
        const bf16 *g = gate + i * width, *u = up + i * width;
        bf16 *h = out + i * width;
#pragma omp simd
        for (int64_t j = 0; j < width; j++) h[j] = narrow(wide(g[j]) * logistic(wide(g[j])) * wide(u[j]));
    }
}

/* From the gradient of h = silu(gate) up: h itself, the gradient of up, and in place of its own that of gate. */
void haori_gate_back(bf16 *grad, const bf16 *gate, const bf16 *up, bf16 *out, bf16 *up_grad, int64_t rows,
                     int64_t width) {
#pragma omp parallel for schedule(static) if (rows > MANY)
    for (int64_t i = 0; i < rows; i++) {
        bf16 *d = grad + i * width, *h = out + i * width, *du = up_grad + i * width;
        const bf16 *g = gate + i * width, *u = up + i * width;
#pragma omp simd
        for (int64_t j = 0; j < width; j++) {
            float value = wide(g[j]), other = wide(u[j]), given = wide(d[j]);
            float share = logistic(value), silu = value * share;
            h[j] = narrow(silu * other);
            du[j] = narrow(given * silu);
            d[j] = narrow(given * other * share * (1.0f + value * (1.0f - share)));
        }
    }
}

/* losses[i] = logsumexp(logits[i]) - logits[i][targets[i]]; logits become softmax - onehot. */
void haori_residuals(bf16 *logits, const int64_t *targets, float *losses, int64_t rows, int64_t vocabulary) {
#pragma omp parallel for schedule(static) if (rows > 1)
    for (int64_t i = 0; i < rows; i++) {
        bf16 *one = logits + i * vocabulary;
        float greatest = -INFINITY, sum = 0.0f, wanted = wide(one[targets[i]]);
#pragma omp simd reduction(max : greatest)
        for (int64_t j = 0; j < vocabulary; j++) greatest = wide(one[j]) > greatest ? wide(one[j]) : greatest;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < vocabulary; j++) sum += exponential(wide(one[j]) - greatest);
        float scale = 1.0f / sum;
        losses[i] = logf(sum) + greatest - wanted;
#pragma omp simd
        for (int64_t j = 0; j < vocabulary; j++) one[j] = narrow(exponential(wide(one[j]) - greatest) * scale);
        one[targets[i]] = narrow(exponential(wanted - greatest) * scale - 1.0f);
    }
}
