// y = x W^T for weights in INT4, as product_integer.h describes them, and rows in 8 bits (mixed_rows.h).
#pragma once

#include "mixed_rows.h"
#include "product_integer.h"

namespace tandem {

#ifndef WIDENED_ROWS
constexpr int WIDENED_ROWS = 4;  // for so few it costs less to widen the rows than to mix the weights
#endif

// A block's weights mixed as the rows are, once for many rows: of each group eight lines, in which byte 4 o + i is a number of the eight i of
// output o, plus CENTRE where that makes it positive.
struct MixedBlock {
    static constexpr int BYTES = GROUP * BLOCK_OUTPUTS;
    const char* lines;
    const float* scales;

    Pairs line(int group, int number) const { return load_pairs(lines + size_t(group) * BYTES + number * LINE_BYTES); }
    Reals scale(int group, int which) const { return load_reals(scales + (size_t(group) * 2 + which) * BLOCK_OUTPUTS); }
};

inline void mix_lines(const uint8_t* stored, char* target) {
    Pairs v[EIGHT];
    for (int k = 0; k < FOURS; k++) {
        Pairs nibbles[2];
        split_nibbles(stored + k * LINE_BYTES, nibbles);
        v[2 * k] = add_bytes(nibbles[0], nibbles[1]);
        v[2 * k + 1] = subtract_bytes(nibbles[0], nibbles[1]);
    }
    for (int stride = 2; stride < EIGHT; stride *= 2)
        for (int index = 0; index < EIGHT; index++) {
            if (index & stride) continue;  // is the second of a pair
            const Pairs first = v[index], second = v[index + stride];
            v[index] = add_bytes(first, second);
            v[index + stride] = subtract_bytes(first, second);
        }
    for (int index = 0; index < EIGHT; index++)
        store_pairs(target + index * LINE_BYTES, index ? add_bytes(v[index], splat_byte(CENTRE)) : v[index]);
}

inline MixedBlock mix_block(const Int4Block& block, int groups) {
    const size_t bytes = size_t(groups) * MixedBlock::BYTES;
    char* memory = panel_memory(bytes + size_t(groups) * 2 * BLOCK_OUTPUTS * sizeof(float));
    float* scales = reinterpret_cast<float*>(memory + bytes);
    for (int group = 0; group < groups; group++) {
        mix_lines(block.lines + size_t(group) * Int4Block::BYTES, memory + size_t(group) * MixedBlock::BYTES);
        for (int which = 0; which < 2; which++) store_reals(scales + (size_t(group) * 2 + which) * BLOCK_OUTPUTS, block.scale(group, which));
    }
    return {memory, scales};
}

// out[r][o] of ROWS rows and one block, the floats in integer_tile's order.
template <int ROWS>
inline void mixed_tile(const MixedBlock& block, const MixedRows& rows, int row, float (*out)[BLOCK_OUTPUTS]) {
    Reals totals[ROWS];
    for (int r = 0; r < ROWS; r++) totals[r] = zero_reals();
    for (int group = 0; group < rows.layout.groups; group++) {
        MixedSums sums[ROWS];
        for (int r = 0; r < ROWS; r++) sums[r] = begin_sums(rows.starts(row + r)[group]);
#pragma GCC unroll 8
        for (int number = 0; number < EIGHT; number++) {
            const Pairs line = block.line(group, number);
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++) sums[r] = add_mixed(sums[r], line, rows.bytes(row + r) + group * GROUP + number * QUAD);
        }
        const Reals scale = block.scale(group, 0), offset = block.scale(group, 1);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
            const Reals whole = to_reals(end_sums(sums[r], rows.starts(row + r)[group]));
            totals[r] = fused(times(splat_real(rows.scales(row + r)[group]), scale), whole, totals[r]);
            totals[r] = fused(splat_real(rows.sums(row + r)[group]), offset, totals[r]);
        }
    }
    for (int r = 0; r < ROWS; r++) store_reals(out[r], totals[r]);
}

// As they are needed by few rows, whose weights are not worth mixing.
inline Rows widened(const MixedRows& rows, int count) {
    thread_local Buffer memory;
    const RowLayout layout(rows.layout.groups * GROUP);
    char* target = memory.take<char>(count * layout.bytes());
    for (int row = 0; row < count; row++) widen_mixed(rows, row, target + row * layout.bytes());
    return {target, layout};
}

inline void multiply_mixed(const uint8_t* values, const uint16_t* scales, const MixedRows& rows, int count, const Target& target) {
    if (count <= WIDENED_ROWS) return multiply_integer<Int4Block>(values, scales, widened(rows, count), count, target);
    for_each_block<Int4Block>(values, scales, rows.layout.groups, target, [&](const Int4Block& block, int first_output) {
        const MixedBlock mixed = mix_block(block, rows.layout.groups);
        cut_rows<INTEGER_ROWS>(count, [&](auto size, int row) {
            alignas(64) float tile[size][BLOCK_OUTPUTS];
            target.ask_for(row, size, first_output);
            mixed_tile<size>(mixed, rows, row, tile);
            target.take(tile, row, size, first_output);
        });
    });
}

}  // namespace tandem
