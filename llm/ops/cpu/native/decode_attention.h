// Attention of sequences with one new token. K and V are read where they lie.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "batch.h"
#include "product_float.h"
#include "vector.h"

namespace tandem {

// A sequence is split at fixed places, whatever the batch or the threads, so that its sums never change their order.
constexpr int SPLIT_TOKENS = 256;
constexpr int HEADS_AT_ONCE = 3;

// One kv head of one sequence's tokens begin <= t < begin + count.
struct DecodeTask {
    int sequence, row, kv_head, begin, count, partial;
};

// scores[h][t] = query[h] . keys[t], for the tokens of one block.
template <int HEADS, class Kv>
inline void score_block(const float* const* query, const Kv* keys, int count, int head_dim, float* scores, int stride) {
    for (int t = 0; t < count; t += 4) {
        const Kv* lines[4];
        for (int i = 0; i < 4; i++) lines[i] = keys + std::min(t + i, count - 1) * head_dim;
        float tile[4][HEADS];
        dot_tile<4, HEADS>(lines, query, head_dim, tile);
        for (int i = 0; i < 4 && t + i < count; i++)
            for (int h = 0; h < HEADS; h++) scores[h * stride + t + i] = tile[i][h];
    }
}

// WIDTH vectors of columns: sums[h] += scores[h][t] * values[t].
template <int HEADS, int WIDTH, class Kv>
inline void add_columns(const float* scores, int stride, const Kv* values, int count, int head_dim, float* sums) {
    Floats totals[HEADS][WIDTH];
#pragma GCC unroll 4
    for (int h = 0; h < HEADS; h++)
#pragma GCC unroll 4
        for (int i = 0; i < WIDTH; i++) totals[h][i] = load(sums + h * head_dim + i * LANES);
    for (int t = 0; t < count; t++) {
#pragma GCC unroll 4
        for (int i = 0; i < WIDTH; i++) {
            Floats value = load(values + t * head_dim + i * LANES);
#pragma GCC unroll 4
            for (int h = 0; h < HEADS; h++) totals[h][i] += value * scores[h * stride + t];
        }
    }
#pragma GCC unroll 4
    for (int h = 0; h < HEADS; h++)
#pragma GCC unroll 4
        for (int i = 0; i < WIDTH; i++) store(sums + h * head_dim + i * LANES, totals[h][i]);
}

// sums[h] += scores[h][t] * values[t], for the tokens of one block; head_dim is a multiple of LANES.
template <int HEADS, class Kv>
inline void add_block(const float* scores, int stride, const Kv* values, int count, int head_dim, float* sums) {
    int column = 0;
    for (; column + 4 * LANES <= head_dim; column += 4 * LANES)
        add_columns<HEADS, 4>(scores, stride, values + column, count, head_dim, sums + column);
    for (; column < head_dim; column += LANES)
        add_columns<HEADS, 1>(scores, stride, values + column, count, head_dim, sums + column);
}

// exp(scale * score - highest) in place; returns the highest and the sum. `scores` has room up to the next multiple of LANES.
struct Softened {
    float highest, total;
};

inline Softened soften(float* scores, int count, float scale) {
    int padded = (count + LANES - 1) / LANES * LANES;
    std::fill(scores + count, scores + padded, -INFINITY);
    Floats top = splat(-INFINITY);
    for (int t = 0; t < padded; t += LANES) top = larger(top, load(scores + t));
    float peak = highest(top) * scale;
    Floats totals = {};
    for (int t = 0; t < padded; t += LANES) {
        Floats weights = exponential(load(scores + t) * scale - peak);
        store(scores + t, weights);
        totals += weights;
    }
    std::fill(scores + count, scores + padded, 0.0f);
    return {peak, sum(totals)};
}

// Asks for all of a block's lines: the next block is on another page, which the hardware does not look ahead to.
template <class Kv>
inline void prefetch_block(const Kv* values, int count) {
    const char* first = reinterpret_cast<const char*>(values);
    for (size_t offset = 0; offset < count * sizeof(Kv); offset += 64) __builtin_prefetch(first + offset);
}

template <int HEADS, class Kv>
void attend_heads(const DecodeTask& task, const Batch& batch, const Pool& pool, int layer, const float* query, float* scores,
                  float* sums, Softened* softened) {
    const int size = pool.head_dim, block_tokens = pool.block_tokens;
    const Kv* values = static_cast<const Kv*>(pool.values);
    const int32_t* blocks = batch.block_ids + batch.block_starts[task.sequence];
    constexpr int STRIDE = SPLIT_TOKENS + LANES;
    const float* lines[HEADS];
    for (int h = 0; h < HEADS; h++) lines[h] = query + h * size;
    const auto lines_of = [&](int kind, int position) {
        return values + pool.place(blocks[position / block_tokens], layer, kind, task.kv_head) + position % block_tokens * size;
    };
    const auto each_block = [&](int kind, auto body) {
        for (int done = 0; done < task.count;) {
            const int position = task.begin + done;
            const int count = std::min(block_tokens - position % block_tokens, task.count - done);
            const int left = std::min(block_tokens, task.count - done - count);
            if (left > 0) prefetch_block(lines_of(kind, position + count), left * size);
            body(lines_of(kind, position), count, done);
            done += count;
        }
    };
    prefetch_block(lines_of(1, task.begin), std::min(block_tokens, task.count) * size);
    each_block(0, [&](const Kv* keys, int count, int done) { score_block<HEADS>(lines, keys, count, size, scores + done, STRIDE); });
    const float scale = 1.0f / std::sqrt(float(size));
    for (int h = 0; h < HEADS; h++) softened[h] = soften(scores + h * STRIDE, task.count, scale);
    std::fill(sums, sums + HEADS * size, 0.0f);
    each_block(1, [&](const Kv* block, int count, int done) { add_block<HEADS>(scores + done, STRIDE, block, count, size, sums); });
}

// Unscaled sums of a group's heads, then highest score and sum of weights: [group, head_dim + 2] into `partial`.
template <class Kv>
void attend_task(const DecodeTask& task, const Batch& batch, const Pool& pool, int layer, const float* query, int group, float* scratch,
                 float* partial) {
    const int size = pool.head_dim;
    float *scores = scratch, *sums = scratch + HEADS_AT_ONCE * (SPLIT_TOKENS + LANES);
    for (int head = 0; head < group; head += HEADS_AT_ONCE) {
        const int count = std::min(HEADS_AT_ONCE, group - head);
        const float* heads = query + head * size;
        Softened softened[HEADS_AT_ONCE];
        if (count == 3) attend_heads<3, Kv>(task, batch, pool, layer, heads, scores, sums, softened);
        if (count == 2) attend_heads<2, Kv>(task, batch, pool, layer, heads, scores, sums, softened);
        if (count == 1) attend_heads<1, Kv>(task, batch, pool, layer, heads, scores, sums, softened);
        for (int h = 0; h < count; h++) {
            float* line = partial + size_t(head + h) * (size + 2);
            std::copy(sums + h * size, sums + (h + 1) * size, line);
            line[size] = softened[h].highest;
            line[size + 1] = softened[h].total;
        }
    }
}

inline size_t decode_scratch_floats(int head_dim) { return HEADS_AT_ONCE * (SPLIT_TOKENS + LANES + head_dim); }

// Which task attends to what; made once a step and used by every layer.
struct DecodePlan {
    std::vector<DecodeTask> tasks;
    std::vector<int> first;   // by row: its first task, or -1 for rows of chunks; within, by split, then by kv head
    std::vector<int> splits;  // by row

