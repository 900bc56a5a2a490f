// Attention of sequences with one new token. K and V are read where they lie.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "batch.h"
#include "vector.h"

namespace tandem {

// A sequence is split at fixed places, whatever the batch or the threads, so that its sums never change their order.
constexpr int SPLIT_TOKENS = 256;
constexpr int SCORES_STRIDE = SPLIT_TOKENS + LANES;  // room behind the last score, for whole vectors and for four tokens at once
constexpr int HEADS_AT_ONCE = 3;                     // of one group; with the next, as many sums as there are registers for
constexpr int COLUMNS_AT_ONCE = 4;                   // vectors of them
constexpr int MOST_HEADS = 16;                       // of one task, if a group has no more: their scores stay in the first-level cache
constexpr int FEWEST_TASKS = 4;                      // for each thread

// kv heads first_head <= h < first_head + num_heads of one sequence's tokens begin <= t < begin + count. `line`: which line of partial
// sums is the first head's.
struct DecodeTask {
    int sequence, row, begin, count, first_head, num_heads, line;
};

// What is used soon, asked for bit by bit: as much as the caches take at once would hold up what is computed meanwhile.
class Ahead {
   public:
    Ahead(const void* begin, size_t bytes) : next_(static_cast<const char*>(begin)), end_(next_ + bytes) {}

    void ask(size_t bytes) {
        for (const char* until = std::min(next_ + bytes, end_); next_ < until; next_ += 64) __builtin_prefetch(next_);
    }

   private:
    const char *next_, *end_;
};

// scores[h][t] = query[h] . keys[t], for the tokens of one block; up to three scores behind them are overwritten.
template <int HEADS, class Kv>
inline void score_block(const float* query, const Kv* keys, int count, int head_dim, float* scores, Ahead& ahead) {
    for (int t = 0; t < count; t += 4) {
        ahead.ask(4 * head_dim * sizeof(Kv));
        const Kv* lines[4];
        for (int i = 0; i < 4; i++) lines[i] = keys + std::min(t + i, count - 1) * head_dim;
        Floats totals[HEADS][4] = {};
        for (int column = 0; column < head_dim; column += LANES) {
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                const Floats key = load(lines[i] + column);
#pragma GCC unroll 4
                for (int h = 0; h < HEADS; h++) totals[h][i] = multiply_add(key, load(query + h * head_dim + column), totals[h][i]);
            }
        }
#pragma GCC unroll 4
        for (int h = 0; h < HEADS; h++) sum_four(totals[h][0], totals[h][1], totals[h][2], totals[h][3], scores + h * SCORES_STRIDE + t);
    }
}

// WIDTH vectors of columns: sums[h] += scores[h][t] * values[t].
template <int HEADS, int WIDTH, class Kv>
inline void add_columns(const float* scores, const Kv* values, int count, int head_dim, float* sums, Ahead& ahead) {
    Floats totals[HEADS][WIDTH];
#pragma GCC unroll 4
    for (int h = 0; h < HEADS; h++)
#pragma GCC unroll 4
        for (int i = 0; i < WIDTH; i++) totals[h][i] = load(sums + h * head_dim + i * LANES);
    for (int t = 0; t < count; t++) {
        ahead.ask(WIDTH * LANES * sizeof(Kv));
        Floats weights[HEADS];
#pragma GCC unroll 4
        for (int h = 0; h < HEADS; h++) weights[h] = splat(scores[h * SCORES_STRIDE + t]);
#pragma GCC unroll 4
        for (int i = 0; i < WIDTH; i++) {
            const Floats value = load(values + t * head_dim + i * LANES);
#pragma GCC unroll 4
            for (int h = 0; h < HEADS; h++) totals[h][i] = multiply_add(value, weights[h], totals[h][i]);
        }
    }
#pragma GCC unroll 4
    for (int h = 0; h < HEADS; h++)
#pragma GCC unroll 4
        for (int i = 0; i < WIDTH; i++) store(sums + h * head_dim + i * LANES, totals[h][i]);
}

