// Decode attention over K and V in 8 bits, multiplied as whole numbers: queries and weights are rounded to 16 bits.
#pragma once

#include "decode_attention.h"
#include "integer_vectors.h"

namespace tandem {

constexpr int LARGEST_WEIGHT = 32767;
constexpr int LARGEST_KV = 127;
constexpr int MOST_HEAD_DIM = 512;
static_assert(int64_t(LARGEST_WEIGHT) * LARGEST_KV * SPLIT_TOKENS <= INT32_MAX, "a column's sum fits 32 bits");
static_assert(int64_t(LARGEST_INTEGER) * LARGEST_KV * MOST_HEAD_DIM <= INT32_MAX, "so does a score");

// scores[h][t] = query[h] . keys[t], for the tokens of one block; up to three scores behind them are overwritten. `query` has zeros up to
// the next multiple of WIDE, which is its stride.
template <int HEADS>
inline void score_block(const int16_t* query, const int8_t* keys, int count, int head_dim, int32_t* scores, Ahead& ahead) {
    const int stride = (head_dim + WIDE - 1) / WIDE * WIDE;
    for (int t = 0; t < count; t += 4) {
        ahead.ask(4 * (head_dim + sizeof(float)));
        const int8_t* lines[4];
        for (int i = 0; i < 4; i++) lines[i] = keys + std::min(t + i, count - 1) * head_dim;
        Words totals[HEADS][4] = {};
        const auto add = [&](int column, auto key_of) {
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                const Shorts key = key_of(lines[i] + column);
#pragma GCC unroll 4
                for (int h = 0; h < HEADS; h++) totals[h][i] = multiply_add(key, load(query + h * stride + column), totals[h][i]);
            }
        };
        int column = 0;
        for (; column + WIDE <= head_dim; column += WIDE) add(column, [](const int8_t* key) { return load(key); });
        if (column < head_dim) add(column, [=](const int8_t* key) { return load_part(key, head_dim - column); });
#pragma GCC unroll 4
        for (int h = 0; h < HEADS; h++) sum_four(totals[h][0], totals[h][1], totals[h][2], totals[h][3], scores + h * SCORES_STRIDE + t);
    }
}

// WIDTH vectors of columns: sums[h] += weights[h][t] * values[t], two tokens at once.
template <int HEADS, int WIDTH>
inline void add_columns(const int16_t* weights, const int8_t* values, int count, int head_dim, int32_t* sums, Ahead& ahead) {
    Words totals[HEADS][WIDTH];
#pragma GCC unroll 4
    for (int h = 0; h < HEADS; h++)
#pragma GCC unroll 4
        for (int i = 0; i < WIDTH; i++) totals[h][i] = load(sums + h * head_dim + i * LANES);
    const auto add = [&](const int8_t* first, const int8_t* second, auto pair_of) {
        Shorts pairs[HEADS];
#pragma GCC unroll 4
        for (int h = 0; h < HEADS; h++) pairs[h] = splat_pair(pair_of(weights + h * SCORES_STRIDE));
#pragma GCC unroll 4
        for (int i = 0; i < WIDTH; i++) {
            const Shorts value = interleave(first + i * LANES, second + i * LANES);
#pragma GCC unroll 4
            for (int h = 0; h < HEADS; h++) totals[h][i] = multiply_add(value, pairs[h], totals[h][i]);
        }
    };
    int t = 0;
    for (; t + 2 <= count; t += 2) {
        ahead.ask(2 * WIDTH * (LANES + sizeof(float)));
        const int8_t* line = values + t * head_dim;
        add(line, line + head_dim, [=](const int16_t* row) { return load_word(row + t); });
    }
    if (t < count) add(values + t * head_dim, values + t * head_dim, [=](const int16_t* row) { return int32_t(uint16_t(row[t])); });
#pragma GCC unroll 4
    for (int h = 0; h < HEADS; h++)
#pragma GCC unroll 4
        for (int i = 0; i < WIDTH; i++) store(sums + h * head_dim + i * LANES, totals[h][i]);
}

// sums[h] += weights[h][t] * values[t], for the tokens of one block.
template <int HEADS>
inline void add_block(const int16_t* weights, const int8_t* values, int count, int head_dim, int32_t* sums, Ahead& ahead) {
    int column = 0;
    for (; column + COLUMNS_AT_ONCE * LANES <= head_dim; column += COLUMNS_AT_ONCE * LANES)
        add_columns<HEADS, COLUMNS_AT_ONCE>(weights, values + column, count, head_dim, sums + column, ahead);
    for (; column + 2 * LANES <= head_dim; column += 2 * LANES)
        add_columns<HEADS, 2>(weights, values + column, count, head_dim, sums + column, ahead);
    if (column < head_dim) add_columns<HEADS, 1>(weights, values + column, count, head_dim, sums + column, ahead);
}

// scores[t] * scales[t], as floats in the same place.
inline void to_floats(float* scores, const float* scales, int count) {
    for (int t = 0; t < count; t += LANES) {
        const Words whole = load(reinterpret_cast<const int32_t*>(scores) + t);
        store(scores + t, __builtin_convertvector(whole, Floats) * load(scales + t));
    }
}