    void make(const Batch& batch, int kv_heads) {
        tasks.clear();
        first.assign(batch.num_rows, -1);
        splits.assign(batch.num_rows, 0);
        for (int sequence = 0; sequence < batch.num_sequences; sequence++) {
            if (batch.rows_of(sequence) != 1) continue;
            const int row = batch.row_starts[sequence], length = batch.lengths[sequence];
            first[row] = int(tasks.size());
            for (int begin = 0; begin < length; begin += SPLIT_TOKENS, splits[row]++)
                for (int head = 0; head < kv_heads; head++)
                    tasks.push_back({sequence, row, head, begin, std::min(SPLIT_TOKENS, length - begin), int(tasks.size())});
        }
    }
};

// Joins the splits of one row: partial [splits, kv_heads, group, head_dim + 2] -> out [kv_heads * group, head_dim].
inline void combine_splits(const float* partial, int splits, int kv_heads, int group, int head_dim, float* out) {
    const size_t line = head_dim + 2, split_floats = size_t(kv_heads) * group * line;
    for (int head = 0; head < kv_heads * group; head++) {
        const float* lines = partial + head * line;
        float peak = -INFINITY, total = 0.0f;
        for (int split = 0; split < splits; split++) peak = std::max(peak, lines[split * split_floats + head_dim]);
        float* target = out + head * head_dim;
        std::fill(target, target + head_dim, 0.0f);
        for (int split = 0; split < splits; split++) {
            const float* part = lines + split * split_floats;
            const float factor = exponential(part[head_dim] - peak);
            total += factor * part[head_dim + 1];
            for (int column = 0; column < head_dim; column++) target[column] += factor * part[column];
        }
        const float inverse = 1.0f / total;
        for (int column = 0; column < head_dim; column++) target[column] *= inverse;
    }
}

}  // namespace tandem
