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
    Matrix from(long n) const { return {x + n * stride, stride, present - n, dim}; }
    Matrix rows(long most) const { return {x, stride, smaller(present, most), dim}; }
    Matrix columns(long c, long most) const { return {x + c, stride, present, smaller(dim - c, most)}; }
};

// [row][number]: to be summed over numbers.
template <class F, class T> void pack_rows(F* to, const Matrix<T>& m, long rows, long wide) {
    for (long n = 0; n < rows; n++)
        for (long c = 0; c < wide; c += WIDTH) put(to + (n * wide + c) / IN_FACTOR<F>, piece(m.row(n), c, m.dim));
}

// [row][number]: to be summed over rows, an even number of them; each times its scale, if there are scales.
template <class F, class T> void pack_steps(F* to, const Matrix<T>& m, long rows, long wide, const float* scales = nullptr) {
    for (long n = 0; n < rows; n += 2)
        for (long c = 0; c < wide; c += WIDTH) {
            vec upper = piece(m.row(n), c, m.dim), lower = piece(m.row(n + 1), c, m.dim);
            if (scales) upper *= scales[n], lower *= scales[n + 1];
            put_rows(to + n / IN_FACTOR<F> * wide + c, wide, upper, lower);
        }
}

// x[r][c] becomes x[c][r].
inline void turn(vec (&x)[WIDTH]) {
#pragma GCC unroll 4
    for (int apart = WIDTH / 2; apart > 0; apart /= 2) {
        const ivec odd = (counted() & apart) != 0, upper = counted() + (odd & (WIDTH - apart)), lower = upper + apart;
#pragma GCC unroll 16
        for (int r = 0; r < WIDTH; r++) {
            if (r & apart) continue;
            const vec a = x[r], b = x[r + apart];
            x[r] = __builtin_shuffle(a, b, upper), x[r + apart] = __builtin_shuffle(a, b, lower);
        }
    }
}

// A vector of factors, the first of which has number `c` of a row.
template <class F, class T> inline vec factors_from(const T* row, long c, long dim) {
    constexpr int P = IN_FACTOR<F>;
    if constexpr (P == 1) {
        return piece(row, c, dim);
    } else {
        F out[WIDTH];
        for (int i = 0; i < P; i++) put(out + i * WIDTH / P, piece(row, c + i * WIDTH, dim));
        return load_as<vec>(out);
    }
}

// [number][row]: to be summed over numbers.
// If rows are no whole vectors, what is stored beyond a number's last row is overwritten by the next number, or is padding.
template <class F, class T> void pack_turned(F* to, const Matrix<T>& m, long rows, long wide) {
    constexpr int P = IN_FACTOR<F>;
    for (long n = 0; n < rows; n += WIDTH)
        for (long k = 0; k < wide / P; k += WIDTH) {
            vec x[WIDTH];
            if (k % (2 * WIDTH) == 0)
                for (long r = n; r < rows && r < n + WIDTH; r++) m.fetch(r + rows, k * P);
            for (long r = 0; r < WIDTH; r++) x[r] = n + r < rows ? factors_from<F>(m.row(n + r), k * P, m.dim) : vec{};
            turn(x);
            for (long i = 0; i < WIDTH && k + i < wide / P; i++) store_as(to + (k + i) * rows + n, x[i]);
        }
}

// [tile][number][row of a tile], TILE rows each, `size` apart: to be summed over numbers.
template <class F, class T> void pack_turned_tiles(F* to, const Matrix<T>& m, long rows, long wide, long size) {
    for (long n = 0; n < rows; n += TILE) pack_turned(to + n / TILE * size, m.from(n), TILE, wide);
}

// [tile][row][number of a tile], TILE numbers each, `size` apart: to be summed over rows. Each row is stored as a whole vector,
// which the next one overwrites in part: after the last there is padding.
template <class F, class T> void pack_tiles(F* to, const Matrix<T>& m, long dim, long size) {
    for (long n = 0; n < m.present; n += 2)
        for (long c = 0; c < dim; c += TILE) {
            m.fetch(n + 8, c), m.fetch(n + 9, c);
            put_rows(to + c / TILE * size + n / IN_FACTOR<F> * TILE, TILE, piece(m.row(n), c, m.dim),
                     piece(m.row(n + 1), c, m.dim));
        }
}

// Factors of a packed tile of so many steps, padding included.
template <class F> constexpr long tile_size(long steps) { return up(steps, 2) / IN_FACTOR<F> * TILE + WIDTH; }
