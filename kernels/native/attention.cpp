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

// Vectors of queries going forward, of keys going backward, that are softened together: a part of a block, so that on the diagonal
// most of what nobody sees can be left out.
constexpr int VECTORS = MOST_VECTORS < BLOCK / WIDTH / 2 ? MOST_VECTORS : BLOCK / WIDTH / 2, PANEL = VECTORS * WIDTH;

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

// The queries [m, m + PANEL) of a head, each a lane: what is known of them so far.
struct Queries {
    long m = 0;
    vec shift[VECTORS], total[VECTORS];   // the sum of exp(score - shift)
    ivec index[VECTORS], first[VECTORS];  // of a query, and of the first key that it sees

    void begin(const Head& head, const Shape& s, long from) {
        m = from;
        for (int i = 0; i < VECTORS; i++) {
            shift[i] = splat(-INF), total[i] = vec{};
            index[i] = counted() + (int)(m + i * WIDTH), first[i] = ivec{};
            for (int r = 0; r < WIDTH; r++)
                if (m + i * WIDTH + r < s.seq) first[i][r] = head.first(m + i * WIDTH + r);
        }
    }
};

// Scores [keys][PANEL] of the keys from n on become exp(scale score - shift), as factors, and are summed. Where a shift grows, the
// sum and `out` [dim][PANEL] become smaller. It grows only by much, since any will do with which exp stays finite.
template <class F>
void soften(Queries& q, float scale, long n, int keys, bool masked, float* scores, F* weights, float* out, long dim) {
    for (int i = 0; i < VECTORS; i++) {
        float *column = scores + i * WIDTH, *numbers = out + i * WIDTH;
        vec high[2] = {splat(-INF), splat(-INF)}, sums[2] = {};
        for (int k = 0; k < keys; k += 2)
            for (int j = 0; j < 2; j++) {
                vec x = load(column + (k + j) * PANEL) * scale;
                const int key = n + k + j;
                if (masked) x = (q.first[i] <= key) & (q.index[i] >= key) ? x : splat(-INF);
                store(column + (k + j) * PANEL, x);
                high[j] = larger(x, high[j]);
            }
        const vec highest = larger(high[0], high[1]);
        const ivec grows = highest > q.shift[i] + 8;
        if (any(grows)) {
            const vec now = grows ? highest : q.shift[i], shrink = grows ? exp_of(q.shift[i] - now) : splat(1);
            q.total[i] *= shrink, q.shift[i] = now;
            for (long c = 0; c < dim; c++) store(numbers + c * PANEL, load(numbers + c * PANEL) * shrink);
        }
        const vec shift = q.shift[i] == splat(-INF) ? vec{} : q.shift[i];  // no key was seen yet
        for (int k = 0; k < keys; k += 2) {
            const vec upper = exp_of(load(column + k * PANEL) - shift), lower = exp_of(load(column + (k + 1) * PANEL) - shift);
            sums[0] += upper, sums[1] += lower;
            put_rows(weights + k / IN_FACTOR<F> * PANEL + i * WIDTH, PANEL, upper, lower);
        }
        q.total[i] += sums[0] + sums[1];
    }
}

// What the queries summed up, out [dim][PANEL], over their totals, to their rows of o, and the logarithms of the totals to lse.
template <class T> void finish(const Queries& q, const Shape& s, const float* out, T* o, float* lse) {
    for (int i = 0; i < VECTORS; i++) {
        const long first = q.m + i * WIDTH, rows = smaller(WIDTH, s.seq - first);
        for (long c = 0; c < s.dim && rows > 0; c += WIDTH) {
            vec x[WIDTH];
            for (int r = 0; r < WIDTH; r++) x[r] = load(out + (c + r) * PANEL + i * WIDTH) / q.total[i];
            turn(x);
            for (int r = 0; r < rows; r++) store_piece(o + (first + r) * s.heads * s.dim + c, x[r], s.dim - c);
        }
        for (int r = 0; r < rows; r++) lse[first + r] = q.shift[i][r] + std::log(q.total[i][r]);
    }
}