// sums[h] += scores[h][t] * values[t], for the tokens of one block; head_dim is a multiple of LANES.
template <int HEADS, class Kv>
inline void add_block(const float* scores, const Kv* values, int count, int head_dim, float* sums, Ahead& ahead) {
    int column = 0;
    for (; column + COLUMNS_AT_ONCE * LANES <= head_dim; column += COLUMNS_AT_ONCE * LANES)
        add_columns<HEADS, COLUMNS_AT_ONCE>(scores, values + column, count, head_dim, sums + column, ahead);
    for (; column + 2 * LANES <= head_dim; column += 2 * LANES)
        add_columns<HEADS, 2>(scores, values + column, count, head_dim, sums + column, ahead);
    if (column < head_dim) add_columns<HEADS, 1>(scores, values + column, count, head_dim, sums + column, ahead);
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

// A task's K or V in the order in which they lie in memory: of each block, one chunk [tokens, head_dim] for each of its heads.
template <class Kv>
class Chunks {
   public:
    Chunks(const DecodeTask& task, const Batch& batch, const Pool& pool, int layer, int kind)
        : task_(task), pool_(pool), blocks_(batch.block_ids + batch.block_starts[task.sequence]), layer_(layer), kind_(kind) {}

    // Calls use(head, chunk, tokens of the task before it, its tokens, the same head's chunk of the next block).
    template <class Use>
    void each(Use use) const {
        for (Span span = span_at(task_.begin); span.count > 0;) {
            const Span next = span_at(span.position + span.count);
            for (int head = 0; head < task_.num_heads; head++) {
                Ahead ahead = ahead_of(next, head);
                use(head, at(span, head), span.position - task_.begin, span.count, ahead);
            }
            span = next;
        }
    }

    // All of the first block's.
    void ask() const {
        const Span span = span_at(task_.begin);
        for (int head = 0; head < task_.num_heads; head++) ahead_of(span, head).ask(SIZE_MAX / 2);
    }

   private:
    struct Span {
        int position, count, block, offset;
    };

    // The task's tokens of one block from `position` on; none at the end.
    Span span_at(int position) const {
        const int left = task_.begin + task_.count - position;
        if (left <= 0) return {position, 0, 0, 0};
        const int offset = position % pool_.block_tokens;
        return {position, std::min(pool_.block_tokens - offset, left), blocks_[position / pool_.block_tokens], offset};
    }

    Tokens<const Kv> at(const Span& span, int head) const {
        return pool_.tokens<const Kv>(span.block, layer_, kind_, task_.first_head + head, span.offset);
    }

    Ahead ahead_of(const Span& span, int head) const {
        return {at(span, head).values, size_t(span.count) * pool_.token_bytes};
    }

    const DecodeTask& task_;
    const Pool& pool_;
    const int32_t* blocks_;
    const int layer_, kind_;
};

// Calls use.operator()<HEADS>(first) for a group's heads, at most HEADS_AT_ONCE together.
template <class Use>
inline void each_few(int group, Use use) {
    for (int head = 0; head < group; head += HEADS_AT_ONCE) {
        if (group - head >= 3) use.template operator()<3>(head);
        if (group - head == 2) use.template operator()<2>(head);
        if (group - head == 1) use.template operator()<1>(head);
    }
}

// Unscaled sums of each of a task's heads, then highest score and sum of weights: [num_heads * group, head_dim + 2] into `partial`.
// `query` [num_heads * group, head_dim]: the task's part of its row.
template <class Kv>
void attend_task(const DecodeTask& task, const Batch& batch, const Pool& pool, int layer, const float* query, int group, float* scratch,
                 float* partial) {
    const int size = pool.head_dim, heads = task.num_heads * group;
    float *scores = scratch, *sums = scores + heads * SCORES_STRIDE;
    const Chunks<Kv> keys(task, batch, pool, layer, 0), values(task, batch, pool, layer, 1);
    keys.each([&](int kv_head, Tokens<const Kv> chunk, int done, int count, Ahead& ahead) {
        each_few(group, [&]<int HEADS>(int first) {
            const int head = kv_head * group + first;
            score_block<HEADS>(query + head * size, chunk.values, count, size, scores + head * SCORES_STRIDE + done, ahead);
        });
    });
    values.ask();
    const float scale = 1.0f / std::sqrt(float(size));
    for (int head = 0; head < heads; head++) {
        const Softened softened = soften(scores + head * SCORES_STRIDE, task.count, scale);
        partial[head * (size + 2) + size] = softened.highest;
        partial[head * (size + 2) + size + 1] = softened.total;
    }
    std::fill(sums, sums + heads * size, 0.0f);
    values.each([&](int kv_head, Tokens<const Kv> chunk, int done, int count, Ahead& ahead) {
        each_few(group, [&]<int HEADS>(int first) {
            const int head = kv_head * group + first;
            add_block<HEADS>(scores + head * SCORES_STRIDE + done, chunk.values, count, size, sums + head * size, ahead);
        });
    });
    for (int head = 0; head < heads; head++) std::copy_n(sums + head * size, size, partial + head * (size + 2));
}

// Which task attends to what; made once a step and used by every layer. A head's sums do not depend on the other heads of its task.
struct DecodePlan {
    std::vector<DecodeTask> tasks;
    std::vector<int> first;   // by row: its first line of partial sums, or -1 for rows of chunks; within, by split, then by kv head
    std::vector<int> splits;  // by row
    int lines;                // each [group, head_dim + 2]

    // All heads of a split are one task, which reads memory in order, where that leaves enough of them for all threads.
    void make(const Batch& batch, int kv_heads, int group, int threads) {
        first.assign(batch.num_rows, -1);
        splits.assign(batch.num_rows, 0);
        int total = 0;
        for (int sequence = 0; sequence < batch.num_sequences; sequence++) {
            if (batch.rows_of(sequence) != 1) continue;
            const int row = batch.row_starts[sequence];
            first[row] = total * kv_heads;
            total += splits[row] = (batch.lengths[sequence] + SPLIT_TOKENS - 1) / SPLIT_TOKENS;
        }
        lines = total * kv_heads;
        const int most = std::clamp(MOST_HEADS / group, 1, kv_heads);
        deal(batch, kv_heads, total * ((kv_heads + most - 1) / most) >= FEWEST_TASKS * threads ? most : 1);
    }

   private:
    void deal(const Batch& batch, int kv_heads, int heads) {
        tasks.clear();
        for (int sequence = 0; sequence < batch.num_sequences; sequence++) {
            const int row = batch.row_starts[sequence], length = batch.lengths[sequence];
            for (int split = 0; split < splits[row]; split++)
                for (int head = 0; head < kv_heads; head += heads)
                    tasks.push_back({sequence, row, split * SPLIT_TOKENS, std::min(SPLIT_TOKENS, length - split * SPLIT_TOKENS), head,
                                     std::min(heads, kv_heads - head), first[row] + split * kv_heads + head});
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
