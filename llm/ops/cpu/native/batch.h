// One step's rows and the pool that their K and V go to, as Python lays them out (llm/batch.py, llm/kv/pool.py).
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

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

// Tokens of one head's K or V in one block: [tokens, head_dim].
template <class Kv>
struct Tokens {
    Kv* values;
    float* scales;  // one for each token; only of int8_t

    float scale(int token) const {
        if constexpr (std::is_same_v<std::remove_const_t<Kv>, int8_t>) return scales[token];
        return 1.0f;
    }
};

// [blocks, layers, 2, kv_heads] times [block_tokens, head_dim], in INT8 followed by its [block_tokens] scales in float.
struct Pool {
    int32_t format;  // of matrix.h: FLOAT32, BFLOAT16 or INT8
    int32_t layers;
    int32_t kv_heads;
    int32_t block_tokens;
    int32_t head_dim;
    int32_t token_bytes;  // of one head's K or V, its scale included
    int64_t block_bytes;  // from one block to the next
    char* values;

    // A head's K (kind 0) or V (kind 1) of a block, from token `offset` on.
    template <class Kv>
    Tokens<Kv> tokens(int block, int layer, int kind, int head, int offset = 0) const {
        const size_t line = (size_t(layer) * 2 + kind) * kv_heads + head, numbers = size_t(block_tokens) * head_dim * sizeof(Kv);
        char* begin = values + block * block_bytes + line * block_tokens * token_bytes;
        return {reinterpret_cast<Kv*>(begin) + size_t(offset) * head_dim, reinterpret_cast<float*>(begin + numbers) + offset};
    }
};

}  // namespace tandem
