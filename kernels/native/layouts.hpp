// Numbers of a tensor laid out as factors of products, and back; memory that threads work in.
#pragma once

#include <cstdlib>
#include <memory>
#include <new>

#include "products.hpp"

constexpr long up(long x, long to) { return (x + to - 1) / to * to; }
constexpr long smaller(long a, long b) { return a < b ? a : b; }

struct Free {
    void operator()(void* memory) const { std::free(memory); }
};
template <class T> using Buffer = std::unique_ptr<T[], Free>;
template <class T> Buffer<T> buffer(long count) {
    T* memory = (T*)std::aligned_alloc(64, up(count * sizeof(T) + 1, 64));
    if (!memory) throw std::bad_alloc();
    return Buffer<T>(memory);
}

// x[c, c + WIDTH) of a row of `dim` numbers; 0 beyond its end, and where there is no row.
template <class T> inline vec piece(const T* row, long column, long dim) {
    if (!row || column >= dim) return vec{};
    if (column + WIDTH <= dim) return load(row + column);
    vec out = {};
    for (long i = column; i < dim; i++) out[i - column] = to_float(row[i]);
    return out;
}

// The first `count` numbers of a vector, at most all.
template <class T> inline void store_piece(T* to, vec x, long count) {
    if (count >= WIDTH) {
        store(to, x);
    } else {
        T part[WIDTH];
        store(part, x);
        std::memcpy(to, part, count * sizeof(T));
    }
}

// The first `dim` of a row of numbers, times `factor`.
template <class T> inline void store_row(T* to, const float* from, float factor, long dim) {
    for (long c = 0; c < dim; c += WIDTH) store_piece(to + c, load(from + c) * factor, dim - c);
}

// `rows` rows of `dim` numbers, `stride` apart, of which there are `present`; the rest, and numbers from dim to wide, are 0.
template <class T> struct Matrix {
    const T* x;
    long stride, present, dim;
    const T* row(long n) const { return n < present ? x + n * stride : nullptr; }
    // Rows lie too far apart for the CPU to fetch the next ones by itself. There need not be such a row.
    void fetch(long n, long c) const { __builtin_prefetch(x + n * stride + c); }
    // Whether all of the numbers [c, c + numbers) of the rows [n, n + rows) are there.
    bool holds(long n, long rows, long c, long numbers) const { return n + rows <= present && c + numbers <= dim; }
    // The numbers of row n from c on; WHOLE: all of them are known to be there.
    template <bool WHOLE> vec at(long n, long c) const { return WHOLE ? load(x + n * stride + c) : piece(row(n), c, dim); }
    Matrix from(long n) const { return {x + n * stride, stride, present - n, dim}; }
    Matrix rows(long most) const { return {x, stride, smaller(present, most), dim}; }
    Matrix columns(long c, long most) const { return {x + c, stride, present, smaller(dim - c, most)}; }
};

// [row][number]: to be summed over rows, an even number of them; each times its scale, if there are scales.
template <class F, class T> void pack_steps(F* to, const Matrix<T>& m, long rows, long wide, const float* scales = nullptr) {
    const auto copy = [&](auto whole) {
        constexpr bool WHOLE = decltype(whole)::value;
        for (long n = 0; n < rows; n += 2)
            for (long c = 0; c < wide; c += WIDTH) {
                vec upper = m.template at<WHOLE>(n, c), lower = m.template at<WHOLE>(n + 1, c);
                if (scales) upper *= scales[n], lower *= scales[n + 1];
                put_rows(to + n / IN_FACTOR<F> * wide + c, wide, upper, lower);
            }
    };
    if (m.holds(0, rows, 0, wide)) copy(std::true_type());
    else copy(std::false_type());
}

// x[r][c] becomes x[c][r]: first in groups of 4 lanes, where each step is one instruction, then the groups.
inline void turn(vec (&x)[WIDTH]) {
    const ivec lane = counted(), group = lane & ~3, i = lane & 3;
    // The lanes of two vectors that are taken in turns: one of each, or two of each.
    const ivec ones = group + (i >> 1) + (i & 1) * WIDTH, twos = group + (i & 1) + (i >> 1) * WIDTH;
#pragma GCC unroll 4
    for (int r = 0; r < WIDTH; r += 4) {
        const vec low_a = __builtin_shuffle(x[r], x[r + 1], ones), high_a = __builtin_shuffle(x[r], x[r + 1], ones + 2);
        const vec low_b = __builtin_shuffle(x[r + 2], x[r + 3], ones), high_b = __builtin_shuffle(x[r + 2], x[r + 3], ones + 2);
        x[r] = __builtin_shuffle(low_a, low_b, twos), x[r + 1] = __builtin_shuffle(low_a, low_b, twos + 2);
        x[r + 2] = __builtin_shuffle(high_a, high_b, twos), x[r + 3] = __builtin_shuffle(high_a, high_b, twos + 2);
    }
#pragma GCC unroll 2
    for (int apart = 4; apart < WIDTH; apart *= 2) {
        const ivec odd = (lane & apart) != 0, upper = lane + (odd & (WIDTH - apart)), lower = upper + apart;
#pragma GCC unroll 16
        for (int r = 0; r < WIDTH; r++) {
            if (r & apart) continue;
            const vec a = x[r], b = x[r + apart];
            x[r] = __builtin_shuffle(a, b, upper), x[r + apart] = __builtin_shuffle(a, b, lower);
        }
    }
}

