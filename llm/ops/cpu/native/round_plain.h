// Rounding a group of floats to integers, in plain C++.
#pragma once

#include <algorithm>
#include <cmath>

#include "integers.h"

namespace tandem {

inline float largest_magnitude(const float* x) {
    int32_t most = 0;
    for (int index = 0; index < GROUP; index++) most = std::max(most, load_word(x + index) & 0x7FFFFFFF);
    float value;
    std::memcpy(&value, &most, sizeof value);
    return value;
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

}  // namespace tandem
