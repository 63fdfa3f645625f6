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
    long chunk;     // tokens that numerators are kept of at a time, a multiple of TOKENS
    long kept_row;  // numbers from one row of them to the next
    long ignore_index;
    long weight_gradient_is_fp32;  // else of the weights' dtype
    long threads;
};

template <class F, class T> struct Job {
    static constexpr int P = IN_FACTOR<F>;
    const Shape& s;
    const T *hidden, *weight;
    const int64_t* labels;
    const float z_loss;
    float* losses;
    T* grad_hidden;  // or null
    void* grad_weight;
    F* kept;  // numerators [vocab][kept_row()]

    // Of the tokens [first, first + count) that are gone over together.
    long first = 0, count = 0;
    Buffer<float> shift, total, scale, at_label, label_logit, others;

    long even_wide() const { return up(s.wide, WIDTH); }
    long panels() const { return (s.wide + PANEL - 1) / PANEL; }
    long padded() const { return up(count, TOKENS); }
    F* kept_from(long v) const { return kept + v * s.kept_row / P; }
    // Of the vocabulary, as measured (docs/LOG.md): what is packed of them has to stay in a cache.
    long rows_at_once() const { return WIDTH < 16 ? 144 : even_wide() * (long)sizeof(T) <= 1536 ? 240 : 120; }
    long label(long n) const { return labels[first + n] == s.ignore_index ? 0 : (long)labels[first + n]; }
    Matrix<T> weights(long v) const { return Matrix<T>{weight, s.wide, s.vocab, s.wide}.from(v); }
    Matrix<T> hiddens(long n) const { return {hidden + (first + n) * s.wide, s.wide, count - n, s.wide}; }

    Job(const Shape& s, const T* hidden, const T* weight, const int64_t* labels, float z_loss, float* losses, T* grad_hidden,
        void* grad_weight, F* kept)
        : s(s), hidden(hidden), weight(weight), labels(labels), z_loss(z_loss), losses(losses), grad_hidden(grad_hidden),
          grad_weight(grad_weight), kept(kept) {
        const long most = up(smaller(s.chunk, s.tokens), TOKENS);
        for (auto* x : {&shift, &total, &scale, &at_label, &label_logit}) *x = buffer<float>(most);
        if (grad_hidden) others = buffer<float>(most * panels() * PANEL);
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
        const long rows;
        Buffer<F> turned, scratch, weight_rows, weight_steps, numerators;
        Buffer<float> logits;
        Room(long rows, long tokens, long wide, long columns)
            : rows(rows), turned(buffer<F>(tokens * wide / P)), scratch(buffer<F>(TOKENS * wide / P)),
              weight_rows(buffer<F>(rows * wide / P)), weight_steps(buffer<F>(rows * columns / P)),
              numerators(buffer<F>(rows * TOKENS / P)), logits(buffer<float>(rows * TOKENS)) {}
    };

    // Blocks of tokens in parallel, each over the whole vocabulary. Largest only: shifts become the largest logits, no more.
    template <bool LARGEST_ONLY> void over_tokens() {
        const long rows = rows_at_once(), blocks = padded() / TOKENS;
        // Up to 12 blocks share what is packed of the weights; as many in each task, since threads wait for the last one.
        const long turns = (blocks + 12 * s.threads - 1) / (12 * s.threads), most = turns * s.threads;
        const long together = (blocks + most - 1) / most, tasks = (blocks + together - 1) / together;
#pragma omp parallel num_threads(s.threads)
        {
            const Room room(rows, together * TOKENS, even_wide(), panels() * PANEL);
#pragma omp for schedule(dynamic)
            for (long task = 0; task < tasks; task++) {
                const long begin = task * together, end = smaller(begin + together, blocks);
                for (long b = begin; b < end; b++) begin_block<LARGEST_ONLY>(room, b, b - begin);
                for (long v0 = 0; v0 < s.vocab; v0 += rows) {
                    const long now = smaller(rows, s.vocab - v0);
                    pack_rows(room.weight_rows.get(), weights(v0), now, even_wide());
                    for (long i = 0; grad_hidden && !LARGEST_ONLY && i < panels(); i++)
                        pack_steps(weight_panel(room, i), weights(v0).columns(i * PANEL, PANEL), up(now, 2), PANEL);
                    for (long b = begin; b < end; b++) over_logits<LARGEST_ONLY>(room, b, b - begin, v0, now);
                }
            }
        }
    }

    F* turned_block(const Room& room, long place) const { return room.turned.get() + place * TOKENS * even_wide() / P; }
    F* weight_panel(const Room& room, long i) const { return room.weight_steps.get() + i * room.rows * PANEL / P; }

    // Block `b` of tokens, at `place` among those of a task: packed, and its sums begun.
    template <bool LARGEST_ONLY> void begin_block(const Room& room, long b, long place) {
        pack_turned(turned_block(room, place), room.scratch.get(), hiddens(b * TOKENS), TOKENS, even_wide());
        for (long n = b * TOKENS; n < (b + 1) * TOKENS; n++) {
            if (LARGEST_ONLY) shift[n] = -INFINITY;
            else total[n] = 0;
        }
        if (grad_hidden && !LARGEST_ONLY) std::memset(panel_of_others(b, 0), 0, TOKENS * panels() * PANEL * sizeof(float));
    }

    // The logits of a block of tokens and of `now` rows of the vocabulary from v0 on, and all that is done with them in the cache.
    template <bool LARGEST_ONLY> void over_logits(const Room& room, long b, long place, long v0, long now) {
        const long wide = even_wide();
        float* logits = room.logits.get();
        product(now, TOKENS / WIDTH, wide / P, room.weight_rows.get(), wide / P, 1, turned_block(room, place), TOKENS, logits,
                TOKENS, false);
        if (LARGEST_ONLY) {
            for (long v = 0; v < now; v++)
                for (long n = b * TOKENS, c = 0; c < TOKENS; c += WIDTH)
                    store(&shift[n + c], larger(load(&shift[n + c]), load(logits + v * TOKENS + c)));
            return;
        }
        exponentials(b * TOKENS, v0, now, logits, room.numerators.get());
        for (long i = 0; grad_hidden && i < panels(); i++)
            product(smaller(TOKENS, count - b * TOKENS), panel_vectors(i), up(now, 2) / P, room.numerators.get(), 1, TOKENS,
                    weight_panel(room, i), PANEL, panel_of_others(b, i), PANEL, true);
    }

    int panel_vectors(long i) const { return (smaller(PANEL, s.wide - i * PANEL) + WIDTH - 1) / WIDTH; }
    float* panel_of_others(long block, long i) { return others.get() + (block * panels() + i) * TOKENS * PANEL; }

    // Logits [rows][TOKENS] of the vocabulary from v0 on become numerators, summed, kept, and as factors without the labels' own.
    void exponentials(long n0, long v0, long rows, float* logits, F* numerators) {
        constexpr int VECTORS = TOKENS / WIDTH;
        for (long n = n0; n < n0 + TOKENS && n < count; n++)
            if (label(n) >= v0 && label(n) < v0 + rows) label_logit[n] = logits[(label(n) - v0) * TOKENS + n - n0];
        vec shifts[VECTORS], totals[VECTORS];
        for (int i = 0; i < VECTORS; i++) shifts[i] = load(&shift[n0 + i * WIDTH]), totals[i] = load(&total[n0 + i * WIDTH]);
        for (long v = 0; v < rows; v += 2)
            for (int i = 0; i < VECTORS; i++) {
                const vec upper = exp_of(load(logits + v * TOKENS + i * WIDTH) - shifts[i]);
                const vec lower = v + 1 < rows ? exp_of(load(logits + (v + 1) * TOKENS + i * WIDTH) - shifts[i]) : vec{};
                totals[i] += upper + lower;
                if (grad_hidden) put_rows(numerators + v / P * TOKENS + i * WIDTH, TOKENS, upper, lower);
                if (grad_weight) {
                    put(kept_from(v0 + v) + (n0 + i * WIDTH) / P, upper);
                    if (v + 1 < rows) put(kept_from(v0 + v + 1) + (n0 + i * WIDTH) / P, lower);
                }
            }
        for (int i = 0; i < VECTORS; i++) store(&total[n0 + i * WIDTH], totals[i]);
        if (grad_hidden)
            for (long n = n0; n < n0 + TOKENS && n < count; n++)
                if (label(n) >= v0 && label(n) < v0 + rows) clear(numerators, label(n) - v0, n - n0);
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
        for (long i = 0; i < panels(); i++) {
            float sums[PANEL];
            const float* from = panel_of_others(n / TOKENS, i) + n % TOKENS * PANEL;
            for (long c = 0; c < panel_vectors(i) * WIDTH; c += WIDTH) {
                const vec all = load(from + c) + at_label[n] * piece(label_row, i * PANEL + c, s.wide);
                store(sums + c, counted ? all * scale[n] : vec{});
            }
            store_row(to + i * PANEL, sums, 1, smaller(PANEL, s.wide - i * PANEL));
        }
    }

    void keep(long v, long n, float x) {
        T number[WIDTH];
        store(number, splat(x));
        if constexpr (P == 1) ((float*)kept_from(v))[n] = to_float(number[0]);
        else ((T*)kept_from(v))[n] = number[0];
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
        auto scaled = buffer<F>(columns * steps);
#pragma omp parallel num_threads(s.threads)
        {
            auto sums = buffer<float>(rows * columns);
#pragma omp for schedule(static)
            for (long n = 0; n < padded(); n += TOKENS)
                for (long i = 0; i < panels(); i++)
                    pack_steps(scaled.get() + (i * steps + n / P) * PANEL, hiddens(n).columns(i * PANEL, PANEL), TOKENS, PANEL,
                               &scale[n]);
#pragma omp for schedule(dynamic)
            for (long v0 = 0; v0 < s.vocab; v0 += rows) {
                const long now = smaller(rows, s.vocab - v0);
                for (long n = 0; n < used; n += MOST_STEPS)
                    for (long i = 0; i < panels(); i++)
                        product(now, panel_vectors(i), smaller(MOST_STEPS, used - n), kept_from(v0) + n, s.kept_row / P, 1,
                                scaled.get() + (i * steps + n) * PANEL, PANEL, sums.get() + i * PANEL, columns, n > 0);
                for (long v = 0; v < now; v++) add_weight_gradient(v0 + v, sums.get() + v * columns);
            }
        }
    }
};
}  // namespace

extern "C" {
void linear_cross_entropy_float32(const Shape* s, const float* hidden, const float* weight, const int64_t* labels, float z_loss,
                                  float* losses, float* grad_hidden, void* grad_weight, void* kept) {
    Job<float, float>(*s, hidden, weight, labels, z_loss, losses, grad_hidden, grad_weight, (float*)kept).run();
}
void linear_cross_entropy_bfloat16(const Shape* s, const bf16* hidden, const bf16* weight, const int64_t* labels, float z_loss,
                                   float* losses, bf16* grad_hidden, void* grad_weight, void* kept) {
    Job<bf16_factor, bf16>(*s, hidden, weight, labels, z_loss, losses, grad_hidden, grad_weight, (bf16_factor*)kept).run();
}

// Whether numerators of bf16 weights are kept as bf16; else as fp32.
int linear_cross_entropy_keeps_bf16() { return IN_FACTOR<bf16_factor> == 2; }
}
