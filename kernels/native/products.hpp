// Products of small matrices that lie in a cache: c (+)= a b, accumulated in fp32 in registers.
//
// A factor is one fp32 number, or, where the CPU multiplies bf16, a pair of bf16 neighbours along the summed dimension.
#pragma once

#include <type_traits>

#include "vectors.hpp"

struct pair {  // of bf16, the one with the lower index in the lower bits
    uint32_t bits;
};

template <class Factor> constexpr int IN_FACTOR = 1;
template <> inline constexpr int IN_FACTOR<pair> = 2;

// Fused wherever the CPU can: GCC, left to choose, fuses on AMD's in some tiles and not in others, whose sums then differ.
inline void add_multiplied(vec& total, vec a, vec b) {
#if defined(__AVX512F__)
    total = (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)total);
#elif defined(__FMA__)
    total = (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)total);
#else
    total += a * b;
#endif
}
inline vec broadcast(const float* a) { return splat(*a); }
inline vec factors(const float* b) { return load(b); }

#if defined(__AVX512BF16__)
inline void add_multiplied(vec& total, uvec a, uvec b) {
    total = (vec)_mm512_dpbf16_ps((__m512)total, (__m512bh)a, (__m512bh)b);
}
inline uvec broadcast(const pair* a) { return uvec{} + a->bits; }
inline uvec factors(const pair* b) { return load_as<uvec>(b); }
typedef pair bf16_factor;
#else
typedef float bf16_factor;  // multiplied as fp32
#endif

constexpr int MOST_STEPS = 192;  // summed in registers before they are added to what was summed before

// Rows and vectors of c that registers hold at once, beside a row of b and a number of a.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int MOST_VECTORS = 4;
constexpr int rows_for(int vectors) { return vectors == 4 ? 6 : vectors == 3 ? 8 : 12; }
#else
constexpr int MOST_VECTORS = 2;
constexpr int rows_for(int vectors) { return vectors == 2 ? 6 : 8; }
#endif

template <int ROWS, int VECTORS, class Factor>
inline void tile(const Factor* a, ptrdiff_t a_row, ptrdiff_t a_step, const Factor* b, ptrdiff_t b_step, float* c, ptrdiff_t c_row,
                 int steps, bool add) {
    vec total[ROWS][VECTORS];
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) {
            total[r][v] = vec{};
            // It is read and written at the end, and seldom lies in the first cache.
            __builtin_prefetch(c + r * c_row + v * WIDTH, 1);
        }
    for (int k = 0; k < steps; k++, a += a_step, b += b_step) {
        decltype(factors(b)) row[VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) row[v] = factors(b + v * WIDTH);
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; r++) {
            const auto left = broadcast(a + r * a_row);
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++) add_multiplied(total[r][v], left, row[v]);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) {
            float* to = c + r * c_row + v * WIDTH;
            store(to, add ? load(to) + total[r][v] : total[r][v]);
        }
}

// The same for the last rows, fewer than a whole tile has.
template <int ROWS, int VECTORS, class Factor>
inline void last_tile(int rows, const Factor* a, ptrdiff_t a_row, ptrdiff_t a_step, const Factor* b, ptrdiff_t b_step, float* c,
                      ptrdiff_t c_row, int steps, bool add) {
    if (rows == ROWS)
        tile<ROWS, VECTORS>(a, a_row, a_step, b, b_step, c, c_row, steps, add);
    else if constexpr (ROWS > 1)
        last_tile<ROWS - 1, VECTORS>(rows, a, a_row, a_step, b, b_step, c, c_row, steps, add);
}

// Memory that is wanted next: fetched into the second cache little by little, while products are made.
struct Ahead {
    const char *at = nullptr, *end = nullptr;
    long lines = 0;  // at a time
    Ahead() = default;
    template <class T> Ahead(const T* from, long count, long times) : at((const char*)from), end((const char*)(from + count)) {
        lines = (end - at + 64 * times - 1) / (64 * times);
    }
    void fetch() {
        for (long i = 0; i < lines && at < end; i++, at += 64) __builtin_prefetch(at, 0, 2);
    }
};

