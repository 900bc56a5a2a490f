// What bench.cpu_kernels times, compiled with the flags of the engine's library.

#include <chrono>
#include <numeric>
#include <vector>

#include "matrix.h"
#include "team.h"

using namespace tandem;

namespace {

constexpr int FLOAT_SUMS = 12;  // enough to hide the latency of a multiply-add
constexpr double LONGEST_WAIT_S = 20, CEILING_S = 1;  // processors take their time to change clocks for wide vectors
constexpr int FEW_ROWS = 64, GRAIN_OUTPUTS = 32, TILE_OUTPUTS = 96, TILE_ROWS = 256;  // as in workspace.h

double seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// One product as a step does it: outputs shared out, or tiles taken by whoever is free; then all meet.
void multiply_together(Team& team, int thread, const Matrix& matrix, const char* rows, int num_rows, float* out) {
    const size_t stride = size_t(matrix.outputs);
    if (num_rows <= FEW_ROWS) {
        const int grains = (matrix.outputs + GRAIN_OUTPUTS - 1) / GRAIN_OUTPUTS, active = team.active();
        const int first = grains * thread / active * GRAIN_OUTPUTS;
        const int last = std::min(matrix.outputs, grains * (thread + 1) / active * GRAIN_OUTPUTS);
        if (first < last) multiply(matrix, rows, num_rows, out, stride, first, last);
        return team.meet(thread);
    }
    const int columns = (matrix.outputs + TILE_OUTPUTS - 1) / TILE_OUTPUTS, lines = (num_rows + TILE_ROWS - 1) / TILE_ROWS;
    for (int task = team.take(); task < columns * lines; task = team.take()) {
        const int row = task % lines * TILE_ROWS, first = task / lines * TILE_OUTPUTS;
        multiply(matrix, rows + row * input_row_bytes(matrix), std::min(TILE_ROWS, num_rows - row), out + row * stride, stride, first,
                 std::min(matrix.outputs, first + TILE_OUTPUTS));
    }
    team.meet(thread);
}

// Runs work(thread) on the team again and again for a while; the shortest run's seconds, of those that had all threads. A crowded team
// may take one alone for a time.
template <class Work>
double shortest(Team& team, double budget, Work work) {
    double best = 1e9;
    const double begin = seconds(), end = begin + budget, limit = end + LONGEST_WAIT_S;
    for (int full = 0; (full < 3 || seconds() < end) && seconds() < limit;) {
        const double start = seconds();
        team.run(work);
        const double taken = seconds() - start;
        if (team.active() < team.size()) continue;
        best = std::min(best, taken);
        full++;
    }
    return best;
}

// The inner loop of a tile whose weights and rows are in the first-level cache.
template <class Sums, class Begin, class Add>
double rate_of(Team& team, int multiply_adds, Begin begin, Add add) {
    constexpr int ROUNDS = 20000, LINES = 8;
    const double best = shortest(team, CEILING_S, [&](int) {
        alignas(64) char memory[64 * (LINES + 4)] = {};
        Sums sums[FLOAT_SUMS];
        for (int r = 0; r < FLOAT_SUMS; r++) sums[r] = begin();
        for (int round = 0; round < ROUNDS; round++) {
            const char* line = memory + round % LINES * 64;
            asm volatile("" : "+r"(line));  // the compiler is not to know that lines stay the same
            add(sums, line);
        }
        Sums kept[FLOAT_SUMS];
        for (int r = 0; r < FLOAT_SUMS; r++) kept[r] = sums[r];
        asm volatile("" : : "r"(kept) : "memory");
    });
    return double(ROUNDS) * multiply_adds * team.size() / best;
}

}  // namespace

extern "C" {

// Seconds of the products of all matrices, one after the other: of each the shortest time, since other programs may get in between.
// `rows` begins each matrix's prepared rows.
double bench_products(const Matrix* matrices, int count, const char* const* rows, int num_rows, float* out, int threads, double budget) {
    Team team(threads);
    std::vector<double> best(count, 1e9);
    shortest(team, budget, [&](int thread) {
        for (int index = 0; index < count; index++) {
            const double start = seconds();
            multiply_together(team, thread, matrices[index], rows[index], num_rows, out);
            if (thread == 0 && team.active() == team.size()) best[index] = std::min(best[index], seconds() - start);
        }
    });
    return std::accumulate(best.begin(), best.end(), 0.0);
}

// Seconds to make rows ready on one thread.
double bench_prepare(const Matrix* matrix, const float* x, int num_rows, char* rows, double budget) {
    Team team(1);
    return shortest(team, budget, [&](int) {
        for (int row = 0; row < num_rows; row++)
            prepare_row(*matrix, x + size_t(row) * matrix->depth, rows + row * input_row_bytes(*matrix));
    });
}

int64_t bench_row_bytes(const Matrix* matrix) { return int64_t(input_row_bytes(*matrix)); }

// Multiply-adds a second of all threads.
double bench_ceiling(int format, int threads) {
    Team team(threads);
    if (format == INT4 || format == INT8)
        return rate_of<Sums>(team, 32 * INTEGER_ROWS, zero_sums, [](Sums* sums, const char* line) {
            const Pairs loaded = load_pairs(line);
#pragma GCC unroll 8
            for (int r = 0; r < INTEGER_ROWS; r++) sums[r] = add_products(sums[r], loaded, reinterpret_cast<const int16_t*>(line) + 2 * r);
        });
    if (format == W4A8)
        return rate_of<MixedSums>(team, 64 * INTEGER_ROWS, [] { return begin_sums(MixedStart(0, 0, 0)); }, [](MixedSums* sums, const char* line) {
            const Pairs loaded = load_pairs(line);
#pragma GCC unroll 8
            for (int r = 0; r < INTEGER_ROWS; r++) sums[r] = add_mixed(sums[r], loaded, reinterpret_cast<const int8_t*>(line) + 4 * r);
        });
    return rate_of<Floats>(team, FLOAT_SUMS * LANES, [] { return Floats{}; }, [](Floats* sums, const char* line) {
        const Floats loaded = load(reinterpret_cast<const float*>(line));
#pragma GCC unroll 16
        for (int r = 0; r < FLOAT_SUMS; r++) sums[r] += loaded * loaded;
    });
}

// Bytes a second that all threads together read.
double bench_read(const char* memory, int64_t bytes, int threads) {
    Team team(threads);
    const double best = shortest(team, 0.5, [&](int thread) {
        const int64_t part = bytes / threads / 256 * 256;
        Floats totals[4] = {};
        for (int64_t place = thread * part; place < (thread + 1) * part; place += int64_t(sizeof totals))
            for (int index = 0; index < 4; index++) totals[index] += load(reinterpret_cast<const float*>(memory + place) + index * LANES);
        const Floats total = totals[0] + totals[1] + totals[2] + totals[3];
        asm volatile("" : : "m"(total));
    });
    return double(bytes) / best;
}
}
