// Rounding a group of floats to integers, in plain C++.
#pragma once

#include <algorithm>
#include <cmath>

#include "integers.h"
#include "vector.h"

namespace tandem {

inline float largest_magnitude(const float* x) {
    int32_t most = 0;
    for (int index = 0; index < GROUP; index++) most = std::max(most, load_word(x + index) & 0x7FFFFFFF);
    float value;
    std::memcpy(&value, &most, sizeof value);
    return value;
}

inline float largest_magnitude(const Eight* x) {
    float values[GROUP];
    std::memcpy(values, x, sizeof values);
    return largest_magnitude(values);
}

struct RoundedGroup {
    int16_t values[GROUP];

    RoundedGroup(const float* x, float inverse) {
        for (int index = 0; index < GROUP; index++) values[index] = int16_t(std::nearbyint(x[index] * inverse));
    }

    int32_t sum() const {
        int32_t total = 0;
        for (int value : values) total += value;
        return total;
    }

    // Each four in the order 0, 2, 1, 3.
    void store(int16_t* out) const {
        for (int index = 0; index < GROUP; index++) out[(index & ~3) + (index & 1) * 2 + (index >> 1 & 1)] = values[index];
    }
};

template <class Vector>
inline Vector halves_swapped(Vector v) {
    return Vector{v[4], v[5], v[6], v[7], v[0], v[1], v[2], v[3]};
}

// 0, 2, 1, 3 of each four.
inline EightShorts fours_ordered(EightShorts v) { return EightShorts{v[0], v[2], v[1], v[3], v[4], v[6], v[5], v[7]}; }
inline EightShorts widen_eight(const int8_t* bytes) {
    EightShorts wide;
    for (int i = 0; i < 8; i++) wide[i] = bytes[i];
    return wide;
}

// 32 floats as bytes.
struct RoundedBytes {
    int8_t values[GROUP];

    RoundedBytes(const Eight* x, float inverse) {
        for (int index = 0; index < GROUP; index++) values[index] = int8_t(std::nearbyint(x[index / 8][index % 8] * inverse));
    }

    void store(int8_t* out) const { std::copy_n(values, GROUP, out); }
    PairSums squares() const {
        return added([](int value) { return value * value; });
    }
    PairSums sums() const {
        return added([](int value) { return value; });
    }
    int32_t first_four() const { return values[0] + values[1] + values[2] + values[3]; }

   private:
    template <class Make>
    PairSums added(Make make) const {
        int32_t totals[2] = {};
        for (int index = 0; index < GROUP; index++) totals[index >> 1 & 1] += make(values[index]);
        return {totals[0], totals[1]};
    }
};

}  // namespace tandem