// A vector of factors, the first of which has number `c` of row n.
template <bool WHOLE, class F, class T> inline vec factors_at(const Matrix<T>& m, long n, long c) {
    constexpr int P = IN_FACTOR<F>;
    if constexpr (P == 1) {
        return m.template at<WHOLE>(n, c);
    } else if constexpr (WHOLE && std::is_same_v<T, bf16>) {
        return load_as<vec>(m.x + n * m.stride + c);
    } else {
        F out[WIDTH];
        for (int i = 0; i < P; i++) put(out + i * WIDTH / P, m.template at<WHOLE>(n, c + i * WIDTH));
        return load_as<vec>(out);
    }
}

// [number][row]: to be summed over numbers, `wide` of them, which is no less than there are.
// If rows are no whole vectors, what is stored beyond a number's last row is overwritten by the next number, or is padding.
template <int ROWS, class F, class T> void pack_turned(F* to, const Matrix<T>& m, long wide) {
    constexpr int P = IN_FACTOR<F>, TOGETHER = ROWS < WIDTH ? ROWS : WIDTH;
    constexpr long LINE = up(LINE_BYTES / sizeof(T) / P, WIDTH);  // steps in a line of memory, all taken while a cache has it
    static_assert(ROWS % TOGETHER == 0);
    const long steps = wide / P;
    const auto turned = [&](auto whole, long n, long k) __attribute__((always_inline)) {
        vec x[WIDTH];
#pragma GCC unroll 16
        for (int r = 0; r < WIDTH; r++) x[r] = r < TOGETHER ? factors_at<decltype(whole)::value, F>(m, n + r, k * P) : vec{};
        turn(x);
#pragma GCC unroll 16
        for (int i = 0; i < WIDTH; i++)
            if (whole || k + i < steps) store_as(to + (k + i) * ROWS + n, x[i]);
    };
    for (long line = 0; line < steps; line += LINE)
#pragma GCC unroll 4
        for (long n = 0; n < ROWS; n += TOGETHER) {
            for (int r = 0; r < TOGETHER; r++) m.fetch(n + r + ROWS, line * P);
            for (long k = line; k < line + LINE && k < steps; k += WIDTH) {
                if (m.holds(n, TOGETHER, k * P, WIDTH * P)) turned(std::true_type(), n, k);
                else turned(std::false_type(), n, k);
            }
        }
}

// [tile][number][row of a tile], TILE rows each, `size` apart: to be summed over numbers.
template <class F, class T> void pack_turned_tiles(F* to, const Matrix<T>& m, long rows, long wide, long size) {
    for (long n = 0; n < rows; n += TILE) pack_turned<TILE>(to + n / TILE * size, m.from(n), wide);
}

// [tile][row][number of a tile], TILE numbers each, `size` apart: to be summed over rows. Each row is stored as a whole vector,
// which the next one overwrites in part: after the last there is padding.
template <class F, class T> void pack_tiles(F* to, const Matrix<T>& m, long dim, long size) {
    for (long n = 0; n < m.present; n += 2) {
        for (long c = 0; c < dim; c += LINE_BYTES / sizeof(T)) m.fetch(n + 8, c), m.fetch(n + 9, c);
        F* place = to + n / IN_FACTOR<F> * TILE;
        const auto copy = [&](auto whole, long c) {
            constexpr bool WHOLE = decltype(whole)::value;
            put_rows(place, TILE, m.template at<WHOLE>(n, c), m.template at<WHOLE>(n + 1, c));
            place += size;
        };
        long c = 0;
        for (; c < dim && m.holds(n, 2, c, WIDTH); c += TILE) copy(std::true_type(), c);
        for (; c < dim; c += TILE) copy(std::false_type(), c);
    }
}

// Factors of a packed tile of so many steps, padding included.
template <class F> constexpr long tile_size(long steps) { return up(steps, 2) / IN_FACTOR<F> * TILE + WIDTH; }
