// y = x W^T for weights in INT4: groups of 32 inputs with a scale and an offset each, and rows made by quantise_int4.
//
// values [blocks, groups, 4, 64] uint8: line j's byte 4 o + i holds input 8 j + i of output o in its low nibble, input 8 j + 4 + i in its
// high one. scales [blocks, groups, 2, 16] float16: scales, then offsets; a weight is scale * nibble + offset. A group's sums are whole
// numbers, and groups are added in order, so results are the same in every tile and in every instruction set.
#pragma once

#include "product_int8.h"

namespace tandem {

constexpr int GROUP_BYTES = BLOCK_OUTPUTS * GROUP / 2;

struct Int4Weights {
    const uint8_t* values;
    const uint16_t* scales;
    int groups;

    const uint8_t* block(int index) const { return values + size_t(index) * groups * GROUP_BYTES; }
    const uint16_t* block_scales(int index) const { return scales + size_t(index) * groups * 2 * BLOCK_OUTPUTS; }
};

struct Int4Rows {
    const char* first;
    size_t stride;
    RowLayout layout;

    const int8_t* integers(int row) const { return reinterpret_cast<const int8_t*>(first + row * stride); }
    const float* scales(int row) const { return reinterpret_cast<const float*>(first + row * stride + layout.integer_bytes); }
    const float* sums(int row) const { return scales(row) + layout.groups; }
};

// A block's weights, one byte each: lines [groups, 8, 64], and its scales and offsets [groups, 2, 16].
struct Unpacked {
    const uint8_t* lines;
    const float* scales;
};

inline Unpacked unpack_block(const Int4Weights& weights, int block) {
    const size_t bytes = size_t(weights.groups) * 2 * GROUP_BYTES;
    char* memory = panel_memory(bytes + size_t(weights.groups) * 2 * BLOCK_OUTPUTS * sizeof(float));
    float* scales = reinterpret_cast<float*>(memory + bytes);
    const uint8_t* packed = weights.block(block);
    for (size_t place = 0; place < bytes; place += 2 * LINE_BYTES, packed += LINE_BYTES) {
        const Line line = load_line(packed);
        store_line(memory + place, low_nibbles(line));
        store_line(memory + place + LINE_BYTES, high_nibbles(line));
    }
    const uint16_t* halves = weights.block_scales(block);
    for (int index = 0; index < 2 * weights.groups; index++)
        store_reals(scales + index * BLOCK_OUTPUTS, load_halves(halves + index * BLOCK_OUTPUTS));
    return {reinterpret_cast<const uint8_t*>(memory), scales};
}

// A block as it is stored, for few rows; and unpacked, for many.
struct PackedReader {
    const uint8_t* lines;
    const uint16_t* scales;

    void quads(int group, int pair, Line* two) const {
        const Line line = load_line(lines + size_t(group) * GROUP_BYTES + pair * LINE_BYTES);
        two[0] = low_nibbles(line);
        two[1] = high_nibbles(line);
    }
    Reals scale(int group, int which) const { return load_halves(scales + (size_t(group) * 2 + which) * BLOCK_OUTPUTS); }
};

struct UnpackedReader {
    Unpacked block;

    void quads(int group, int pair, Line* two) const {
        const uint8_t* place = block.lines + size_t(group) * 2 * GROUP_BYTES + pair * 2 * LINE_BYTES;
        two[0] = load_line(place);
        two[1] = load_line(place + LINE_BYTES);
    }
    Reals scale(int group, int which) const { return load_reals(block.scales + (size_t(group) * 2 + which) * BLOCK_OUTPUTS); }
};

// out[r][o] of ROWS rows and one block.
template <int ROWS, class Reader>
inline void int4_tile(const Reader& reader, int groups, const Int4Rows& rows, int row, float (*out)[BLOCK_OUTPUTS]) {
    Reals totals[ROWS];
    const int8_t* inputs[ROWS];
    for (int r = 0; r < ROWS; r++) inputs[r] = rows.integers(row + r);
    for (int r = 0; r < ROWS; r++) totals[r] = zero_reals();
    for (int group = 0; group < groups; group++) {
        Sums sums[ROWS];
        for (int r = 0; r < ROWS; r++) sums[r] = zero_sums();
#pragma GCC unroll 4
        for (int pair = 0; pair < GROUP_QUADS / 2; pair++) {
            Line two[2];
            reader.quads(group, pair, two);
#pragma GCC unroll 2
            for (int half = 0; half < 2; half++)
#pragma GCC unroll 8
                for (int r = 0; r < ROWS; r++)
                    sums[r] = add_dots(sums[r], two[half], splat_quad(inputs[r] + group * GROUP + (2 * pair + half) * QUAD));
        }
        const Reals scale = reader.scale(group, 0), offset = reader.scale(group, 1);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
            const Reals factor = times(splat_real(rows.scales(row + r)[group]), scale);
            totals[r] = fused(splat_real(rows.sums(row + r)[group]), offset, fused(factor, to_reals(sums[r]), totals[r]));
        }
    }
    for (int r = 0; r < ROWS; r++) store_reals(out[r], totals[r]);
}

template <class Reader>
inline void int4_rows(const Reader& reader, const Int4Weights& weights, const Int4Rows& rows, int count, int block, const Target& target) {
    cut_rows<INT4_TILE_ROWS>(count, [&](auto size, int row) {
        alignas(64) float tile[size][BLOCK_OUTPUTS];
        int4_tile<size>(reader, weights.groups, rows, row, tile);
        target.take(tile, row, size, block * BLOCK_OUTPUTS);
    });
}

inline void multiply_int4(const Int4Weights& weights, const Int4Rows& rows, int count, const Target& target) {
    for (int block = target.first_block(); block < target.end_block(); block++)
        if (count <= INT4_TILE_ROWS)
            int4_rows(PackedReader{weights.block(block), weights.block_scales(block)}, weights, rows, count, block, target);
        else
            int4_rows(UnpackedReader{unpack_block(weights, block)}, weights, rows, count, block, target);
}

}  // namespace tandem