// Scores, weights and outputs are kept turned, [key][query] and [number][query], so that no sum or maximum is over lanes.
template <class F, class T>
void forward(const Shape& s, const T* q, const T* k, const T* v, const int32_t* start, float scale, T* o, float* lse) {
    constexpr int P = IN_FACTOR<F>, PANELS = BLOCK / PANEL;
    const long wide = up(s.dim, WIDTH), blocks = up(s.seq, BLOCK) / BLOCK, steps = up(s.dim, 2) / P;
    const Tiles k_tiles{tile_size<F>(s.dim)}, v_tiles{tile_size<F>(BLOCK)};
    const long k_size = up(BLOCK, TILE) / TILE * k_tiles.next, v_size = up(s.dim, TILE) / TILE * v_tiles.next;
    const long q_size = PANEL * wide / P, out_size = PANEL * wide;
#pragma omp parallel num_threads(s.threads)
    {
        auto ks = buffer<F>(blocks * k_size), vs = buffer<F>(blocks * v_size), qs = buffer<F>(PANELS * q_size);
        auto scores = buffer<float>(BLOCK * PANEL), outs = buffer<float>(PANELS * out_size);
        auto weights = buffer<F>(BLOCK * PANEL / P);
        Queries panels[PANELS];
#pragma omp for schedule(dynamic)
        for (long task = 0; task < s.batch * s.heads; task++) {
            const Head head = head_of(s, start, task);
            const auto q_h = matrix(q, s.q, s, head.b, head.h);
            const auto k_h = matrix(k, s.k, s, head.b, head.kv), v_h = matrix(v, s.v, s, head.b, head.kv);
            T* o_h = o + (head.b * s.seq * s.heads + head.h) * s.dim;
            float* lse_h = lse + (head.b * s.heads + head.h) * s.seq;
            for (long j = 0; j < blocks; j++) {
                pack_turned_tiles(ks.get() + j * k_size, k_h.from(j * BLOCK), BLOCK, up(s.dim, 2), k_tiles.next);
                pack_tiles(vs.get() + j * v_size, v_h.from(j * BLOCK).rows(BLOCK), s.dim, v_tiles.next);
            }
            for (long m0 = 0; m0 < s.seq; m0 += BLOCK) {
                std::memset(outs.get(), 0, PANELS * out_size * sizeof(float));
                for (int p = 0; p < PANELS; p++) {
                    pack_turned<PANEL>(qs.get() + p * q_size, q_h.from(m0 + p * PANEL), wide);
                    panels[p].begin(head, s, m0 + p * PANEL);
                }
                for (long n0 = head.first(m0) / BLOCK * BLOCK; n0 <= m0; n0 += BLOCK) {
                    const bool masked = !head.all_seen(m0, n0, s.seq);
                    const F *k_block = ks.get() + n0 / BLOCK * k_size, *v_block = vs.get() + n0 / BLOCK * v_size;
                    for (int p = 0; p < PANELS; p++) {
                        const int last = n0 == m0 ? (p + 1) * PANEL : BLOCK;  // on the diagonal no key after a panel's last query
                        const int keys = smaller(last, up(s.seq - n0, 2));
                        float* out = outs.get() + p * out_size;
                        product(keys, VECTORS, steps, k_block, k_tiles, qs.get() + p * q_size, always<PANEL>, scores.get(),
                                always<PANEL>, false);
                        soften(panels[p], scale, n0, keys, masked, scores.get(), weights.get(), out, s.dim);
                        product(s.dim, VECTORS, keys / P, v_block, v_tiles, weights.get(), always<PANEL>, out, always<PANEL>, true);
                    }
                }
                for (int p = 0; p < PANELS; p++) finish(panels[p], s, outs.get() + p * out_size, o_h, lse_h);
            }
        }
    }
}

// Scores of query m and keys from n on: -inf where it does not see them.
inline vec seen(vec scores, long m, long first, long n) {
    const ivec index = counted() + (int)n;
    return (index >= (int)first) & (index <= (int)m) ? scores : splat(-INF);
}