// One thread's memory for a task, by its heads: queries and weights as integers, scores and their weights, sums of columns; and by its kv
// heads the scales of its tokens.
struct IntegerScratch {
    int query_stride;
    float *scores, *scales;
    int32_t* sums;
    int16_t *queries, *weights;

    IntegerScratch(float* scratch, int heads, int kv_heads, int head_dim)
        : query_stride((head_dim + WIDE - 1) / WIDE * WIDE),
          scores(scratch),
          scales(scores + heads * SCORES_STRIDE),
          sums(reinterpret_cast<int32_t*>(scales + kv_heads * SCORES_STRIDE)),
          queries(reinterpret_cast<int16_t*>(sums + heads * head_dim)),
          weights(queries + heads * query_stride) {}

    // Enough for a task of any format.
    static size_t floats(int heads, int kv_heads, int head_dim) {
        return size_t(heads + kv_heads) * SCORES_STRIDE + size_t(heads) * (head_dim + (head_dim + WIDE) / 2 + SCORES_STRIDE / 2 + 1);
    }
};

// Each of the task's kv heads' scales, [num_heads, SCORES_STRIDE]; zeros behind the last.
inline void take_scales(const DecodeTask& task, const Chunks<int8_t>& chunks, float* scales) {
    chunks.each([=](int kv_head, Tokens<const int8_t> chunk, int done, int count, Ahead&) {
        std::copy_n(chunk.scales, count, scales + kv_head * SCORES_STRIDE + done);
    });
    for (int kv_head = 0; kv_head < task.num_heads; kv_head++)
        std::fill_n(scales + kv_head * SCORES_STRIDE + task.count, LANES, 0.0f);
}

// Weights times their tokens' scales, as integers; returns what they are to be multiplied with.
inline float to_weights(float* weights, const float* scales, int count, int16_t* integers) {
    const int padded = (count + LANES - 1) / LANES * LANES;
    for (int t = 0; t < padded; t += LANES) store(weights + t, load(weights + t) * load(scales + t));
    return to_integers<LARGEST_WEIGHT>(weights, padded, integers);
}

template <>
inline void attend_task<int8_t>(const DecodeTask& task, const Batch& batch, const Pool& pool, int layer, const float* query, int group,
                                float* scratch, float* partial) {
    const int size = pool.head_dim, heads = task.num_heads * group, line = size + 2;
    const IntegerScratch space(scratch, heads, task.num_heads, size);
    const Chunks<int8_t> keys(task, batch, pool, layer, 0), values(task, batch, pool, layer, 1);
    const auto row = [](auto* first, int head) { return first + head * SCORES_STRIDE; };
    std::fill_n(space.queries, heads * space.query_stride, 0);
    for (int head = 0; head < heads; head++)  // the scale waits where the sum of weights will be
        partial[head * line + size + 1] = to_integers<LARGEST_INTEGER>(query + head * size, size, space.queries + head * space.query_stride);
    const size_t to_values = size_t(pool.kv_heads) * pool.block_tokens * pool.token_bytes;
    keys.each([&](int kv_head, Tokens<const int8_t> chunk, int done, int count, Ahead& ahead) {
        __builtin_prefetch(reinterpret_cast<const char*>(chunk.scales) + to_values);
        each_few(group, [&]<int HEADS>(int first) {
            const int head = kv_head * group + first;
            score_block<HEADS>(space.queries + head * space.query_stride, chunk.values, count, size,
                               reinterpret_cast<int32_t*>(row(space.scores, head) + done), ahead);
        });
    });
    values.ask();
    take_scales(task, keys, space.scales);
    const float scale = 1.0f / std::sqrt(float(size));
    for (int head = 0; head < heads; head++) {
        to_floats(row(space.scores, head), row(space.scales, head / group), task.count);
        const Softened softened = soften(row(space.scores, head), task.count, scale * partial[head * line + size + 1]);
        partial[head * line + size] = softened.highest;
        partial[head * line + size + 1] = softened.total;
    }
    take_scales(task, values, space.scales);
    for (int head = 0; head < heads; head++)  // and this scale where the first column will be
        partial[head * line] = to_weights(row(space.scores, head), row(space.scales, head / group), task.count, row(space.weights, head));
    std::fill_n(space.sums, heads * size, 0);
    values.each([&](int kv_head, Tokens<const int8_t> chunk, int done, int count, Ahead& ahead) {
        each_few(group, [&]<int HEADS>(int first) {
            const int head = kv_head * group + first;
            add_block<HEADS>(row(space.weights, head) + done, chunk.values, count, size, space.sums + head * size, ahead);
        });
    });
    for (int head = 0; head < heads; head++) {
        const float factor = partial[head * line];
        for (int column = 0; column < size; column++) partial[head * line + column] = factor * float(space.sums[head * size + column]);
    }
}

}  // namespace tandem
