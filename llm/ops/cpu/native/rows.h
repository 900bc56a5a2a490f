// What is done to one row at a time: RMSNorm, SiLU, RoPE with the write of K and V.
#pragma once

#include <cmath>

#include "batch.h"
#include "vector.h"

namespace tandem {

// out = x / sqrt(mean(x^2) + eps) * weight. `out` may be `x`.
inline void rms_norm(const float* x, const float* weight, float eps, int size, float* out) {
    Floats totals = {};
    int index = 0;
    for (; index + LANES <= size; index += LANES) totals += load(x + index) * load(x + index);
    float total = sum(totals);
    for (; index < size; index++) total += x[index] * x[index];
    const float factor = 1.0f / std::sqrt(total / size + eps);
    for (index = 0; index < size; index++) out[index] = x[index] * factor * weight[index];
}

inline void add(const float* delta, int size, float* x) {
    for (int index = 0; index < size; index++) x[index] += delta[index];
}

// gate = silu(gate) * up
inline void silu_mul(float* gate, const float* up, int size) {
    int index = 0;
    for (; index + LANES <= size; index += LANES) {
        Floats value = load(gate + index);
        store(gate + index, value / (exponential(-value) + 1.0f) * load(up + index));
    }
    for (; index < size; index++) gate[index] = gate[index] / (1.0f + exponential(-gate[index])) * up[index];
}

// cos and sin of a row's angles, [head_dim / 2] each. Angles are taken in double: in float they are off by 1e-3 at 10,000 tokens.
inline void make_rotation(const float* frequencies, int position, int half, float* cosine, float* sine) {
    for (int index = 0; index < half; index++) {
        const double angle = double(position) * double(frequencies[index]);
        cosine[index] = float(std::cos(angle));
        sine[index] = float(std::sin(angle));
    }
}

// Turns a head in place; value pairs are (i, i + half).
inline void rotate(float* head, const float* cosine, const float* sine, int half) {
    for (int index = 0; index < half; index++) {
        const float first = head[index], second = head[half + index];
        head[index] = first * cosine[index] - second * sine[index];
        head[half + index] = second * cosine[index] + first * sine[index];
    }
}

template <class Kv>
inline void write_kv(const float* keys, const float* values, const Pool& pool, int layer, int block, int offset) {
    Kv* stored = static_cast<Kv*>(pool.values);
    const int size = pool.head_dim;
    for (int head = 0; head < pool.kv_heads; head++) {
        Kv* key = stored + pool.place(block, layer, 0, head) + offset * size;
        Kv* value = stored + pool.place(block, layer, 1, head) + offset * size;
        for (int column = 0; column < size; column++) narrow(keys[head * size + column], key + column);
        for (int column = 0; column < size; column++) narrow(values[head * size + column], value + column);
    }
}

}  // namespace tandem
