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

// Vectors and rows of c that registers hold at once, beside a row of b and a number of a; one vector holds as many as the rows.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int MOST_VECTORS = 4;
#else
constexpr int MOST_VECTORS = 2;
#endif
constexpr int TILE = WIDTH < 6 ? WIDTH : 6;

// A distance that the compiler knows.
template <long N> constexpr std::integral_constant<long, N> always = {};

// How a lies, in elements: from row to row of a tile, from step to step, and from tile to tile.
template <int ROW_, int STEP_> struct Tiled {
    static constexpr int ROW = ROW_, STEP = STEP_;
    long next;
};
typedef Tiled<1, TILE> Tiles;  // packed: all rows of a step side by side, which is read fastest

template <int ROWS, int VECTORS, class A, class Factor, class B, class C>
inline void tile(const Factor* a, const Factor* b, B b_step, float* c, C c_row, int steps, bool add) {
    vec total[ROWS][VECTORS];
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) {
            total[r][v] = vec{};
            // It is read and written at the end, and seldom lies in the first cache.
            __builtin_prefetch(c + r * c_row + v * WIDTH, 1);
        }
    // By two: where another thread has a half of the core, each instruction of the loop itself costs.
#pragma GCC unroll 2
    for (int k = 0; k < steps; k++, a += A::STEP, b += b_step) {
        decltype(factors(b)) row[VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) row[v] = factors(b + v * WIDTH);
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; r++) {
            const auto left = broadcast(a + r * A::ROW);
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
template <int ROWS, int VECTORS, class A, class Factor, class B, class C>
inline void last_tile(int rows, const Factor* a, const Factor* b, B b_step, float* c, C c_row, int steps, bool add) {
    if (rows == ROWS) tile<ROWS, VECTORS, A>(a, b, b_step, c, c_row, steps, add);
    else if constexpr (ROWS > 1) last_tile<ROWS - 1, VECTORS, A>(rows, a, b, b_step, c, c_row, steps, add);
}

constexpr long LINE_BYTES = 64;  // what a cache fetches at once

// Memory that is wanted next: fetched into the second cache little by little, while products are made.
struct Ahead {
    const char *at = nullptr, *end = nullptr;
    long lines = 0;  // at a time
    Ahead() = default;
    template <class T> Ahead(const T* from, long count, long times) : at((const char*)from), end((const char*)(from + count)) {
        lines = (end - at + LINE_BYTES * times - 1) / (LINE_BYTES * times);
    }
    void fetch() {
        for (long i = 0; i < lines && at < end; i++, at += LINE_BYTES) __builtin_prefetch(at, 0, 2);
    }
};

template <int VECTORS, class A, class Factor, class B, class C>
inline void columns(int rows, const Factor* a, A a_by, const Factor* b, B b_step, float* c, C c_row, int steps, bool add,
                    Ahead& ahead) {
    for (; rows >= TILE; rows -= TILE, a += a_by.next, c += TILE * c_row) {
        ahead.fetch();
        tile<TILE, VECTORS, A>(a, b, b_step, c, c_row, steps, add);
    }
    if (rows) last_tile<TILE - 1, VECTORS, A>(rows, a, b, b_step, c, c_row, steps, add);
}

// c[r, n] (+)= sum over k of a[r, k] b[k, n], for `rows` r, `steps` k and `vectors` x WIDTH n.
// Distances in elements: b's between steps, c's between rows, each a number or an `always`. Many steps are summed in parts, which
// keeps b in a cache and the sum's rounding errors small.
template <class Factor, class A, class B, class C>
inline void product(int rows, int vectors, int steps, const Factor* a, A a_by, const Factor* b, B b_step, float* c, C c_row,
                    bool add, Ahead ahead = {}) {
    while (vectors > 0) {
        const int pieces = (vectors + MOST_VECTORS - 1) / MOST_VECTORS, now = (vectors + pieces - 1) / pieces;
        for (int k = 0; k < steps; k += MOST_STEPS) {
            const int part = steps - k < MOST_STEPS ? steps - k : MOST_STEPS;
            const auto with = [&](auto vectors_now) {
                constexpr int VECTORS = decltype(vectors_now)::value;
                columns<VECTORS>(rows, a + k * A::STEP, a_by, b + k * b_step, b_step, c, c_row, part, add || k > 0, ahead);
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
