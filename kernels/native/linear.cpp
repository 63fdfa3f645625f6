// A product of large matrices, c = a b, in blocks that caches hold, accumulated in fp32.
//
// b is laid out in panels of a few vectors' width. A part of the summed dimension at a time, a block of a's rows, in tiles,
// meets all panels: it stays in the second cache, a panel's part in the first, where the next one is fetched meanwhile.
#include <algorithm>
#include <vector>

#include "layouts.hpp"

namespace {

constexpr int PANEL = MOST_VECTORS * WIDTH;
constexpr long MOST_ROWS = 240, LEAST_ROWS = 96;  // of a at a time, as measured (docs/LOG.md)
static_assert(MOST_ROWS % TILE == 0);
constexpr long STEPS = 16;  // of b that are laid out at a time: few enough to be read as they lie in memory

struct Shape {
    long rows, columns, steps;  // of c, of c, summed over
    long a_row, a_step, b_step, b_column;  // distances in elements; of each pair one is 1
    long threads;
};

template <class T> struct Product {
    typedef std::conditional_t<std::is_same_v<T, float>, float, bf16_factor> F;
    static constexpr long IN = IN_FACTOR<F>, PART = MOST_STEPS * IN;  // steps that product() sums in registers

    const Shape& s;
    const T *a, *b;
    T* c;
    long panels = (s.columns + PANEL - 1) / PANEL, size = up(s.steps, WIDTH) / IN * PANEL;  // of one panel, in factors

    // b in panels of [step][column], 0 beyond its end, by parts that are read as they lie in memory: a few steps of all panels, or
    // a whole panel.
    long parts_of_b() const { return s.b_column == 1 ? (s.steps + STEPS - 1) / STEPS : panels; }
    void pack_b(F* to, long part) const {
        if (s.b_column == 1) {
            const long k = part * STEPS, steps = smaller(STEPS, s.steps - k);
            for (long i = 0; i < panels; i++) {
                const Matrix<T> from{b + i * PANEL + k * s.b_step, s.b_step, steps, s.columns - i * PANEL};
                pack_steps(to + i * size + k / IN * PANEL, from, up(steps, 2), PANEL);
            }
        } else {
            const Matrix<T> from{b + part * PANEL * s.b_column, s.b_column, s.columns - part * PANEL, s.steps};
            pack_turned<PANEL>(to + part * size, from, up(s.steps, WIDTH));
        }
    }

    // Where the blocks of rows begin that threads take one after another, and the last one ends. They become ever smaller, since in
    // the end all threads wait for the last one.
    std::vector<long> block_rows() const {
        std::vector<long> begins = {0};
        const long least = smaller(LEAST_ROWS, (s.rows + s.threads - 1) / s.threads);
        for (long left = s.rows; left > 0; left = s.rows - begins.back())
            begins.push_back(begins.back() + smaller(left, up(std::clamp(left / s.threads, least, MOST_ROWS), TILE)));
        return begins;
    }

    // c (+)= rows [r0, r0 + rows) of a, steps [k, k + steps), times b's. `packed_a` holds so much of a.
    void add_part(long r0, long rows, long k, long steps, const F* packed, F* packed_a, float* sums, long row) const {
        const T* from = a + r0 * s.a_row + k * s.a_step;
        const long size_a = tile_size<F>(steps), tiles = (rows + TILE - 1) / TILE, factors = (steps + IN - 1) / IN;
        if (s.a_step == 1) pack_turned_tiles(packed_a, Matrix<T>{from, s.a_row, s.rows - r0, steps}, rows, up(steps, 2), size_a);
        else pack_tiles(packed_a, Matrix<T>{from, s.a_step, steps, s.rows - r0}, rows, size_a);
        for (long i = 0; i < panels; i++) {
            const int vectors = (smaller(PANEL, s.columns - i * PANEL) + WIDTH - 1) / WIDTH;
            const F* panel = packed + i * size + k / IN * PANEL;
            const Ahead ahead = i + 1 < panels ? Ahead(panel + size, factors * PANEL, tiles) : Ahead();
            product(rows, vectors, factors, packed_a, Tiles{size_a}, panel, always<PANEL>, sums + i * PANEL, row, k > 0, ahead);
        }
    }

    void multiply() const {
        const auto begins = block_rows();
        const long blocks = begins.size() - 1;
        const bool direct = std::is_same_v<T, float> && s.columns % WIDTH == 0;
        const long row = direct ? s.columns : panels * PANEL;
        auto packed = buffer<F>(panels * size);
#pragma omp parallel num_threads(s.threads)
        {
            auto packed_a = buffer<F>(MOST_ROWS / TILE * tile_size<F>(PART));
            auto block_sums = buffer<float>(direct ? 0 : MOST_ROWS * row);
#pragma omp for schedule(dynamic)
            for (long part = 0; part < parts_of_b(); part++) pack_b(packed.get(), part);
#pragma omp for schedule(dynamic)
            for (long block = 0; block < blocks; block++) {
                const long r0 = begins[block], rows = begins[block + 1] - r0;
                float* sums = direct ? (float*)c + r0 * row : block_sums.get();
                for (long k = 0; k < s.steps; k += PART)
                    add_part(r0, rows, k, smaller(PART, s.steps - k), packed.get(), packed_a.get(), sums, row);
                if (direct) continue;
                for (long r = 0; r < rows; r++) store_row(c + (r0 + r) * s.columns, sums + r * row, 1, s.columns);
            }
        }
    }
};
}  // namespace

extern "C" void linear_float32(const Shape* s, const float* a, const float* b, float* c) {
    Product<float>{*s, a, b, c}.multiply();
}
extern "C" void linear_bfloat16(const Shape* s, const bf16* a, const bf16* b, bf16* c) {
    Product<bf16>{*s, a, b, c}.multiply();
}
