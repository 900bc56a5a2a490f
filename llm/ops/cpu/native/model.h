// A model's weights, as Python's structures of the same names lay them out (structures.py).
#pragma once

#include "matrix.h"

namespace tandem {

struct Layer {
    const float* attention_norm;
    const float* query_norm;  // or null
    const float* key_norm;    // or null
    const float* qkv_bias;    // or null
    const float* ffn_norm;
    Matrix qkv, output, gate_up, down;  // gate_up: the gate's outputs first
};

struct Model {
    int32_t num_layers, hidden, heads, kv_heads, head_dim, ffn;
    float eps;
    int32_t embedding_format;  // FLOAT32 or BFLOAT16
    const void* embedding;     // [vocab, hidden]
    const float* frequencies;  // [head_dim / 2]
    const float* norm;
    const Layer* layers;
    Matrix head;

    int qkv_size() const { return (heads + 2 * kv_heads) * head_dim; }
    int query_size() const { return heads * head_dim; }
    int group() const { return heads / kv_heads; }

    size_t widest_input_bytes() const {
        size_t most = input_row_bytes(head);
        for (int index = 0; index < num_layers; index++)
            for (const Matrix* matrix : {&layers[index].qkv, &layers[index].output, &layers[index].gate_up, &layers[index].down})
                most = most < input_row_bytes(*matrix) ? input_row_bytes(*matrix) : most;
        return most;
    }
};

}  // namespace tandem
