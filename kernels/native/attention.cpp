// Causal attention over documents and windows: flash forward and backward (Dao 2023, arXiv 2307.08691) in a CPU's caches.
//
// Tokens go in blocks of 64. Blocks of keys that no query of a block sees are not computed. A task is one head of one sequence,
// always summed in the same order, so the bits do not depend on the number of threads.
#include <cmath>
#include <initializer_list>
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

// scores [rows][BLOCK] = x y^T, x by rows and y turned.
template <class F> void multiply(int rows, long wide, const F* x, const F* y_turned, float* scores) {
    product(rows, BLOCK / WIDTH, wide / IN_FACTOR<F>, x, {wide / IN_FACTOR<F>, 1}, y_turned, BLOCK, scores, BLOCK, false);
}

// out [rows][wide] += weights y, weights [rows][BLOCK] by rows and y by steps.
template <class F> void add(int rows, long wide, const F* weights, const F* y_steps, float* out) {
    constexpr int P = IN_FACTOR<F>;
    product(rows, wide / WIDTH, BLOCK / P, weights, {BLOCK / P, 1}, y_steps, wide, out, wide, true);
}

// out [BLOCK][wide] += weights^T y, both by steps.
template <class F> void add_turned(long wide, const F* weights, const F* y_steps, float* out) {
    product(BLOCK, wide / WIDTH, BLOCK / IN_FACTOR<F>, weights, {1, BLOCK}, y_steps, wide, out, wide, true);
}

