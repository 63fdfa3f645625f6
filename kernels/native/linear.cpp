// A product of large fp32 matrices, c = a b, in blocks that caches hold.
//
// b is laid out in panels of a few vectors' width; a is read where it lies if its steps are neighbours, else copied by blocks.
#include "layouts.hpp"

namespace {

constexpr int PANEL = MOST_VECTORS * WIDTH;
constexpr long ROWS = 240;  // of a at a time, at most

struct Shape {
    long rows, columns, steps;  // of c, of c, summed over
    long a_row, a_step, b_step, b_column;  // distances in elements; of each pair one is 1
    long threads;
};

// Columns [c0, c0 + PANEL) of b as [step][column], 0 beyond its end.
void pack_panel(const Shape& s, const float* b, long c0, float* to, float* scratch) {
    const long wide = smaller(PANEL, s.columns - c0);
    if (s.b_column == 1) {
        pack_steps(to, Matrix<float>{b + c0, s.b_step, s.steps, wide}, up(s.steps, 2), PANEL);
        return;
    }
    for (long k = 0; k < s.steps; k += WIDTH)  // by squares, turned
        pack_turned(to + k * PANEL, scratch, Matrix<float>{b + c0 * s.b_column + k, s.b_column, wide, s.steps - k}, PANEL, WIDTH);
}

void multiply(const Shape& s, const float* a, const float* b, float* c) {
    const long panels = (s.columns + PANEL - 1) / PANEL, size = up(s.steps, WIDTH) * PANEL;
    const long blocks = (s.rows + ROWS * s.threads - 1) / (ROWS * s.threads) * s.threads;  // as many for each thread
    // Registers take 6 rows at a time.
    const auto first_row = [&](long block) { return block == blocks ? s.rows : block * s.rows / blocks / 6 * 6; };
    const long most = s.rows / blocks + 12;
    auto packed = buffer<float>(panels * size);
#pragma omp parallel num_threads(s.threads)
    {
        auto scratch = buffer<float>(PANEL * WIDTH), sums = buffer<float>(most * PANEL);
        auto a_block = buffer<float>(s.a_step == 1 ? 0 : most * s.steps);
#pragma omp for schedule(static)
        for (long i = 0; i < panels; i++) pack_panel(s, b, i * PANEL, packed.get() + i * size, scratch.get());
#pragma omp for schedule(dynamic)
        for (long block = 0; block < blocks; block++) {
            const long r0 = first_row(block), rows = first_row(block + 1) - r0;
            const float* from = a + r0 * s.a_row;
            long a_row = s.a_row, a_step = s.a_step;
            if (s.a_step != 1) {  // [step][row]
                for (long k = 0; k < s.steps; k++) std::memcpy(a_block.get() + k * rows, from + k * s.a_step, rows * sizeof(float));
                from = a_block.get(), a_row = 1, a_step = rows;
            }
            for (long i = 0; i < panels; i++) {
                const long wide = smaller(PANEL, s.columns - i * PANEL);
                product(rows, (wide + WIDTH - 1) / WIDTH, s.steps, from, a_row, a_step, packed.get() + i * size, PANEL, sums.get(),
                        PANEL, false);
                for (long r = 0; r < rows; r++) store_row(c + (r0 + r) * s.columns + i * PANEL, sums.get() + r * PANEL, 1, wide);
            }
        }
    }
}
}  // namespace

extern "C" void linear_float32(const Shape* s, const float* a, const float* b, float* c) { multiply(*s, a, b, c); }
