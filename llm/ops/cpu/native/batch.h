// One step's rows and the pool that their K and V go to, as Python lays them out (llm/batch.py, llm/kv/pool.py).
#pragma once

#include <cstddef>
#include <cstdint>

namespace tandem {

struct Batch {
    int32_t num_rows;
    int32_t num_sequences;
    int32_t num_logits;
    int32_t unused;
    const int64_t* token_ids;
    const int32_t* positions;
    const int32_t* row_blocks;
    const int32_t* row_offsets;
    const int32_t* row_starts;
    const int32_t* lengths;
    const int32_t* block_ids;
    const int32_t* block_starts;
    const int64_t* logits_rows;

    int rows_of(int sequence) const { return row_starts[sequence + 1] - row_starts[sequence]; }
};

// [blocks, layers, 2, kv_heads, block_tokens, head_dim]
struct Pool {
    int32_t format;  // of matrix.h: FLOAT32 or BFLOAT16
    int32_t layers;
    int32_t kv_heads;
    int32_t block_tokens;
    int32_t head_dim;
    int32_t unused;
    void* values;

    // Where a head's K (kind 0) or V (kind 1) of a block begins: [block_tokens, head_dim].
    size_t place(int block, int layer, int kind, int head) const {
        size_t line = ((size_t(block) * layers + layer) * 2 + kind) * kv_heads + head;
        return line * block_tokens * head_dim;
    }
};

}  // namespace tandem
