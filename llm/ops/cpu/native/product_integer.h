// y = x W^T for weights in INT8 and INT4: groups of 32 inputs that share a scale, and rows made by quantise.
//
// INT8: values [blocks, groups, 8, 64] uint8: line j's byte 4 o + i is input 4 j + i of output o, plus 128. scales [blocks, groups, 16] float16.
// INT4: values [blocks, groups, 4, 64] uint8: line j's byte 4 o + i holds input 8 j + i of output o in its low nibble, input 8 j + 4 + i in its
// high one. scales [blocks, groups, 2, 16] float16: scales, then offsets; a weight is scale * nibble + offset.
//
// A group's sums are whole numbers, and groups are added in order, so results are the same in every tile and in every instruction set.
#pragma once

#include "quantise.h"
#include "tiles.h"

namespace tandem {

constexpr int STEP = 2 * QUAD;  // inputs that are widened at once
constexpr int GROUP_STEPS = GROUP / STEP, STEP_PAIRS = STEP / 2;
constexpr size_t PAIRS_BYTES = 2 * BLOCK_OUTPUTS * sizeof(int16_t);
static_assert(int64_t(GROUP) * 128 * LARGEST_INTEGER <= INT32_MAX, "a group's sums fit 32 bits");

// A block's weights as they are stored. HALVES: scales of each output and group, with or without an offset.
struct Int8Block {
    static constexpr int BYTES = GROUP * BLOCK_OUTPUTS, HALVES = 1;
    const uint8_t* lines;
    const uint16_t* scales;

    void pairs(int group, int step, Pairs* four) const {
        for (int half = 0; half < 2; half++) widen_bytes(lines + size_t(group) * BYTES + (2 * step + half) * LINE_BYTES, four + 2 * half);
    }
    Reals scale(int group, int which) const { return load_halves(scales + (size_t(group) * HALVES + which) * BLOCK_OUTPUTS); }
};

struct Int4Block {
    static constexpr int BYTES = GROUP * BLOCK_OUTPUTS / 2, HALVES = 2;
    const uint8_t* lines;
    const uint16_t* scales;

    void pairs(int group, int step, Pairs* four) const { widen_nibbles(lines + size_t(group) * BYTES + step * LINE_BYTES, four); }
    Reals scale(int group, int which) const { return load_halves(scales + (size_t(group) * HALVES + which) * BLOCK_OUTPUTS); }
};

// The same, widened once for many rows.
template <int HALVES_>
struct WideBlock {
    static constexpr int HALVES = HALVES_;
    char* lines;
    float* scales;

    char* line(int group, int step) const { return lines + (size_t(group) * GROUP_STEPS + step) * STEP_PAIRS * PAIRS_BYTES; }
    void pairs(int group, int step, Pairs* four) const {
        for (int pair = 0; pair < STEP_PAIRS; pair++) four[pair] = load_pairs(line(group, step) + pair * PAIRS_BYTES);
    }
    Reals scale(int group, int which) const { return load_reals(scales + (size_t(group) * HALVES + which) * BLOCK_OUTPUTS); }
};

template <class Block>
inline WideBlock<Block::HALVES> widen_block(const Block& block, int groups) {
    const size_t bytes = size_t(groups) * GROUP / 2 * PAIRS_BYTES;
    char* memory = panel_memory(bytes + size_t(groups) * Block::HALVES * BLOCK_OUTPUTS * sizeof(float));
    const WideBlock<Block::HALVES> wide{memory, reinterpret_cast<float*>(memory + bytes)};
    for (int group = 0; group < groups; group++) {
        for (int step = 0; step < GROUP_STEPS; step++) {
            Pairs four[STEP_PAIRS];
            block.pairs(group, step, four);
            for (int pair = 0; pair < STEP_PAIRS; pair++) store_pairs(wide.line(group, step) + pair * PAIRS_BYTES, four[pair]);
        }
        for (int which = 0; which < Block::HALVES; which++)
            store_reals(wide.scales + (size_t(group) * Block::HALVES + which) * BLOCK_OUTPUTS, block.scale(group, which));
    }
    return wide;
}

// out[r][o] of ROWS rows and one block. Asks for the rows that come next, since all rows do not fit the first-level cache.
template <int ROWS, class Block>
inline void integer_tile(const Block& block, const Rows& rows, int row, float (*out)[BLOCK_OUTPUTS]) {
    Reals totals[ROWS];
    for (int r = 0; r < ROWS; r++) totals[r] = zero_reals();
    for (int group = 0; group < rows.layout.groups; group++) {
        if constexpr (ROWS == INTEGER_ROWS)
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++) __builtin_prefetch(rows.integers(row + ROWS + r) + group * GROUP);
        Sums sums[ROWS];
        for (int r = 0; r < ROWS; r++) sums[r] = zero_sums();
#pragma GCC unroll 4
        for (int step = 0; step < GROUP_STEPS; step++) {
            Pairs four[STEP_PAIRS];
            block.pairs(group, step, four);
#pragma GCC unroll 4
            for (int pair = 0; pair < STEP_PAIRS; pair++)
#pragma GCC unroll 8
                for (int r = 0; r < ROWS; r++)
                    sums[r] = add_products(sums[r], four[pair], rows.integers(row + r) + group * GROUP + step * STEP + 2 * pair);
        }
        const Reals scale = block.scale(group, 0);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++)
            totals[r] = fused(times(splat_real(rows.scales(row + r)[group]), scale), to_reals(sums[r]), totals[r]);
        if constexpr (Block::HALVES == 2) {
            const Reals offset = block.scale(group, 1);
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++) totals[r] = fused(splat_real(rows.sums(row + r)[group]), offset, totals[r]);
        }
    }
    for (int r = 0; r < ROWS; r++) store_reals(out[r], totals[r]);
}

template <class Block>
inline void integer_rows(const Block& block, const Rows& rows, int count, int first_output, const Target& target) {
    cut_rows<INTEGER_ROWS>(count, [&](auto size, int row) {
        alignas(64) float tile[size][BLOCK_OUTPUTS];
        target.ask_for(row, size, first_output);
        integer_tile<size>(block, rows, row, tile);
        target.take(tile, row, size, first_output);
    });
}

// Calls work(block, its first output) for each block of the target.
template <class Block, class Work>
inline void for_each_block(const uint8_t* values, const uint16_t* scales, int groups, const Target& target, Work work) {
    for (int index = target.first_block(); index < target.end_block(); index++)
        work(Block{values + size_t(index) * groups * Block::BYTES, scales + size_t(index) * groups * Block::HALVES * BLOCK_OUTPUTS},
             index * BLOCK_OUTPUTS);
}

template <class Block>
inline void multiply_integer(const uint8_t* values, const uint16_t* scales, const Rows& rows, int count, const Target& target) {
    for_each_block<Block>(values, scales, rows.layout.groups, target, [&](const Block& block, int first_output) {
        if (count <= INTEGER_ROWS)
            integer_rows(block, rows, count, first_output, target);
        else
            integer_rows(widen_block(block, rows.layout.groups), rows, count, first_output, target);
    });
}

}  // namespace tandem
