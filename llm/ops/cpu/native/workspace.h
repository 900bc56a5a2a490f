// Where a step's values lie between its phases.
#pragma once

#include <algorithm>

#include "buffer.h"
#include "chunk_attention.h"
#include "decode_attention_int8.h"
#include "model.h"

namespace tandem {

constexpr int FEW_ROWS = 64;       // up to here outputs alone are shared out, and each thread keeps its part of the weights
constexpr int GRAIN_OUTPUTS = 32;  // see `multiply`
constexpr int TILE_OUTPUTS = 96;
constexpr int LARGEST_TILE_ROWS = 256;

struct Workspace {
    float *x, *wanted_x, *delta, *qkv, *attended, *inner, *cosine, *sine, *partial, *keys, *values;
    char* input;  // rows made ready for the next product

    void lay_out(const Model& model, const Batch& batch, const DecodePlan& plan, int threads) {
        const size_t rows = batch.num_rows, half = model.head_dim / 2;
        x = memory_[0].take<float>(rows * model.hidden);
        wanted_x = memory_[1].take<float>(size_t(batch.num_logits) * model.hidden);
        delta = memory_[2].take<float>(rows * model.hidden);
        qkv = memory_[3].take<float>(rows * model.qkv_size());
        attended = memory_[4].take<float>(rows * model.query_size());
        inner = memory_[5].take<float>(rows * model.ffn);
        cosine = memory_[6].take<float>(2 * rows * half);
        sine = cosine + rows * half;
        partial = memory_[7].take<float>(size_t(plan.lines) * model.group() * (model.head_dim + 2));
        input = memory_[8].take<char>(rows * model.widest_input_bytes());
        const size_t gathered = gathered_tokens(batch) * model.kv_heads * model.head_dim;
        keys = memory_[9].take<float>(2 * gathered);
        values = keys + gathered;
        scratch_floats_ = scratch_floats(model, batch.num_rows);
        scratch_ = memory_[10].take<float>(threads * scratch_floats_);
    }

    // A thread's own memory, within one task.
    float* scratch(int thread) { return scratch_ + thread * scratch_floats_; }

   private:
    static size_t gathered_tokens(const Batch& batch) {
        int most = 0;
        for (int sequence = 0; sequence < batch.num_sequences; sequence++)
            if (batch.rows_of(sequence) > 1) most = std::max(most, padded_tokens(batch.lengths[sequence]));
        return most;
    }

    static size_t scratch_floats(const Model& model, int rows) {
        const int heads = std::max(MOST_HEADS, model.group());
        const size_t attention = std::max(IntegerScratch::floats(heads, heads, model.head_dim), tile_scratch_floats(model.head_dim));
        const size_t few = size_t(std::min(rows, FEW_ROWS)) * (model.ffn + 2 * GRAIN_OUTPUTS);  // one thread may compute all
        const size_t many = size_t(LARGEST_TILE_ROWS) * TILE_OUTPUTS;
        return (std::max({attention, few, many, size_t(model.hidden)}) + 15) / 16 * 16;
    }

    Buffer memory_[11];
    float* scratch_ = nullptr;
    size_t scratch_floats_ = 0;
};

}  // namespace tandem
