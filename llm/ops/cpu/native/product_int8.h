// y = x W^T for weights in INT8: groups of 32 inputs with a scale each, and rows made by quantise_int8.
//
// values [blocks, groups, 8, 64] uint8: line j's byte 4 o + i is input 4 j + i of output o, plus 128. scales [blocks, groups, 16] float16.
// A group's sums are whole numbers, and groups are added in order, so results are the same in every tile and in every instruction set.
#pragma once

#include "quantise.h"
#include "tiles.h"

namespace tandem {

constexpr int GROUP_QUADS = GROUP / QUAD;

struct Int8Weights {
    const uint8_t* values;
    const uint16_t* scales;
    int groups;

    const uint8_t* block(int index) const { return values + size_t(index) * groups * GROUP_QUADS * LINE_BYTES; }
    const uint16_t* block_scales(int index) const { return scales + size_t(index) * groups * BLOCK_OUTPUTS; }
};

struct Int8Rows {
    const char* first;
    size_t stride;
    RowLayout layout;

    const char* row(int index) const { return first + index * stride; }
    const Int8Input* integers(int index) const { return reinterpret_cast<const Int8Input*>(row(index)); }
    const float* scales(int index) const { return reinterpret_cast<const float*>(row(index) + layout.integer_bytes); }
    const int32_t* beginnings(int index) const { return reinterpret_cast<const int32_t*>(scales(index) + layout.groups); }
};

// A block as it is stored, for few rows; and widened, for many.
struct StoredInt8 {
    const uint8_t* lines;
    const uint16_t* scales;

    WideLine line(int index) const { return widen_line(lines + size_t(index) * LINE_BYTES); }
    Reals scale(int group) const { return load_halves(scales + size_t(group) * BLOCK_OUTPUTS); }
};

struct WidenedInt8 {
    const char* lines;
    const float* scales;

    WideLine line(int index) const { return load_wide(lines + size_t(index) * WIDE_LINE_BYTES); }
    Reals scale(int group) const { return load_reals(scales + size_t(group) * BLOCK_OUTPUTS); }
};

inline WidenedInt8 widen_block(const Int8Weights& weights, int block) {
    const StoredInt8 stored{weights.block(block), weights.block_scales(block)};
    const size_t lines = size_t(weights.groups) * GROUP_QUADS;
    char* memory = panel_memory(lines * WIDE_LINE_BYTES + size_t(weights.groups) * BLOCK_OUTPUTS * sizeof(float));
    float* scales = reinterpret_cast<float*>(memory + lines * WIDE_LINE_BYTES);
    for (size_t index = 0; index < lines; index++) store_wide(memory + index * WIDE_LINE_BYTES, stored.line(int(index)));
    for (int group = 0; group < weights.groups; group++) store_reals(scales + size_t(group) * BLOCK_OUTPUTS, stored.scale(group));
    return {memory, scales};
}

// out[r][o] of ROWS rows and one block.
template <int ROWS, class Block>
inline void int8_tile(const Block& block, int groups, const Int8Rows& rows, int row, float (*out)[BLOCK_OUTPUTS]) {
    Reals totals[ROWS];
    for (int r = 0; r < ROWS; r++) totals[r] = zero_reals();
    for (int group = 0; group < groups; group++) {
        WideSums sums[ROWS];
        for (int r = 0; r < ROWS; r++) sums[r] = begin_sums(rows.beginnings(row + r)[group]);
#pragma GCC unroll 8
        for (int quad = 0; quad < GROUP_QUADS; quad++) {
            const WideLine line = block.line(group * GROUP_QUADS + quad);
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++) sums[r] = add_products(sums[r], line, rows.integers(row + r) + group * GROUP + quad * QUAD);
        }
        const Reals scale = block.scale(group);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++)
            totals[r] = fused(times(splat_real(rows.scales(row + r)[group]), scale), to_reals(sums[r]), totals[r]);
    }
    for (int r = 0; r < ROWS; r++) store_reals(out[r], totals[r]);
}

template <class Block>
inline void int8_rows(const Block& lines, int groups, const Int8Rows& rows, int count, int block, const Target& target) {
    cut_rows<INT8_TILE_ROWS>(count, [&](auto size, int row) {
        alignas(64) float tile[size][BLOCK_OUTPUTS];
        int8_tile<size>(lines, groups, rows, row, tile);
        target.take(tile, row, size, block * BLOCK_OUTPUTS);
    });
}

inline void multiply_int8(const Int8Weights& weights, const Int8Rows& rows, int count, const Target& target) {
    for (int block = target.first_block(); block < target.end_block(); block++)
        if (count <= INT8_TILE_ROWS)
            int8_rows(StoredInt8{weights.block(block), weights.block_scales(block)}, weights.groups, rows, count, block, target);
        else
            int8_rows(widen_block(weights, block), weights.groups, rows, count, block, target);
}

}  // namespace tandem