// What a thread works in during a backward pass: of all queries of a head, and of one block of keys.
template <class F> struct Room {
    static constexpr int P = IN_FACTOR<F>, SQUARE = BLOCK * BLOCK;
    const long dim, wide, blocks;
    const Tiles tiles{tile_size<F>(dim)};
    const long size = up(BLOCK, TILE) / TILE * tiles.next, steps = BLOCK * wide / P;  // factors of a block, in tiles and by steps
    Buffer<F> q_tiles = buffer<F>(blocks * size), dout_tiles = buffer<F>(blocks * size);
    Buffer<F> q_steps = buffer<F>(blocks * steps), dout_steps = buffer<F>(blocks * steps);
    Buffer<F> k_turned = buffer<F>(steps), v_turned = buffer<F>(steps), k_steps = buffer<F>(steps);
    Buffer<F> weights = buffer<F>(SQUARE / P), ds_by_queries = buffer<F>(SQUARE / P);
    Buffer<F> ds_by_keys_own = buffer<F>(P > 1 ? SQUARE / P : 0);
    Buffer<float> scores = buffer<float>(SQUARE), grads = buffer<float>(SQUARE), dk = buffer<float>(BLOCK * wide);
    Buffer<float> dv = buffer<float>(BLOCK * wide), dq = buffer<float>(blocks * BLOCK * wide);
    Buffer<float> lse = buffer<float>(blocks * BLOCK), delta = buffer<float>(blocks * BLOCK);

    Room(long dim, long seq) : dim(dim), wide(up(dim, WIDTH)), blocks(up(seq, BLOCK) / BLOCK) {}
    // Of fp32 they are the same.
    F* ds_by_keys() const { return P > 1 ? ds_by_keys_own.get() : ds_by_queries.get(); }
};

// A head's queries, gradients and sums into a room. o: the head's outputs.
template <class F, class T>
void enter(const Room<F>& room, const Matrix<T>& q, const Matrix<T>& dout, const Matrix<T>& o, const float* lse) {
    for (long i = 0; i < room.blocks; i++) {
        pack_turned_tiles(room.q_tiles.get() + i * room.size, q.from(i * BLOCK), BLOCK, up(q.dim, 2), room.tiles.next);
        pack_turned_tiles(room.dout_tiles.get() + i * room.size, dout.from(i * BLOCK), BLOCK, up(q.dim, 2), room.tiles.next);
        pack_steps(room.q_steps.get() + i * room.steps, q.from(i * BLOCK), BLOCK, room.wide);
        pack_steps(room.dout_steps.get() + i * room.steps, dout.from(i * BLOCK), BLOCK, room.wide);
    }
    for (long m = 0; m < room.blocks * BLOCK; m++) {
        vec products = {};
        for (long c = 0; c < q.dim; c += WIDTH) products += piece(dout.row(m), c, q.dim) * piece(o.row(m), c, q.dim);
        room.delta[m] = sum(products);
        room.lse[m] = m < q.present ? lse[m] : INF;  // exp(-inf) = 0: no weight
    }
    std::memset(room.dq.get(), 0, room.blocks * BLOCK * room.wide * sizeof(float));
}

// Scores and gradients of weights of the keys [c, c + PANEL) of a block, and of its queries from r0 on, become, as factors, the
// weights summed over queries, and the gradients of the scores summed over queries and summed over keys.
template <class F>
void soften_again(const Room<F>& room, const Head& head, const Shape& s, float scale, long m0, long n0, int r0, int c0) {
    constexpr int P = IN_FACTOR<F>;
    const bool masked = !head.all_seen(m0, n0, s.seq);
    for (int r = r0; r < BLOCK; r += 2)
        for (int c = c0; c < c0 + PANEL; c += WIDTH) {
            vec p[2], ds[2];
            for (int i = 0; i < 2; i++) {
                const long m = m0 + r + i, place = (r + i) * BLOCK + c;
                vec x = load(&room.scores[place]) * scale;
                if (masked) x = seen(x, m, m < s.seq ? head.first(m) : 0, n0 + c);
                p[i] = exp_of(x - room.lse[m]);
                ds[i] = p[i] * (load(&room.grads[place]) - room.delta[m]);
                if constexpr (P > 1) put(room.ds_by_keys() + place / P, ds[i]);
            }
            put_rows(&room.weights[r / P * BLOCK + c], BLOCK, p[0], p[1]);
            put_rows(&room.ds_by_queries[r / P * BLOCK + c], BLOCK, ds[0], ds[1]);
        }
}