constexpr int TILE = rows_for(MOST_VECTORS) < WIDTH ? rows_for(MOST_VECTORS) : WIDTH;  // rows that one vector holds as well

// How a lies, in elements: from row to row, from step to step, and from tile to tile if it is packed in tiles of TILE rows.
struct Strides {
    ptrdiff_t row, step, tile = 0;
};

template <int VECTORS, int ROWS, class Factor>
inline void columns(int rows, const Factor* a, Strides a_by, const Factor* b, ptrdiff_t b_step, float* c, ptrdiff_t c_row,
                    int steps, bool add, Ahead& ahead) {
    const ptrdiff_t next = a_by.tile ? a_by.tile : ROWS * a_by.row;
    for (; rows >= ROWS; rows -= ROWS, a += next, c += ROWS * c_row) {
        ahead.fetch();
        tile<ROWS, VECTORS>(a, a_by.row, a_by.step, b, b_step, c, c_row, steps, add);
    }
    if (rows) last_tile<ROWS - 1, VECTORS>(rows, a, a_by.row, a_by.step, b, b_step, c, c_row, steps, add);
}

// c[r, n] (+)= sum over k of a[r, k] b[k, n], for `rows` r, `steps` k and `vectors` x WIDTH n.
// Distances in elements: b's between steps, c's between rows. Many steps are summed in parts, which keeps b in a cache and the
// sum's rounding errors small.
template <class Factor>
inline void product(int rows, int vectors, int steps, const Factor* a, Strides a_by, const Factor* b, ptrdiff_t b_step, float* c,
                    ptrdiff_t c_row, bool add, Ahead ahead = {}) {
    while (vectors > 0) {
        const int pieces = (vectors + MOST_VECTORS - 1) / MOST_VECTORS, now = (vectors + pieces - 1) / pieces;
        for (int k = 0; k < steps; k += MOST_STEPS) {
            const int part = steps - k < MOST_STEPS ? steps - k : MOST_STEPS;
            const Factor *a_k = a + k * a_by.step, *b_k = b + k * b_step;
            const auto with = [&](auto vectors_now) {
                constexpr int VECTORS = decltype(vectors_now)::value;
                if (a_by.tile) columns<VECTORS, TILE>(rows, a_k, a_by, b_k, b_step, c, c_row, part, add || k > 0, ahead);
                else columns<VECTORS, rows_for(VECTORS)>(rows, a_k, a_by, b_k, b_step, c, c_row, part, add || k > 0, ahead);
            };
            if (now == 1) with(std::integral_constant<int, 1>());
            if (now == 2) with(std::integral_constant<int, 2>());
            if constexpr (MOST_VECTORS > 2) {
                if (now == 3) with(std::integral_constant<int, 3>());
                if (now == 4) with(std::integral_constant<int, 4>());
            }
        }
        b += now * WIDTH, c += now * WIDTH, vectors -= now;
    }
}

// ---- Numbers laid out as factors

inline void put(float* to, vec x) { store(to, x); }
inline void put(pair* to, vec x) { store((bf16*)to, x); }  // neighbours in x become pairs

// Two rows, which are neighbours along the summed dimension: as two rows of fp32, `row` apart, or as one of pairs.
inline void put_rows(float* to, ptrdiff_t row, vec upper, vec lower) {
    store(to, upper);
    store(to + row, lower);
}
#if defined(__AVX512BF16__)
inline void put_rows(pair* to, ptrdiff_t, vec upper, vec lower) {
    typedef uint16_t both __attribute__((vector_size(4 * WIDTH)));
    const both lanes = (both)(counted() | ((counted() + WIDTH) << 16));
    store_as(to, __builtin_shuffle((both)_mm512_cvtne2ps_pbh((__m512)lower, (__m512)upper), lanes));
}
#endif
