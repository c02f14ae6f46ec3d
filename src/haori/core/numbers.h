/* What the kernels share: numbers in bf16, in ones and sixteen at a time, and e^x.
 *
 * C with the vector types of GCC and clang: no intrinsics.
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

/* 1 / (1 + e^-x); nothing below -80, where silu(x) would not be seen in bf16 and e^-x leaves the range of fp32. */
static inline float logistic(float x) {
    return x < -80.0f ? 0.0f : 1.0f / (1.0f + exponential(-x));
}

/* Sixteen numbers at once; the compiler maps them to what the processor has. */
typedef float numbers __attribute__((vector_size(64)));
typedef uint32_t words __attribute__((vector_size(64)));
typedef uint16_t halves __attribute__((vector_size(32)));

#define LANES 16
#define INLINE static inline __attribute__((always_inline))

INLINE numbers wide_lanes(const bf16 *source) {
    halves packed;
    memcpy(&packed, source, sizeof packed);
    return (numbers)(__builtin_convertvector(packed, words) << 16);
}

INLINE void narrow_lanes(bf16 *target, numbers value) {
    words bits = (words)value;
    halves packed = __builtin_convertvector((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, halves);
    memcpy(target, &packed, sizeof packed);
}
