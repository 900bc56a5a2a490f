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
    int8_t values[GROUP];

    RoundedGroup(const float* x, float inverse) {
        for (int index = 0; index < GROUP; index++) values[index] = int8_t(std::nearbyint(x[index] * inverse));
    }

    int32_t sum() const {
        int32_t total = 0;
        for (int value : values) total += value;
        return total;
    }

    void store(int8_t* out) const { std::copy_n(values, GROUP, out); }
};

}  // namespace tandem
