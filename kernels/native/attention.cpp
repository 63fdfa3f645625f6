// Causal attention over documents and windows: flash forward and backward (Dao 2023, arXiv 2307.08691) in a CPU's caches.
//
// Tokens go in blocks of 64. Blocks of keys that no query of a block sees are not computed. A task is one head of one sequence,
// always summed in the same order, so the bits do not depend on the number of threads.
#include <cmath>
#include <limits>

#include "layouts.hpp"

namespace {

constexpr int BLOCK = 64;
constexpr float INF = std::numeric_limits<float>::infinity();

struct Shape {
    long batch, seq, heads, kv_heads, dim;
    long q[3], k[3], v[3], dout[3];  // distances in elements between sequences, tokens and heads
    long start;                      // the same between sequences of start; 0 if all share one
    long threads;
};

// Scores of query m and keys from n on: -inf where it does not see them.
inline vec seen(vec scores, long m, long first, long n) {
    const ivec index = counted() + (int)n;
    return (index >= (int)first) & (index <= (int)m) ? scores : splat(-INF);
}

struct Head {
    long b, h, kv;
    const int32_t* start;  // the first key that each query sees, or null: all before it
    long first(long m) const { return start ? start[m] : 0; }
    // Whether each of the queries [m0, m0 + BLOCK) sees each of the keys [n0, n0 + BLOCK).
    bool all_seen(long m0, long n0, long seq) const {
        const long last = m0 + BLOCK < seq ? m0 + BLOCK - 1 : seq - 1;
        return n0 + BLOCK - 1 <= m0 && first(last) <= n0;
    }
};

Head head_of(const Shape& s, const int32_t* start, long task) {
    const long b = task / s.heads, h = task % s.heads;
    return {b, h, h / (s.heads / s.kv_heads), start ? start + b * s.start : nullptr};
}

// The numbers of one head of one sequence, a token a row.
template <class T> Matrix<T> matrix(const T* x, const long* distances, const Shape& s, long b, long h) {
    return {x + b * distances[0] + h * distances[2], distances[1], s.seq, s.dim};
}

// One block of scores [rows][BLOCK] becomes exp(scale scores - the row's largest so far), as factors; `most` and `total` go on.
template <class F>
void soften(const Head& head, const Shape& s, float scale, long m0, long n0, int rows, float* scores, F* weights, float* most,
            float* total, float* out, long wide) {
    const bool masked = !head.all_seen(m0, n0, s.seq);
    for (int r = 0; r < rows; r++) {
        vec x[BLOCK / WIDTH], high = splat(-INF);
        for (int i = 0; i < BLOCK / WIDTH; i++) {
            x[i] = load(scores + r * BLOCK + i * WIDTH) * scale;
            if (masked) x[i] = seen(x[i], m0 + r, head.first(m0 + r), n0 + i * WIDTH);
            high = larger(x[i], high);
        }
        const float before = most[r], highest = largest(high), now = highest > before ? highest : before;
        const float shift = now == -INF ? 0 : now;
        vec sums = {};
        for (int i = 0; i < BLOCK / WIDTH; i++) {
            x[i] = exp_of(x[i] - shift);
            sums += x[i];
            put(weights + (r * BLOCK + i * WIDTH) / IN_FACTOR<F>, x[i]);
        }
        if (now > before && before > -INF) {
            const float shrink = std::exp(before - now);
            total[r] *= shrink;
            for (long c = 0; c < wide; c += WIDTH) store(out + r * wide + c, load(out + r * wide + c) * shrink);
        }
        total[r] += sum(sums);
        most[r] = now;
    }
}

template <class F, class T>
void forward(const Shape& s, const T* q, const T* k, const T* v, const int32_t* start, float scale, T* o, float* lse) {
    constexpr int P = IN_FACTOR<F>;
    const long wide = up(s.dim, WIDTH), blocks = up(s.seq, BLOCK) / BLOCK, size = BLOCK * wide / P;
#pragma omp parallel num_threads(s.threads)
    {
        auto keys = buffer<F>(blocks * size), values = buffer<F>(blocks * size), query = buffer<F>(size), weights = buffer<F>(BLOCK * BLOCK / P);
        auto scores = buffer<float>(BLOCK * BLOCK), out = buffer<float>(BLOCK * wide);
        float most[BLOCK], total[BLOCK];
#pragma omp for schedule(dynamic)
        for (long task = 0; task < s.batch * s.heads; task++) {
            const Head head = head_of(s, start, task);
            const auto q_h = matrix(q, s.q, s, head.b, head.h), k_h = matrix(k, s.k, s, head.b, head.kv), v_h = matrix(v, s.v, s, head.b, head.kv);
            for (long j = 0; j < blocks; j++) {
                pack_turned(keys.get() + j * size, query.get(), k_h.from(j * BLOCK), BLOCK, wide);
                pack_steps(values.get() + j * size, v_h.from(j * BLOCK), BLOCK, wide);
            }
            for (long m0 = 0; m0 < s.seq; m0 += BLOCK) {
                const int rows = s.seq - m0 < BLOCK ? s.seq - m0 : BLOCK;
                pack_rows(query.get(), q_h.from(m0), BLOCK, wide);
                std::memset(out.get(), 0, BLOCK * wide * sizeof(float));
                for (int r = 0; r < BLOCK; r++) most[r] = -INF, total[r] = 0;
                for (long j = head.first(m0) / BLOCK; j * BLOCK <= m0; j++) {
                    product(rows, BLOCK / WIDTH, wide / P, query.get(), wide / P, 1, keys.get() + j * size, BLOCK, scores.get(), BLOCK, false);
                    soften(head, s, scale, m0, j * BLOCK, rows, scores.get(), weights.get(), most, total, out.get(), wide);
                    product(rows, wide / WIDTH, BLOCK / P, weights.get(), BLOCK / P, 1, values.get() + j * size, wide, out.get(), wide, true);
                }
                for (int r = 0; r < rows; r++) {
                    store_row(o + ((head.b * s.seq + m0 + r) * s.heads + head.h) * s.dim, out.get() + r * wide, 1 / total[r], s.dim);
                    lse[(head.b * s.heads + head.h) * s.seq + m0 + r] = most[r] + std::log(total[r]);
                }
            }
        }
    }
}

// Scores and the gradients of the weights [BLOCK][BLOCK] become, as factors, the weights summed over queries, and the gradients of
// the scores summed over queries and summed over keys.
template <class F>
void soften_again(const Head& head, const Shape& s, float scale, long m0, long n0, const float* scores, const float* grads,
                  const float* lse, const float* delta, F* weights, F* by_queries, F* by_keys) {
    constexpr int P = IN_FACTOR<F>;
    const bool masked = !head.all_seen(m0, n0, s.seq);
    for (int r = 0; r < BLOCK; r += 2)
        for (int c = 0; c < BLOCK; c += WIDTH) {
            vec p[2], ds[2];
            for (int i = 0; i < 2; i++) {
                vec x = load(scores + (r + i) * BLOCK + c) * scale;
                if (masked) x = seen(x, m0 + r + i, m0 + r + i < s.seq ? head.first(m0 + r + i) : 0, n0 + c);
                p[i] = exp_of(x - lse[r + i]);
                ds[i] = p[i] * (load(grads + (r + i) * BLOCK + c) - delta[r + i]);
                if constexpr (P > 1) put(by_keys + ((r + i) * BLOCK + c) / P, ds[i]);
            }
            put_rows(weights + r / P * BLOCK + c, BLOCK, p[0], p[1]);
            put_rows(by_queries + r / P * BLOCK + c, BLOCK, ds[0], ds[1]);
        }
}

// dk and dv are each query head's own: [batch, seq, heads, dim].
template <class F, class T, class G>
void backward(const Shape& s, const T* dout, const T* q, const T* k, const T* v, const T* o, const float* lse, const int32_t* start,
              float scale, T* dq, G* dk, G* dv) {
    constexpr int P = IN_FACTOR<F>;
    const long wide = up(s.dim, WIDTH), blocks = up(s.seq, BLOCK) / BLOCK, size = BLOCK * wide / P, all = blocks * size;
    const long padded = blocks * BLOCK;
#pragma omp parallel num_threads(s.threads)
    {
        // Of fp32, rows and steps are the same.
        auto q_rows = buffer<F>(all), dout_rows = buffer<F>(all), q_steps = buffer<F>(P > 1 ? all : 0), dout_steps = buffer<F>(P > 1 ? all : 0);
        auto k_turned = buffer<F>(size), v_turned = buffer<F>(size), k_steps = buffer<F>(size), scratch = buffer<F>(size);
        auto weights = buffer<F>(BLOCK * BLOCK / P), by_queries = buffer<F>(BLOCK * BLOCK / P), by_keys = buffer<F>(BLOCK * BLOCK / P);
        auto scores = buffer<float>(BLOCK * BLOCK), grads = buffer<float>(BLOCK * BLOCK), lse_h = buffer<float>(padded);
        auto delta = buffer<float>(padded), dk_j = buffer<float>(BLOCK * wide), dv_j = buffer<float>(BLOCK * wide), dq_h = buffer<float>(padded * wide);
        const F *q_by = P > 1 ? q_steps.get() : q_rows.get(), *dout_by = P > 1 ? dout_steps.get() : dout_rows.get();
        const F* ds = P > 1 ? by_keys.get() : by_queries.get();
#pragma omp for schedule(dynamic)
        for (long task = 0; task < s.batch * s.heads; task++) {
            const Head head = head_of(s, start, task);
            const auto q_h = matrix(q, s.q, s, head.b, head.h), dout_h = matrix(dout, s.dout, s, head.b, head.h);
            const auto k_h = matrix(k, s.k, s, head.b, head.kv), v_h = matrix(v, s.v, s, head.b, head.kv);
            const long token = s.heads * s.dim, place = head.b * s.seq * token + head.h * s.dim;  // where o and the results are packed
            for (long i = 0; i < blocks; i++) {
                pack_rows(q_rows.get() + i * size, q_h.from(i * BLOCK), BLOCK, wide);
                pack_rows(dout_rows.get() + i * size, dout_h.from(i * BLOCK), BLOCK, wide);
                if constexpr (P > 1) {
                    pack_steps(q_steps.get() + i * size, q_h.from(i * BLOCK), BLOCK, wide);
                    pack_steps(dout_steps.get() + i * size, dout_h.from(i * BLOCK), BLOCK, wide);
                }
            }
            for (long m = 0; m < padded; m++) {
                vec products = {};
                if (m < s.seq)
                    for (long c = 0; c < s.dim; c += WIDTH)
                        products += piece(dout_h.row(m), c, s.dim) * piece(o + place + m * token, c, s.dim);
                delta[m] = sum(products);
                lse_h[m] = m < s.seq ? lse[(head.b * s.heads + head.h) * s.seq + m] : INF;  // exp(-inf) = 0: no weight
            }
            std::memset(dq_h.get(), 0, padded * wide * sizeof(float));
            for (long n0 = 0; n0 < s.seq; n0 += BLOCK) {
                pack_turned(k_turned.get(), scratch.get(), k_h.from(n0), BLOCK, wide);
                pack_turned(v_turned.get(), scratch.get(), v_h.from(n0), BLOCK, wide);
                pack_steps(k_steps.get(), k_h.from(n0), BLOCK, wide);
                std::memset(dk_j.get(), 0, BLOCK * wide * sizeof(float));
                std::memset(dv_j.get(), 0, BLOCK * wide * sizeof(float));
                for (long m0 = n0; m0 < s.seq && head.first(m0) < n0 + BLOCK; m0 += BLOCK) {
                    const long i = m0 / BLOCK;
                    product(BLOCK, BLOCK / WIDTH, wide / P, q_rows.get() + i * size, wide / P, 1, k_turned.get(), BLOCK, scores.get(), BLOCK, false);
                    product(BLOCK, BLOCK / WIDTH, wide / P, dout_rows.get() + i * size, wide / P, 1, v_turned.get(), BLOCK, grads.get(), BLOCK, false);
                    soften_again(head, s, scale, m0, n0, scores.get(), grads.get(), lse_h.get() + m0, delta.get() + m0,
                                 weights.get(), by_queries.get(), by_keys.get());
                    product(BLOCK, wide / WIDTH, BLOCK / P, weights.get(), 1, BLOCK, dout_by + i * size, wide, dv_j.get(), wide, true);
                    product(BLOCK, wide / WIDTH, BLOCK / P, by_queries.get(), 1, BLOCK, q_by + i * size, wide, dk_j.get(), wide, true);
                    product(BLOCK, wide / WIDTH, BLOCK / P, ds, BLOCK / P, 1, k_steps.get(), wide, dq_h.get() + m0 * wide, wide, true);
                }
                for (long n = n0; n < s.seq && n < n0 + BLOCK; n++) {
                    store_row(dk + place + n * token, dk_j.get() + (n - n0) * wide, scale, s.dim);
                    store_row(dv + place + n * token, dv_j.get() + (n - n0) * wide, 1, s.dim);
                }
            }
            for (long m = 0; m < s.seq; m++) store_row(dq + place + m * token, dq_h.get() + m * wide, scale, s.dim);
        }
    }
}
}  // namespace

extern "C" {
void attention_forward_float32(const Shape* s, const float* q, const float* k, const float* v, const int32_t* start, float scale,
                               float* o, float* lse) {
    forward<float>(*s, q, k, v, start, scale, o, lse);
}
void attention_forward_bfloat16(const Shape* s, const bf16* q, const bf16* k, const bf16* v, const int32_t* start, float scale,
                                bf16* o, float* lse) {
    forward<bf16_factor>(*s, q, k, v, start, scale, o, lse);
}
void attention_backward_float32(const Shape* s, const float* dout, const float* q, const float* k, const float* v, const float* o,
                                const float* lse, const int32_t* start, float scale, float* dq, float* dk, float* dv) {
    backward<float>(*s, dout, q, k, v, o, lse, start, scale, dq, dk, dv);
}
void attention_backward_bfloat16(const Shape* s, const bf16* dout, const bf16* q, const bf16* k, const bf16* v, const bf16* o,
                                 const float* lse, const int32_t* start, float scale, bf16* dq, float* dk, float* dv) {
    backward<bf16_factor>(*s, dout, q, k, v, o, lse, start, scale, dq, dk, dv);
}
}
