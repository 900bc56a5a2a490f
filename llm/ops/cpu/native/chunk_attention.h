// Attention of a chunk of new tokens of one sequence over all of its tokens, causal.
#pragma once

#include <algorithm>
#include <cmath>

#include "batch.h"
#include "decode_attention.h"
#include "vector.h"

namespace tandem {

constexpr int TILE_ROWS = 48;                 // query rows (token times head of a group) computed together; a multiple of STRIP_ROWS
constexpr int STRIP_ROWS = 6;                 // rows of a product whose sums stay in registers
constexpr int STRIP_COLUMNS = 2 * LANES;      // its columns
constexpr int SPAN_TOKENS = 512;              // keys whose scores exist at one time; sums never change their order for it
constexpr int PART_TOKENS = 64;               // whose values are multiplied while they are in the first-level cache
static_assert(SPAN_TOKENS % STRIP_COLUMNS == 0 && TILE_ROWS % STRIP_ROWS == 0);

inline int padded_tokens(int length) { return (length + STRIP_COLUMNS - 1) / STRIP_COLUMNS * STRIP_COLUMNS; }

// out[STRIP_ROWS, width LANES] (+)= left[STRIP_ROWS, depth] right[depth, width LANES].
template <int WIDTH>
inline void multiply_strip(const float* left, size_t left_stride, const float* right, size_t right_stride, int depth, float* out,
                           size_t out_stride, bool add) {
    Floats sums[STRIP_ROWS][WIDTH] = {};
    if (add)
        for (int row = 0; row < STRIP_ROWS; row++)
            for (int i = 0; i < WIDTH; i++) sums[row][i] = load(out + row * out_stride + i * LANES);
    for (int k = 0; k < depth; k++) {
        Floats loaded[WIDTH];
#pragma GCC unroll 2
        for (int i = 0; i < WIDTH; i++) loaded[i] = load(right + k * right_stride + i * LANES);
#pragma GCC unroll 6
        for (int row = 0; row < STRIP_ROWS; row++)
#pragma GCC unroll 2
            for (int i = 0; i < WIDTH; i++) sums[row][i] += loaded[i] * left[row * left_stride + k];
    }
    for (int row = 0; row < STRIP_ROWS; row++)
        for (int i = 0; i < WIDTH; i++) store(out + row * out_stride + i * LANES, sums[row][i]);
}

// One sequence's chunk, with its K and V gathered into float32.
struct Chunk {
    int sequence, first_row, rows, start, length, padded;
    float* keys;    // [kv_heads, padded / STRIP_COLUMNS, head_dim, STRIP_COLUMNS]
    float* values;  // [kv_heads, padded, head_dim]

    Chunk(const Batch& batch, int index)
        : sequence(index),
          first_row(batch.row_starts[index]),
          rows(batch.rows_of(index)),
          start(batch.lengths[index] - rows),
          length(batch.lengths[index]),
          padded(padded_tokens(length)) {}

    int num_gathers(int kv_heads) const { return kv_heads * (padded / STRIP_COLUMNS); }
    int num_tiles(int group) const { return (rows * group + TILE_ROWS - 1) / TILE_ROWS; }
};

// Gathers STRIP_COLUMNS tokens of one kv head; what is beyond the end is zeroed.
template <class Kv>
void gather_strip(const Chunk& chunk, const Batch& batch, const Pool& pool, int layer, int task) {
    const int head = task % pool.kv_heads, first = task / pool.kv_heads * STRIP_COLUMNS, size = pool.head_dim;
    const int32_t* blocks = batch.block_ids + batch.block_starts[chunk.sequence];
    float* keys = chunk.keys + (size_t(head) * chunk.padded + first) * size;
    float* values = chunk.values + (size_t(head) * chunk.padded + first) * size;
    for (int t = 0; t < STRIP_COLUMNS; t++) {
        const int position = first + t;
        float* value = values + t * size;
        if (position >= chunk.length) {
            for (int column = 0; column < size; column++) keys[column * STRIP_COLUMNS + t] = value[column] = 0.0f;
            continue;
        }
        const int block = blocks[position / pool.block_tokens], offset = position % pool.block_tokens;
        const auto key = pool.tokens<const Kv>(block, layer, 0, head, offset), source = pool.tokens<const Kv>(block, layer, 1, head, offset);
        for (int column = 0; column < size; column++) keys[column * STRIP_COLUMNS + t] = widen(key.values[column]) * key.scale(0);
        for (int column = 0; column < size; column++) value[column] = widen(source.values[column]) * source.scale(0);
    }
}

// Scratch of one thread for one tile of queries.
struct Tile {
    float* queries;  // [TILE_ROWS, head_dim], scaled
    float* sums;     // [TILE_ROWS, head_dim]
    float* scores;   // [TILE_ROWS, SPAN_TOKENS]
    float peaks[TILE_ROWS], totals[TILE_ROWS];