// What a block of queries, from m0 on, adds to the gradients of the keys and values from n0 on, and these to its own. On the
// diagonal no query before a panel's first key is computed.
template <class F> void add_block(const Room<F>& room, const Head& head, const Shape& s, float scale, long m0, long n0) {
    constexpr int P = IN_FACTOR<F>;
    const bool diagonal = m0 == n0;
    const long wide = room.wide, block = m0 / BLOCK, steps = up(room.dim, 2) / P;
    for (int c = 0; c < BLOCK; c += PANEL) {
        const int tile = diagonal ? c / TILE : 0, r = tile * TILE;
        const auto multiply = [&](const Buffer<F>& tiles, const Buffer<F>& turned, const Buffer<float>& out) {
            product(BLOCK - r, VECTORS, steps, &tiles[block * room.size + tile * room.tiles.next], room.tiles, &turned[c],
                    always<BLOCK>, &out[r * BLOCK + c], always<BLOCK>, false);
        };
        multiply(room.q_tiles, room.k_turned, room.scores);
        multiply(room.dout_tiles, room.v_turned, room.grads);
        soften_again(room, head, s, scale, m0, n0, diagonal ? c : 0, c);
    }
    const int group = diagonal ? PANEL : BLOCK;
    for (int c = 0; c < BLOCK; c += group) {
        const int r = diagonal ? c : 0;
        const auto add_turned = [&](const Buffer<F>& square, const Buffer<F>& rows, const Buffer<float>& sums) {
            product(group, wide / WIDTH, (BLOCK - r) / P, &square[r / P * BLOCK + c], Tiled<1, BLOCK>{TILE},
                    &rows[block * room.steps + r / P * wide], wide, &sums[c * wide], wide, true);
        };
        add_turned(room.weights, room.dout_steps, room.dv);
        add_turned(room.ds_by_queries, room.q_steps, room.dk);
        product(group, wide / WIDTH, (r + group) / P, room.ds_by_keys() + c * BLOCK / P, Tiled<BLOCK / P, 1>{TILE * BLOCK / P},
                room.k_steps.get(), wide, &room.dq[(m0 + c) * wide], wide, true);
    }
}

// dk and dv are each query head's own: [batch, seq, heads, dim].
template <class F, class T, class G>
void backward(const Shape& s, const T* dout, const T* q, const T* k, const T* v, const T* o, const float* lse, const int32_t* start,
              float scale, T* dq, G* dk, G* dv) {
    const long token = s.heads * s.dim, packed[3] = {s.seq * token, token, s.dim};
#pragma omp parallel num_threads(s.threads)
    {
        const Room<F> room(s.dim, s.seq);
        const long wide = room.wide;
#pragma omp for schedule(dynamic)
        for (long task = 0; task < s.batch * s.heads; task++) {
            const Head head = head_of(s, start, task);
            const auto k_h = matrix(k, s.k, s, head.b, head.kv), v_h = matrix(v, s.v, s, head.b, head.kv);
            const long place = head.b * packed[0] + head.h * packed[2];
            enter(room, matrix(q, s.q, s, head.b, head.h), matrix(dout, s.dout, s, head.b, head.h),
                  matrix(o, packed, s, head.b, head.h), lse + (head.b * s.heads + head.h) * s.seq);
            for (long n0 = 0; n0 < s.seq; n0 += BLOCK) {
                pack_turned<BLOCK>(room.k_turned.get(), k_h.from(n0), wide);
                pack_turned<BLOCK>(room.v_turned.get(), v_h.from(n0), wide);
                pack_steps(room.k_steps.get(), k_h.from(n0), BLOCK, wide);
                for (float* sums : {room.dk.get(), room.dv.get()}) std::memset(sums, 0, BLOCK * wide * sizeof(float));
                for (long m0 = n0; m0 < s.seq && head.first(m0) < n0 + BLOCK; m0 += BLOCK) add_block(room, head, s, scale, m0, n0);
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
