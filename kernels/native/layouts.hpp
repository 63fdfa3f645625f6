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

// The first `dim` of a row of numbers, times `factor`.
template <class T> inline void store_row(T* to, const float* from, float factor, long dim) {
    for (long c = 0; c < dim; c += WIDTH) {
        const vec x = load(from + c) * factor;
        if (c + WIDTH <= dim) {
            store(to + c, x);
        } else {
            T last[WIDTH];
            store(last, x);
            std::memcpy(to + c, last, (dim - c) * sizeof(T));
        }
    }
}

// `rows` rows of `dim` numbers, `stride` apart, of which there are `present`; the rest, and numbers from dim to wide, are 0.
template <class T> struct Matrix {
    const T* x;
    long stride, present, dim;
    const T* row(long n) const { return n < present ? x + n * stride : nullptr; }
    Matrix from(long n) const { return {x + n * stride, stride, present - n, dim}; }
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

// [number][row]: to be summed over numbers. `scratch` holds rows x wide numbers as factors.
template <class F, class T> void pack_turned(F* to, F* scratch, const Matrix<T>& m, long rows, long wide) {
    pack_rows(scratch, m, rows, wide);
    const long steps = wide / IN_FACTOR<F>;
    for (long c = 0; c < steps; c += WIDTH)
        for (long n = 0; n < rows; n++)
            for (long i = c; i < c + WIDTH && i < steps; i++) to[i * rows + n] = scratch[n * steps + i];
}

// [tile][row][number of a tile], `tile` numbers each, at most a vector: to be summed over rows. Tiles lie `size` apart, at least a
// vector more than their numbers need, since each row is stored as a whole vector that the next one overwrites in part.
template <class F, class T> void pack_tiles(F* to, const Matrix<T>& m, long dim, long tile, long size) {
    for (long n = 0; n < m.present; n += 2)
        for (long c = 0; c < dim; c += tile)
            put_rows(to + c / tile * size + n / IN_FACTOR<F> * tile, tile, piece(m.row(n), c, m.dim), piece(m.row(n + 1), c, m.dim));
}
