// What is done to one row at a time: RMSNorm, SiLU, RoPE with the write of K and V.
#pragma once

#include <cmath>

#include "batch.h"
#include "integer_vectors.h"
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

// A Hadamard transform of eight values.
inline Eight mixed(Eight x) {
    x = Eight{x[1], x[0], x[3], x[2], x[5], x[4], x[7], x[6]} + x * Eight{1, -1, 1, -1, 1, -1, 1, -1};
    x = Eight{x[2], x[3], x[0], x[1], x[6], x[7], x[4], x[5]} + x * Eight{1, 1, -1, -1, 1, 1, -1, -1};
    return Eight{x[4], x[5], x[6], x[7], x[0], x[1], x[2], x[3]} + x * Eight{1, 1, 1, 1, -1, -1, -1, -1};
}

// A Hadamard transform in place, of each 2^n values of a head, where its size is an odd multiple of 2^n. Dot products of mixed heads are
// what they were before, and a value that stands out no longer costs all others their resolution in 8 bits.
inline void mix(float* head, int size) {
    const int span = size & -size;
    const float factor = 1.0f / std::sqrt(float(span));
    Eight first, second;
    for (int index = 0; index < size; index += 8) {
        std::memcpy(&first, head + index, sizeof first);
        first = mixed(first) * factor;
        std::memcpy(head + index, &first, sizeof first);
    }
    for (int stride = 8; stride < span; stride *= 2)
        for (int index = 0; index < size; index += 8) {
            if (index & stride) continue;  // is the second of a pair
            std::memcpy(&first, head + index, sizeof first);
            std::memcpy(&second, head + index + stride, sizeof second);
            const Eight sum = first + second, difference = first - second;
            std::memcpy(head + index, &sum, sizeof sum);
            std::memcpy(head + index + stride, &difference, sizeof difference);
        }
}

// One head's K or V as it is kept.
template <class Kv>
inline void keep(const float* values, int size, Tokens<Kv> kept) {
    for (int column = 0; column < size; column++) narrow(values[column], kept.values + column);
}

inline void keep(const float* values, int size, Tokens<int8_t> kept) { *kept.scales = to_integers<127>(values, size, kept.values); }

template <class Kv>
inline void write_kv(const float* keys, const float* values, const Pool& pool, int layer, int block, int offset) {
    const int size = pool.head_dim;
    for (int head = 0; head < pool.kv_heads; head++) {
        keep(keys + head * size, size, pool.tokens<Kv>(block, layer, 0, head, offset));
        keep(values + head * size, size, pool.tokens<Kv>(block, layer, 1, head, offset));
    }
}

}  // namespace tandem
