// The last linear layer and its cross-entropy: a block of logits becomes softmax numerators and a part of the hidden states'
// gradient while it lies in a cache; the numerators are kept for the weights' gradient, which has to wait for the denominators.
//
// Numerators are exp(logit - shift), the shift being the label's logit. See linear_cross_entropy_cpu.py, whose formulas these are.
#include <cmath>
#include <initializer_list>

#include "layouts.hpp"

namespace {

constexpr int TOKENS = 48, PANEL = MOST_VECTORS * WIDTH;  // tokens a block; columns of a gradient in a row of memory
constexpr float LARGEST_TOTAL = 1e30f;  // of numerators, times a weight or a hidden number: far from 3e38

struct Shape {
    long tokens, vocab, wide;
    long chunk;  // tokens that numerators are kept of at a time, a multiple of TOKENS
    long ignore_index;
    long weight_gradient_is_fp32;  // else of the weights' dtype
    long threads;
};

template <class F, class T> struct Job {
    static constexpr int P = IN_FACTOR<F>;
    typedef std::conditional_t<P == 1, T, F> K;  // what is kept: pairs as they are, else bf16 that is multiplied as fp32
    const Shape& s;
    const T *hidden, *weight;
    const int64_t* labels;
    const float z_loss;
    float* losses;
    T* grad_hidden;  // or null
    void* grad_weight;
    Buffer<K> kept;  // numerators [tile of the vocabulary][token][row of the tile]

    // Of the tokens [first, first + count) that are gone over together.
    long first = 0, count = 0;
    Buffer<float> shift, total, scale, at_label, label_logit, others;

    long even_wide() const { return up(s.wide, WIDTH); }
    long panels() const { return (s.wide + PANEL - 1) / PANEL; }
    long padded() const { return up(count, TOKENS); }
    long kept_tile() const { return smaller(s.chunk, up(s.tokens, TOKENS)) / P * TILE; }
    K* kept_from(long v, long n) const { return kept.get() + v / TILE * kept_tile() + n / P * TILE; }
    // Of the vocabulary, as measured (docs/LOG.md): what is packed of them has to stay in a cache. Whole tiles.
    long rows_at_once() const { return WIDTH < 16 ? 96 : even_wide() * (long)sizeof(T) <= 1536 ? 240 : 120; }
    long label(long n) const { return labels[first + n] == s.ignore_index ? 0 : (long)labels[first + n]; }
    Matrix<T> weights(long v) const { return Matrix<T>{weight, s.wide, s.vocab, s.wide}.from(v); }
    Matrix<T> hiddens(long n) const { return {hidden + (first + n) * s.wide, s.wide, count - n, s.wide}; }

    Job(const Shape& s, const T* hidden, const T* weight, const int64_t* labels, float z_loss, float* losses, T* grad_hidden,
        void* grad_weight)
        : s(s), hidden(hidden), weight(weight), labels(labels), z_loss(z_loss), losses(losses), grad_hidden(grad_hidden),
          grad_weight(grad_weight) {
        const long most = up(smaller(s.chunk, s.tokens), TOKENS);
        for (auto* x : {&shift, &total, &scale, &at_label, &label_logit}) *x = buffer<float>(most);
        if (grad_hidden) others = buffer<float>(most * s.wide);
        if (grad_weight) kept = buffer<K>(up(s.vocab, TILE) / TILE * kept_tile() + WIDTH);
    }

    void run() {
        for (first = 0; first < s.tokens; first += count) {
            count = smaller(s.chunk, s.tokens - first);
            shift_by_labels();
            over_tokens<false>();
            if (!all_fit()) {
                over_tokens<true>();
                over_tokens<false>();
            }
            finish();
            if (grad_weight) over_vocab();
        }
    }

    float dot(const T* a, const T* b) const {
        vec products = {};
        for (long c = 0; c < s.wide; c += WIDTH) products += piece(a, c, s.wide) * piece(b, c, s.wide);
        return sum(products);
    }

    void shift_by_labels() {
        for (long n = 0; n < padded(); n++) shift[n] = n < count ? dot(hiddens(n).row(0), weights(label(n)).row(0)) : 0;
    }

    bool all_fit() const {
        for (long n = 0; n < count; n++)
            if (!(total[n] < LARGEST_TOTAL)) return false;
        return true;
    }

    // What a thread works in: some blocks of tokens, and `rows` of the vocabulary.
    struct Room {
        const long rows, logit_tile, gradient_tile;  // factors of a tile of weights, that is multiplied for logits, for gradients
        Buffer<F> turned, weight_rows, weight_columns, numerators;
        Buffer<float> logits;
        Room(long rows, long tokens, long wide)
            : rows(rows), logit_tile(tile_size<F>(wide)), gradient_tile(tile_size<F>(rows)), turned(buffer<F>(tokens * wide / P)),
              weight_rows(buffer<F>(up(rows, TILE) / TILE * logit_tile)),
              weight_columns(buffer<F>(up(wide, TILE) / TILE * gradient_tile)), numerators(buffer<F>(rows * TOKENS / P)),
              logits(buffer<float>(rows * TOKENS)) {}
    };

    // Blocks of tokens in parallel, each over the whole vocabulary. Largest only: shifts become the largest logits, no more.
    template <bool LARGEST_ONLY> void over_tokens() {
        const long rows = rows_at_once(), blocks = padded() / TOKENS;
        // Up to 12 blocks share what is packed of the weights; as many in each task, since threads wait for the last one.
        const long turns = (blocks + 12 * s.threads - 1) / (12 * s.threads), most = turns * s.threads;
        const long together = (blocks + most - 1) / most, tasks = (blocks + together - 1) / together;
#pragma omp parallel num_threads(s.threads)
        {
            const Room room(rows, together * TOKENS, even_wide());
#pragma omp for schedule(dynamic)
            for (long task = 0; task < tasks; task++) {
                const long begin = task * together, end = smaller(begin + together, blocks);
                for (long b = begin; b < end; b++) begin_block<LARGEST_ONLY>(room, b, b - begin);
                for (long v0 = 0; v0 < s.vocab; v0 += rows) {
                    const long now = smaller(rows, s.vocab - v0);
                    pack_turned_tiles(room.weight_rows.get(), weights(v0), now, even_wide(), room.logit_tile);
                    if (grad_hidden && !LARGEST_ONLY)
                        pack_tiles(room.weight_columns.get(), weights(v0).rows(now), s.wide, room.gradient_tile);
                    for (long b = begin; b < end; b++) over_logits<LARGEST_ONLY>(room, b, b - begin, v0, now);
                }
                passed_caches();
            }
        }
    }

    F* turned_block(const Room& room, long place) const { return room.turned.get() + place * TOKENS * even_wide() / P; }
    float* block_of_others(long b) { return others.get() + b * TOKENS * s.wide; }  // [number][token]

    // Block `b` of tokens, at `place` among those of a task: packed, and its sums begun.
    template <bool LARGEST_ONLY> void begin_block(const Room& room, long b, long place) {
        pack_turned<TOKENS>(turned_block(room, place), hiddens(b * TOKENS), even_wide());
        for (long n = b * TOKENS; n < (b + 1) * TOKENS; n++) {
            if (LARGEST_ONLY) shift[n] = -INFINITY;
            else total[n] = 0;
        }
        if (grad_hidden && !LARGEST_ONLY) std::memset(block_of_others(b), 0, TOKENS * s.wide * sizeof(float));
    }

    // The logits of a block of tokens and of `now` rows of the vocabulary from v0 on, and all that is done with them in the cache.
    template <bool LARGEST_ONLY> void over_logits(const Room& room, long b, long place, long v0, long now) {
        const long wide = even_wide();
        float* logits = room.logits.get();
        product(now, TOKENS / WIDTH, wide / P, room.weight_rows.get(), Tiles{room.logit_tile}, turned_block(room, place),
                always<TOKENS>, logits, always<TOKENS>, false);
        if (LARGEST_ONLY) {
            for (long v = 0; v < now; v++)
                for (long n = b * TOKENS, c = 0; c < TOKENS; c += WIDTH)
                    store(&shift[n + c], larger(load(&shift[n + c]), load(logits + v * TOKENS + c)));
            return;
        }
        exponentials(b * TOKENS, v0, now, logits, room.numerators.get());
        if (grad_hidden)
            product(s.wide, TOKENS / WIDTH, up(now, 2) / P, room.weight_columns.get(), Tiles{room.gradient_tile},
                    room.numerators.get(), always<TOKENS>, block_of_others(b), always<TOKENS>, true);
    }

    int panel_vectors(long i) const { return (smaller(PANEL, s.wide - i * PANEL) + WIDTH - 1) / WIDTH; }

    // Logits [rows][TOKENS] of the vocabulary from v0 on become numerators, summed, kept, and as factors without the labels' own.
    void exponentials(long n0, long v0, long rows, float* logits, F* numerators) {
        constexpr int VECTORS = TOKENS / WIDTH;
        for (long n = n0; n < n0 + TOKENS && n < count; n++)
            if (label(n) >= v0 && label(n) < v0 + rows) label_logit[n] = logits[(label(n) - v0) * TOKENS + n - n0];
        vec shifts[VECTORS], totals[VECTORS];
        for (int i = 0; i < VECTORS; i++) shifts[i] = load(&shift[n0 + i * WIDTH]), totals[i] = load(&total[n0 + i * WIDTH]);
        F lines[TILE][LINE] = {};
        for (long v = 0; v < rows; v += TILE) {
            for (long r = 0; r < TILE && v + r < rows; r += 2)
                for (int i = 0; i < VECTORS; i++) {
                    const float* from = logits + (v + r) * TOKENS + i * WIDTH;
                    const vec upper = exp_of(load(from) - shifts[i]);
                    const vec lower = v + r + 1 < rows ? exp_of(load(from + TOKENS) - shifts[i]) : vec{};
                    totals[i] += upper + lower;
                    if (grad_hidden) put_rows(numerators + (v + r) / P * TOKENS + i * WIDTH, TOKENS, upper, lower);
                    put(lines[r] + i * WIDTH / P, upper), put(lines[r + 1] + i * WIDTH / P, lower);
                }
            if (grad_weight) keep_tile(kept_from(v0 + v, n0), lines);
        }
        for (int i = 0; i < VECTORS; i++) store(&total[n0 + i * WIDTH], totals[i]);
        if (grad_hidden)
            for (long n = n0; n < n0 + TOKENS && n < count; n++)
                if (label(n) >= v0 && label(n) < v0 + rows) clear(numerators, label(n) - v0, n - n0);
    }

    static constexpr long LINE = up(TOKENS / P, WIDTH);  // factors of a row's numerators, and what makes them whole vectors

    // A tile of rows, turned. Not to be read soon, they pass by the caches.
    static void keep_tile(K* kept, const F (&lines)[TILE][LINE]) {
        alignas(64) F turned[TOKENS / P * TILE + WIDTH];
#pragma GCC unroll 8
        for (long k = 0; k < TOKENS / P; k += WIDTH) {
            vec x[WIDTH];
#pragma GCC unroll 16
            for (int r = 0; r < WIDTH; r++) x[r] = r < TILE ? load_as<vec>(lines[r] + k) : vec{};
            turn(x);
#pragma GCC unroll 16
            for (long i = 0; i < WIDTH; i++)
                if (k + i < TOKENS / P) store_as(turned + (k + i) * TILE, x[i]);  // the next one overwrites what is too much
        }
        static_assert(TOKENS / P * TILE % WIDTH == 0);
        for (long i = 0; i < TOKENS / P * TILE; i += WIDTH) {
            const vec x = load_as<vec>(turned + i);
            if constexpr (P == 1) store_past_caches(kept + i, x);
            else store_past_caches((float*)(kept + i), x);
        }
    }

    static void clear(F* numerators, long v, long n) {
        F* place = numerators + v / P * TOKENS + n;
        std::memset((char*)place + v % P * sizeof(F) / P, 0, sizeof(F) / P);
    }

    // Losses, and what turns numerators into gradients; then the hidden states' gradient.
    void finish() {
#pragma omp parallel for num_threads(s.threads) schedule(static)
        for (long n = 0; n < padded(); n++) {
            const bool counted = n < count && labels[first + n] != s.ignore_index;
            const float log_total = std::log(total[n]) + shift[n], straight = 1 + 2 * z_loss * log_total;
            const float pull = straight == 0 ? 0x1p-24f : straight;  // it is divided by
            if (n < count) losses[first + n] = counted ? log_total - label_logit[n] + z_loss * log_total * log_total : 0;
            scale[n] = counted ? pull / total[n] : 0;
            at_label[n] = n < count ? std::exp(label_logit[n] - shift[n]) - total[n] / pull : 0;
            if (n >= count || !(grad_hidden || grad_weight)) continue;
            if (grad_hidden) hidden_gradient(n, counted);
            if (grad_weight) keep(label(n), n, at_label[n]);
        }
    }

    void hidden_gradient(long n, bool counted) {
        T* to = grad_hidden + (first + n) * s.wide;
        const T* label_row = weights(label(n)).row(0);
        const float* from = block_of_others(n / TOKENS) + n % TOKENS;
        for (long c = 0; c < s.wide; c += WIDTH) {
            float numbers[WIDTH] = {};
            const long now = smaller(WIDTH, s.wide - c);
            for (long i = 0; i < now; i++) numbers[i] = from[(c + i) * TOKENS];
            const vec all = (load(numbers) + at_label[n] * piece(label_row, c, s.wide)) * scale[n];
            store(numbers, counted ? all : vec{});
            store_row(to + c, numbers, 1, now);
        }
    }

    void keep(long v, long n, float x) {
        T number[WIDTH];
        store(number, splat(x));
        ((T*)(kept_from(v, n) + v % TILE))[n % P] = number[0];
    }

    void add_weight_gradient(long v, const float* sums) {
        if (!s.weight_gradient_is_fp32) return store_row((T*)grad_weight + v * s.wide, sums, 1, s.wide);
        float* to = (float*)grad_weight + v * s.wide;
        if (first == 0) return store_row(to, sums, 1, s.wide);
        for (long c = 0; c < s.wide; c++) to[c] += sums[c];
    }

    // The weights' gradient: blocks of the vocabulary in parallel, each over all tokens.
    void over_vocab() {
        const long rows = rows_at_once(), columns = panels() * PANEL, steps = padded() / P, used = up(count, 2) / P;
        const Tiles tiles{std::is_same_v<F, K> ? kept_tile() : MOST_STEPS * TILE};
        auto scaled = buffer<F>(columns * steps);
#pragma omp parallel num_threads(s.threads)
        {
            auto sums = buffer<float>(rows * columns);
            auto widened = buffer<F>(std::is_same_v<F, K> ? 0 : (rows / TILE + 1) * tiles.next);
#pragma omp for schedule(static)
            for (long n = 0; n < padded(); n += TOKENS)
                for (long i = 0; i < panels(); i++)
                    pack_steps(scaled.get() + (i * steps + n / P) * PANEL, hiddens(n).columns(i * PANEL, PANEL), TOKENS, PANEL,
                               &scale[n]);
#pragma omp for schedule(dynamic)
            for (long v0 = 0; v0 < s.vocab; v0 += rows) {
                const long now = smaller(rows, s.vocab - v0);
                for (long n = 0; n < used; n += MOST_STEPS) {
                    const long part = smaller(MOST_STEPS, used - n);
                    const F* numerators = factors_of(kept_from(v0, n * P), now, part, widened.get());
                    for (long i = 0; i < panels(); i++)
                        product(now, panel_vectors(i), part, numerators, tiles, scaled.get() + (i * steps + n) * PANEL,
                                always<PANEL>, sums.get() + i * PANEL, columns, n > 0);
                }
                for (long v = 0; v < now; v++) add_weight_gradient(v0 + v, sums.get() + v * columns);
            }
        }
    }

    // Kept numerators of `rows` rows and `steps` steps as factors: themselves, or in fp32 in `widened`.
    const F* factors_of(const K* from, long rows, long steps, F* widened) const {
        if constexpr (std::is_same_v<F, K>) {
            return from;
        } else {
            for (long t = 0; t * TILE < rows; t++)
                for (long i = 0; i < steps * TILE; i += WIDTH)
                    store(widened + t * MOST_STEPS * TILE + i, load(from + t * kept_tile() + i));
            return widened;
        }
    }
};
}  // namespace

extern "C" {
void linear_cross_entropy_float32(const Shape* s, const float* hidden, const float* weight, const int64_t* labels, float z_loss,
                                  float* losses, float* grad_hidden, void* grad_weight) {
    Job<float, float>(*s, hidden, weight, labels, z_loss, losses, grad_hidden, grad_weight).run();
}
void linear_cross_entropy_bfloat16(const Shape* s, const bf16* hidden, const bf16* weight, const int64_t* labels, float z_loss,
                                   float* losses, bf16* grad_hidden, void* grad_weight) {
    Job<bf16_factor, bf16>(*s, hidden, weight, labels, z_loss, losses, grad_hidden, grad_weight).run();
}
}