    Tile(float* scratch, int head_dim)
        : queries(scratch), sums(scratch + TILE_ROWS * head_dim), scores(scratch + 2 * TILE_ROWS * head_dim) {}
};

inline size_t tile_scratch_floats(int head_dim) { return size_t(TILE_ROWS) * (2 * head_dim + SPAN_TOKENS); }

// Turns scores of `count` tokens into weights, and scales what was summed before if the peak has risen.
inline void soften_row(Tile& tile, int row, int count, int padded, int head_dim) {
    float* scores = tile.scores + row * SPAN_TOKENS;
    if (count <= 0) {
        std::fill(scores, scores + padded, 0.0f);
        return;
    }
    std::fill(scores + count, scores + padded, -INFINITY);
    Floats top = splat(tile.peaks[row]);
    for (int t = 0; t < padded; t += LANES) top = larger(top, load(scores + t));
    const float peak = highest(top);
    if (peak > tile.peaks[row]) {
        const float factor = exponential(tile.peaks[row] - peak);
        tile.totals[row] *= factor;
        for (int column = 0; column < head_dim; column++) tile.sums[row * head_dim + column] *= factor;
        tile.peaks[row] = peak;
    }
    Floats totals = {};
    for (int t = 0; t < padded; t += LANES) {
        Floats weights = exponential(load(scores + t) - peak);
        store(scores + t, weights);
        totals += weights;
    }
    std::fill(scores + count, scores + padded, 0.0f);
    tile.totals[row] += sum(totals);
}

// Adds the products of the weights from `part` on with that many tokens' values.
inline void add_values(Tile& tile, const float* values, int rows, int part, int tokens, int head_dim) {
    for (int column = 0; column < head_dim;) {
        const int width = column + STRIP_COLUMNS <= head_dim ? 2 : 1;
        for (int row = 0; row < rows; row += STRIP_ROWS) {
            const float* weights = tile.scores + row * SPAN_TOKENS + part;
            float* sums = tile.sums + row * head_dim + column;
            if (width == 2) multiply_strip<2>(weights, SPAN_TOKENS, values + column, head_dim, tokens, sums, head_dim, true);
            if (width == 1) multiply_strip<1>(weights, SPAN_TOKENS, values + column, head_dim, tokens, sums, head_dim, true);
        }
        column += width * LANES;
    }
}

// One span of keys: scores, weights, and their products with the values.
inline void attend_span(const Chunk& chunk, Tile& tile, int kv_head, int first, int used, int group, int begin, int end, int head_dim) {
    const int rows = (used + STRIP_ROWS - 1) / STRIP_ROWS * STRIP_ROWS, padded = padded_tokens(end - begin);
    const size_t base = size_t(kv_head) * chunk.padded + begin;
    for (int column = 0; column < padded; column += STRIP_COLUMNS)
        for (int row = 0; row < rows; row += STRIP_ROWS)
            multiply_strip<2>(tile.queries + row * head_dim, head_dim, chunk.keys + (base + column) * head_dim, STRIP_COLUMNS, head_dim,
                              tile.scores + row * SPAN_TOKENS + column, SPAN_TOKENS, false);
    for (int row = 0; row < used; row++) {
        const int visible = chunk.start + (first + row) / group + 1;
        soften_row(tile, row, std::min(visible, end) - begin, padded, head_dim);
    }
    for (int part = 0; part < end - begin; part += PART_TOKENS)
        add_values(tile, chunk.values + (base + part) * head_dim, rows, part, std::min(PART_TOKENS, end - begin - part), head_dim);
}

// One tile of queries of one kv head. qkv [n, qkv_stride], out [n, heads * head_dim], both of the whole batch.
inline void attend_tile(const Chunk& chunk, const Pool& pool, int task, int group, const float* qkv, size_t qkv_stride, float* out,
                        float* scratch) {
    const int size = pool.head_dim, num_rows = chunk.rows * group, num_tiles = chunk.num_tiles(group);
    const int kv_head = task % pool.kv_heads, first = (num_tiles - 1 - task / pool.kv_heads) * TILE_ROWS;  // the longest first
    const int used = std::min(TILE_ROWS, num_rows - first);
    const float scale = 1.0f / std::sqrt(float(size));
    Tile tile(scratch, size);
    std::fill(tile.queries, tile.queries + 2 * TILE_ROWS * size, 0.0f);
    for (int row = 0; row < used; row++) {
        const int token = chunk.first_row + (first + row) / group, head = kv_head * group + (first + row) % group;
        for (int column = 0; column < size; column++)
            tile.queries[row * size + column] = qkv[token * qkv_stride + head * size + column] * scale;
        tile.peaks[row] = -INFINITY;
        tile.totals[row] = 0.0f;
    }
    const int length = chunk.start + (first + used - 1) / group + 1;
    for (int begin = 0; begin < length; begin += SPAN_TOKENS)
        attend_span(chunk, tile, kv_head, first, used, group, begin, std::min(begin + SPAN_TOKENS, length), size);
    const size_t out_stride = size_t(pool.kv_heads) * group * size;
    for (int row = 0; row < used; row++) {
        const int token = chunk.first_row + (first + row) / group, head = kv_head * group + (first + row) % group;
        const float inverse = 1.0f / tile.totals[row];
        for (int column = 0; column < size; column++)
            out[token * out_stride + head * size + column] = tile.sums[row * size + column] * inverse;
    }
}

}  // namespace tandem
