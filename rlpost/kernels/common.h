/* Vectors of floats as wide as the processor's, and numbers in float32 or bfloat16.

Every exported function takes `half`: 1 where its activations are bfloat16. All arithmetic is float32. Widths are
multiples of LINE wherever a comment does not say otherwise. */

#pragma once
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define LINE 16
/* Numbers that lie together in memory. */
/* Floats of a vector, never more than the processor has: compilers split wider ones by way of memory. TALL: rows of a
product whose sums, two vectors each, stay in registers. */
#if defined(__AVX512F__)
#define LANES 16
#define TALL 8
#elif defined(__AVX__)
#define LANES 8
#define TALL 6
#elif defined(__aarch64__)
#define LANES 4
#define TALL 8
#else
#define LANES 4
#define TALL 4
#endif
#define INLINE static inline __attribute__((always_inline))
#define EXPORT __attribute__((visibility("default")))
/* Calls a body whose last argument is `half` as a constant, so that each precision is compiled by itself. */
#define BY_PRECISION(body, ...)                                                                                        \
    do {                                                                                                               \
        if (half)                                                                                                      \
            body(__VA_ARGS__, 1);                                                                                      \
        else                                                                                                           \
            body(__VA_ARGS__, 0);                                                                                      \
    } while (0)

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef uint32_t uvec __attribute__((vector_size(4 * LANES)));
typedef uint16_t hvec __attribute__((vector_size(2 * LANES)));

INLINE vec all(float x) { return x - (vec){}; }

/* a where the comparison holds, else b. */
INLINE vec choose(ivec holds, vec a, vec b) { return (vec)((holds & (ivec)a) | (~holds & (ivec)b)); }

INLINE vec load(const float *at) {
    vec v;
    memcpy(&v, at, sizeof v);
    return v;
}

INLINE void store(float *at, vec v) { memcpy(at, &v, sizeof v); }

/* A vector of numbers from index i on. */
INLINE vec get(const void *from, int64_t i, const int half) {
    if (!half)
        return load((const float *)from + i);
    hvec h;
    memcpy(&h, (const uint16_t *)from + i, sizeof h);
    return (vec)(__builtin_convertvector(h, uvec) << 16);
}

INLINE void put(void *to, int64_t i, vec v, const int half) {
    if (!half) {
        store((float *)to + i, v);
        return;
    }
    /* To the nearest, ties to even; NaN stays NaN. */
    uvec bits = (uvec)v;
    uvec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    uvec known = (uvec)(v == v);
    rounded = (rounded & known) | (~known & 0x7fc0);
    hvec h = __builtin_convertvector(rounded, hvec);
    memcpy((uint16_t *)to + i, &h, sizeof h);
}

INLINE float get_one(const void *from, int64_t i, const int half) {
    if (!half)
        return ((const float *)from)[i];
    uint32_t bits = (uint32_t)((const uint16_t *)from)[i] << 16;
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

INLINE void put_one(void *to, int64_t i, float x, const int half) {
    if (!half) {
        ((float *)to)[i] = x;
        return;
    }
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    ((uint16_t *)to)[i] = x == x ? (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) : 0x7fc0;
}

/* By halves: shorter than one after the other. */
INLINE float sum(vec v) {
    typedef float four __attribute__((vector_size(16)));
    four f[LANES / 4];
    memcpy(f, &v, sizeof f);
    for (int n = LANES / 8; n; n /= 2)
        for (int i = 0; i < n; i++)
            f[i] += f[i + n];
    return (f[0][0] + f[0][2]) + (f[0][1] + f[0][3]);
}

INLINE vec larger(vec a, vec b) { return choose((a > b) | (a != a), a, b); }

INLINE float largest(vec v) {
    float most = v[0];
    for (int i = 1; i < LANES; i++)
        most = v[i] > most || v[i] != v[i] ? v[i] : most;
    return most;
}

/* e^x to 2 units in the last place for x <= 88; 0 below -87.3, NaN for NaN (Cody & Waite's reduction). */
INLINE vec exp_of(vec x) {
    const vec magic = all(12582912.0f);
    vec n = (x * 1.44269504088896341f + magic) - magic;
    vec r = x - n * 0.693359375f - n * -2.12194440e-4f;
    vec p = all(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    ivec power = (__builtin_convertvector(n, ivec) + 127) << 23;
    vec found = p * (vec)power;
    return choose(x < -87.3f, all(0), found);
}

INLINE vec sigmoid(vec x) {
    vec e = exp_of(choose(x < 0, x, -x));
    return choose(x < 0, e, all(1)) / (1 + e);
}
