// Cuts a product into tiles of a fixed number of rows and blocks.
#pragma once

#include <algorithm>
#include <utility>

#include "integers.h"

namespace tandem {

// Where a product's results go: out[row * stride + o] for outputs first <= o < last.
struct Target {
    float* out;
    size_t stride;
    int first, last;

    int first_block() const { return first / BLOCK_OUTPUTS; }
    int end_block() const { return (last + BLOCK_OUTPUTS - 1) / BLOCK_OUTPUTS; }

    // What `take` will write: its lines come while the tile is computed.
    void ask_for(int row, int rows, int start) const {
        for (int r = 0; r < rows; r++) __builtin_prefetch(out + (row + r) * stride + start, 1);
    }

    // Takes the results of `rows` rows and of the outputs from `start` on.
    template <int WIDTH>
    void take(const float (*tile)[WIDTH], int row, int rows, int start) const {
        const int begin = std::max(first, start), end = std::min(last, start + WIDTH);
        for (int r = 0; r < rows; r++) std::copy(tile[r] + begin - start, tile[r] + end - start, out + (row + r) * stride + begin);
    }
};

// Calls work(integral constant of the tile's rows, first row) so that all rows are done, by as few tiles of at most MOST rows as it takes.
template <int MOST, class Work>
inline void cut_rows(int rows, Work work) {
    int row = 0;
    for (; row + MOST <= rows; row += MOST) work(std::integral_constant<int, MOST>(), row);
    [&]<int... LESS>(std::integer_sequence<int, LESS...>) {
        ((rows - row == LESS + 1 ? work(std::integral_constant<int, LESS + 1>(), row) : void()), ...);
    }(std::make_integer_sequence<int, MOST - 1>());
}

}  // namespace tandem
