// Vectors of fp32 as wide as the CPU has them, bf16 beside them, and exp: the alphabet of the CPU kernels.
//
// GCC's vector extensions, so that one text serves AVX-512, AVX2, SSE and NEON; intrinsics only where GCC has no choice to be left:
// what is multiplied and added at once, and what passes by the caches.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__FMA__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int WIDTH = 16;
#elif defined(__AVX__)
constexpr int WIDTH = 8;
#else
constexpr int WIDTH = 4;
#endif

typedef float vec __attribute__((vector_size(4 * WIDTH)));
typedef int32_t ivec __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t uvec __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t hvec __attribute__((vector_size(2 * WIDTH)));

struct bf16 {
    uint16_t bits;
};

template <class V, class T> inline V load_as(const T* from) {  // of any alignment
    V out;
    std::memcpy(&out, from, sizeof out);
    return out;
}

template <class V, class T> inline void store_as(T* to, V x) { std::memcpy(to, &x, sizeof x); }

// 0, 1, 2 ...: in memory, since GCC 12 makes a dozen instructions of a vector that it counts out itself.
alignas(64) constexpr int32_t COUNTED[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
inline ivec counted() { return load_as<ivec>(COUNTED); }

inline vec splat(float x) { return x - vec{}; }  // x + 0 would be an addition, for the sake of -0

inline vec load(const float* from) { return load_as<vec>(from); }
inline vec load(const bf16* from) { return (vec)(__builtin_convertvector(load_as<hvec>(from), uvec) << 16); }

// The 16 high bits of each number, rounded to nearest even; a NaN stays one.
inline hvec rounded(vec x) {
#if defined(__AVX512BF16__)
    return (hvec)_mm512_cvtneps_pbh((__m512)x);
#else
    const uvec bits = (uvec)x;
    const uvec nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return __builtin_convertvector(x == x ? nearest : (uvec{} + 0x7fc0), hvec);
#endif
}

inline void store(float* to, vec x) { store_as(to, x); }
inline void store(bf16* to, vec x) { store_as(to, rounded(x)); }

// To an address that is a multiple of what is stored, and seen by other threads after passed_caches().
inline void store_past_caches(float* to, vec x) {
#if defined(__AVX512F__)
    _mm512_stream_ps(to, (__m512)x);
#elif defined(__FMA__)
    _mm256_stream_ps(to, (__m256)x);
#else
    store(to, x);
#endif
}
inline void store_past_caches(bf16* to, vec x) {
#if defined(__AVX512F__)
    _mm256_stream_si256((__m256i*)to, (__m256i)rounded(x));
#elif defined(__FMA__)
    _mm_stream_si128((__m128i*)to, (__m128i)rounded(x));
#else
    store(to, x);
#endif
}
inline void passed_caches() {
#if defined(__AVX512F__) || defined(__FMA__)
    _mm_sfence();
#endif
}

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
    const uint32_t bits = (uint32_t)x.bits << 16;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}

// Both are b if one is a NaN. Of a choice by `?` GCC 12 makes two instructions where the CPU has one.
inline vec larger(vec a, vec b) {
#if defined(__AVX512F__)
    return (vec)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__FMA__)
    return (vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return a > b ? a : b;
#endif
}
inline vec smaller(vec a, vec b) {
#if defined(__AVX512F__)
    return (vec)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__FMA__)
    return (vec)_mm256_min_ps((__m256)a, (__m256)b);
#else
    return a < b ? a : b;
#endif
}

// x with the halves of each group of 2 `apart` lanes exchanged: what a reduction over lanes is made of.
inline vec exchanged(vec x, int apart) { return __builtin_shuffle(x, counted() ^ apart); }

inline float sum(vec x) {
#pragma GCC unroll 4
    for (int apart = WIDTH / 2; apart > 0; apart /= 2) x += exchanged(x, apart);
    return x[0];
}

inline bool any(ivec x) {
#pragma GCC unroll 4
    for (int apart = WIDTH / 2; apart > 0; apart /= 2) x |= __builtin_shuffle(x, counted() ^ apart);
    return x[0] != 0;
}

// exp(x) to 2e-7; 0 below -87.7, where fp32 has hardly a number left; infinity above 88.7; a NaN stays one.
// 2^n e^f with f in [-ln 2 / 2, ln 2 / 2]; the polynomial's coefficients are Cephes' (expf.c, S. Moshier).
inline vec exp_of(vec x) {
    const vec clamped = smaller(splat(89.0f), larger(splat(-88.0f), x));
    const vec magic = splat(12582912.0f);  // 1.5 * 2^23: a number added to it is rounded to an integer, in the lowest bits
    const vec shifted = clamped * 1.44269504f + magic, n = shifted - magic;
    const vec f = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
    vec y = splat(1.9875691500e-4f);
    y = y * f + 1.3981999507e-3f;
    y = y * f + 8.3334519073e-3f;
    y = y * f + 4.1665795894e-2f;
    y = y * f + 1.6666665459e-1f;
    y = y * f + 5.0000001201e-1f;
    y = y * (f * f) + f + 1.0f;
    return y * (vec)(((ivec)shifted << 23) + (127 << 23));  // n = -127: times 0
}