template <class F, class T>
void forward(const Shape& s, const T* q, const T* k, const T* v, const int32_t* start, float scale, T* o, float* lse) {
    constexpr int P = IN_FACTOR<F>;
    const long wide = up(s.dim, WIDTH), blocks = up(s.seq, BLOCK) / BLOCK, size = BLOCK * wide / P;
#pragma omp parallel num_threads(s.threads)
    {
        auto k_turned = buffer<F>(blocks * size), v_steps = buffer<F>(blocks * size), q_rows = buffer<F>(size);
        auto weights = buffer<F>(BLOCK * BLOCK / P);
        auto scores = buffer<float>(BLOCK * BLOCK), out = buffer<float>(BLOCK * wide);
        float most[BLOCK], total[BLOCK];
#pragma omp for schedule(dynamic)
        for (long task = 0; task < s.batch * s.heads; task++) {
            const Head head = head_of(s, start, task);
            const auto q_h = matrix(q, s.q, s, head.b, head.h);
            const auto k_h = matrix(k, s.k, s, head.b, head.kv), v_h = matrix(v, s.v, s, head.b, head.kv);
            for (long j = 0; j < blocks; j++) {
                pack_turned(k_turned.get() + j * size, k_h.from(j * BLOCK), BLOCK, wide);
                pack_steps(v_steps.get() + j * size, v_h.from(j * BLOCK), BLOCK, wide);
            }
            for (long m0 = 0; m0 < s.seq; m0 += BLOCK) {
                const int rows = smaller(BLOCK, s.seq - m0);
                pack_rows(q_rows.get(), q_h.from(m0), BLOCK, wide);
                std::memset(out.get(), 0, BLOCK * wide * sizeof(float));
                for (int r = 0; r < BLOCK; r++) most[r] = -INF, total[r] = 0;
                for (long j = head.first(m0) / BLOCK; j * BLOCK <= m0; j++) {
                    multiply(rows, wide, q_rows.get(), k_turned.get() + j * size, scores.get());
                    soften(head, s, scale, m0, j * BLOCK, rows, scores.get(), weights.get(), most, total, out.get(), wide);
                    add(rows, wide, weights.get(), v_steps.get() + j * size, out.get());
                }
                for (int r = 0; r < rows; r++) {
                    T* to = o + ((head.b * s.seq + m0 + r) * s.heads + head.h) * s.dim;
                    store_row(to, out.get() + r * wide, 1 / total[r], s.dim);
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

// What a thread works in during a backward pass: of all queries of a head, and of one block of keys.
template <class F> struct Room {
    static constexpr int P = IN_FACTOR<F>, SQUARE = BLOCK * BLOCK;
    const long wide, size, all;  // numbers of a row; factors of a block, of a head
    Buffer<F> q_rows = buffer<F>(all), dout_rows = buffer<F>(all), k_turned = buffer<F>(size), v_turned = buffer<F>(size);
    Buffer<F> k_steps = buffer<F>(size), q_steps_own = buffer<F>(P > 1 ? all : 0);
    Buffer<F> dout_steps_own = buffer<F>(P > 1 ? all : 0);
    Buffer<F> weights = buffer<F>(SQUARE / P), ds_by_queries = buffer<F>(SQUARE / P), ds_by_keys_own = buffer<F>(SQUARE / P);
    Buffer<float> scores = buffer<float>(SQUARE), grads = buffer<float>(SQUARE), dk = buffer<float>(BLOCK * wide);
    Buffer<float> dv = buffer<float>(BLOCK * wide), dq = buffer<float>(all * P), lse = buffer<float>(all * P / wide);
    Buffer<float> delta = buffer<float>(all * P / wide);

    Room(long wide, long blocks) : wide(wide), size(BLOCK * wide / P), all(blocks * size) {}
    // Of fp32, rows and steps are the same.
    F* q_steps() const { return P > 1 ? q_steps_own.get() : q_rows.get(); }
    F* dout_steps() const { return P > 1 ? dout_steps_own.get() : dout_rows.get(); }
    F* ds_by_keys() const { return P > 1 ? ds_by_keys_own.get() : ds_by_queries.get(); }
};

// A head's queries, gradients and sums into a room. o: the head's outputs.
template <class F, class T>
void enter(const Room<F>& room, const Matrix<T>& q, const Matrix<T>& dout, const Matrix<T>& o, const float* lse) {
    const long padded = up(q.present, BLOCK);
    for (long m0 = 0; m0 < padded; m0 += BLOCK) {
        const long place = m0 / BLOCK * room.size;
        pack_rows(room.q_rows.get() + place, q.from(m0), BLOCK, room.wide);
        pack_rows(room.dout_rows.get() + place, dout.from(m0), BLOCK, room.wide);
        if constexpr (IN_FACTOR<F> > 1) {
            pack_steps(room.q_steps() + place, q.from(m0), BLOCK, room.wide);
            pack_steps(room.dout_steps() + place, dout.from(m0), BLOCK, room.wide);
        }
    }
    for (long m = 0; m < padded; m++) {
        vec products = {};
        for (long c = 0; c < q.dim; c += WIDTH) products += piece(dout.row(m), c, q.dim) * piece(o.row(m), c, q.dim);
        room.delta[m] = sum(products);
        room.lse[m] = m < q.present ? lse[m] : INF;  // exp(-inf) = 0: no weight
    }
    std::memset(room.dq.get(), 0, padded * room.wide * sizeof(float));
}

// dk and dv are each query head's own: [batch, seq, heads, dim].
template <class F, class T, class G>
void backward(const Shape& s, const T* dout, const T* q, const T* k, const T* v, const T* o, const float* lse, const int32_t* start,
              float scale, T* dq, G* dk, G* dv) {
    const long wide = up(s.dim, WIDTH), token = s.heads * s.dim, packed[3] = {s.seq * token, token, s.dim};
#pragma omp parallel num_threads(s.threads)
    {
        const Room<F> room(wide, up(s.seq, BLOCK) / BLOCK);
#pragma omp for schedule(dynamic)
        for (long task = 0; task < s.batch * s.heads; task++) {
            const Head head = head_of(s, start, task);
            const auto k_h = matrix(k, s.k, s, head.b, head.kv), v_h = matrix(v, s.v, s, head.b, head.kv);
            const long place = head.b * packed[0] + head.h * packed[2];
            enter(room, matrix(q, s.q, s, head.b, head.h), matrix(dout, s.dout, s, head.b, head.h),
                  matrix(o, packed, s, head.b, head.h), lse + (head.b * s.heads + head.h) * s.seq);
            for (long n0 = 0; n0 < s.seq; n0 += BLOCK) {
                pack_turned(room.k_turned.get(), k_h.from(n0), BLOCK, wide);
                pack_turned(room.v_turned.get(), v_h.from(n0), BLOCK, wide);
                pack_steps(room.k_steps.get(), k_h.from(n0), BLOCK, wide);
                for (float* sums : {room.dk.get(), room.dv.get()}) std::memset(sums, 0, BLOCK * wide * sizeof(float));
                for (long m0 = n0; m0 < s.seq && head.first(m0) < n0 + BLOCK; m0 += BLOCK) {
                    const long block = m0 / BLOCK * room.size;
                    multiply(BLOCK, wide, room.q_rows.get() + block, room.k_turned.get(), room.scores.get());
                    multiply(BLOCK, wide, room.dout_rows.get() + block, room.v_turned.get(), room.grads.get());
                    soften_again(head, s, scale, m0, n0, room.scores.get(), room.grads.get(), &room.lse[m0], &room.delta[m0],
                                 room.weights.get(), room.ds_by_queries.get(), room.ds_by_keys());
                    add_turned(wide, room.weights.get(), room.dout_steps() + block, room.dv.get());
                    add_turned(wide, room.ds_by_queries.get(), room.q_steps() + block, room.dk.get());
                    add(BLOCK, wide, room.ds_by_keys(), room.k_steps.get(), &room.dq[m0 * wide]);
                }
                for (long n = n0; n < s.seq && n < n0 + BLOCK; n++) {
                    store_row(dk + place + n * token, &room.dk[(n - n0) * wide], scale, s.dim);
                    store_row(dv + place + n * token, &room.dv[(n - n0) * wide], 1, s.dim);
                }
            }
            for (long m = 0; m < s.seq; m++) store_row(dq + place + m * token, &room.dq[m * wide], scale, s.dim);
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
