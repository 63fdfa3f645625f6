// A product of large matrices, c = a b, in blocks that caches hold, accumulated in fp32.
//
// b is laid out in panels of a few vectors' width. A part of the summed dimension at a time, a block of a's rows meets all panels:
// it stays in the second cache, a panel's part in the first. fp32 rows of a are read where they lie if their steps are neighbours.
#include <type_traits>

#include "layouts.hpp"

namespace {

constexpr int PANEL = MOST_VECTORS * WIDTH;
constexpr long TILE = smaller(rows_for(MOST_VECTORS), WIDTH);  // rows of a that registers take, and one vector holds
constexpr long ROWS = 240;  // of a at a time, at most

struct Shape {
    long rows, columns, steps;  // of c, of c, summed over
    long a_row, a_step, b_step, b_column;  // distances in elements; of each pair one is 1
    long threads;
};

template <class T> struct Product {
    typedef std::conditional_t<std::is_same_v<T, float>, float, bf16_factor> F;
    static constexpr long IN = IN_FACTOR<F>, PART = MOST_STEPS * IN;  // steps that product() sums in registers
    static constexpr bool IN_PLACE = std::is_same_v<T, F>;

    const Shape& s;
    const T *a, *b;
    T* c;
    long panels = (s.columns + PANEL - 1) / PANEL, size = up(s.steps, WIDTH) / IN * PANEL;  // of one panel, in factors

    // Columns [c0, c0 + PANEL) of b as [step][column], 0 beyond its end.
    void pack_panel(long c0, F* to, F* scratch) const {
        const long wide = smaller(PANEL, s.columns - c0);
        if (s.b_column == 1) {
            pack_steps(to, Matrix<T>{b + c0, s.b_step, s.steps, wide}, up(s.steps, 2), PANEL);
            return;
        }
        for (long k = 0; k < s.steps; k += WIDTH)  // by squares, turned
            pack_turned(to + k / IN * PANEL, scratch, Matrix<T>{b + c0 * s.b_column + k, s.b_column, wide, s.steps - k}, PANEL, WIDTH);
    }

    // c (+)= rows [r0, r0 + rows) of a, steps [k, k + steps), times b's. `scratch` holds so much of a.
    void add_part(long r0, long rows, long k, long steps, const F* packed, F* scratch, float* sums, long row) const {
        const T* from = a + r0 * s.a_row + k * s.a_step;
        const F* left = scratch;
        const long tile_size = up(steps, 2) / IN * TILE + WIDTH;
        long left_row = 1, left_step = TILE, at_once = TILE;
        if (s.a_step != 1) {
            pack_tiles(scratch, Matrix<T>{from, s.a_step, steps, s.rows - r0}, rows, TILE, tile_size);
        } else {
            left_step = 1, at_once = rows;
            if constexpr (IN_PLACE) {
                left = from, left_row = s.a_row;
            } else {
                pack_rows(scratch, Matrix<T>{from, s.a_row, rows, steps}, rows, PART);
                left_row = PART / IN;
            }
        }
        const long factors = (steps + IN - 1) / IN;
        for (long i = 0; i < panels; i++) {
            const int vectors = (smaller(PANEL, s.columns - i * PANEL) + WIDTH - 1) / WIDTH;
            const F* panel = packed + i * size + k / IN * PANEL;
            for (long r = 0; r < rows; r += at_once)
                product(smaller(at_once, rows - r), vectors, factors, left + r / at_once * tile_size, left_row, left_step,
                        panel, PANEL, sums + r * row + i * PANEL, row, k > 0);
        }
    }

    void multiply() const {
        const long blocks = (s.rows + ROWS * s.threads - 1) / (ROWS * s.threads) * s.threads;  // as many for each thread
        const auto first_row = [&](long block) { return block == blocks ? s.rows : block * s.rows / blocks / TILE * TILE; };
        const long most = s.rows / blocks + 2 * TILE;
        const bool direct = std::is_same_v<T, float> && s.columns % WIDTH == 0;
        const long row = direct ? s.columns : panels * PANEL;
        auto packed = buffer<F>(panels * size);
#pragma omp parallel num_threads(s.threads)
        {
            auto scratch = buffer<F>(PANEL * WIDTH), a_block = buffer<F>(most * PART + most / TILE * WIDTH + WIDTH);
            auto block_sums = buffer<float>(direct ? 0 : most * row);
#pragma omp for schedule(static)
            for (long i = 0; i < panels; i++) pack_panel(i * PANEL, packed.get() + i * size, scratch.get());
#pragma omp for schedule(dynamic)
            for (long block = 0; block < blocks; block++) {
                const long r0 = first_row(block), rows = first_row(block + 1) - r0;
                float* sums = direct ? (float*)c + r0 * row : block_sums.get();
                for (long k = 0; k < s.steps; k += PART)
                    add_part(r0, rows, k, smaller(PART, s.steps - k), packed.get(), a_block.get(), sums, row);
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
