// Rows of floats as integers, ready for the integer products. A row's integers depend on nothing but the row.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "integers.h"

namespace tandem {

constexpr float LARGEST_INTEGER = 127.0f;
constexpr float SMALLEST_SPAN = 1e-30f;  // rows and groups that stay below count as zero: their scale's inverse must be finite

// What turns floats of at most `most` in magnitude into integers and back. NaN if a value is not finite: so is then all that comes of it.
struct Span {
    float scale, inverse;

    explicit Span(float most) : scale(most / LARGEST_INTEGER), inverse(LARGEST_INTEGER / most) {
        if (!(most <= std::numeric_limits<float>::max())) {
            scale = std::numeric_limits<float>::quiet_NaN();
            inverse = 0.0f;
        } else if (most < SMALLEST_SPAN) {
            scale = inverse = 0.0f;
        }
    }

    bool finite() const { return scale == scale; }
};

// The largest magnitude; above every float if any value is infinite or NaN, whose bits, taken as integers, are above those of the others.
inline float largest_magnitude(const float* x) {
    int32_t most = 0;
    for (int index = 0; index < GROUP; index++) most = std::max(most, load_word(x + index) & 0x7FFFFFFF);
    float value;
    std::memcpy(&value, &most, sizeof value);
    return value;
}

// A row made ready: integers from -127 to 127, a scale for each group, and each group's integers added up. Depths that are no multiple of a
// group are filled up with zeros.
struct RowLayout {
    int groups;
    size_t integer_bytes;

    RowLayout(int depth, size_t bytes_of_one) : groups((depth + GROUP - 1) / GROUP), integer_bytes(size_t(groups) * GROUP * bytes_of_one) {}

    size_t bytes() const { return (integer_bytes + size_t(groups) * 2 * sizeof(float) + 63) / 64 * 64; }
    float* scales(void* row) const { return reinterpret_cast<float*>(static_cast<char*>(row) + integer_bytes); }
};

// Quantises a group and returns its integers' sum. They are rounded to nearest, halves to even.
inline int32_t quantise_group(const float* x, float* scale, int32_t* integers) {
    const Span span(largest_magnitude(x));
    *scale = span.scale;
    if (!span.finite()) {
        std::fill_n(integers, GROUP, 0);
        return 0;
    }
    int32_t sum = 0;
    for (int index = 0; index < GROUP; index++) {
        integers[index] = int32_t(std::nearbyint(x[index] * span.inverse));
        sum += integers[index];
    }
    return sum;
}

// Calls take(group, scale, integers, their sum) for each group of a row.
template <class Take>
inline void each_group(const float* x, int depth, Take take) {
    for (int group = 0; group * GROUP < depth; group++) {
        const int have = std::min(GROUP, depth - group * GROUP);
        float padded[GROUP], scale;
        int32_t integers[GROUP];
        if (have < GROUP) std::fill(std::copy_n(x + group * GROUP, have, padded), padded + GROUP, 0.0f);
        const int32_t sum = quantise_group(have < GROUP ? padded : x + group * GROUP, &scale, integers);
        take(group, scale, integers, sum);
    }
}

// INT4's rows: int8 integers; sums are told times their scale, as float.
inline RowLayout int4_row(int depth) { return RowLayout(depth, 1); }

inline void quantise_int4(const float* x, int depth, void* row) {
    const RowLayout layout = int4_row(depth);
    int8_t* integers = static_cast<int8_t*>(row);
    float *scales = layout.scales(row), *sums = scales + layout.groups;
    each_group(x, depth, [=](int group, float scale, const int32_t* values, int32_t sum) {
        for (int index = 0; index < GROUP; index++) integers[group * GROUP + index] = int8_t(values[index]);
        scales[group] = scale;
        sums[group] = scale * float(sum);
    });
}

// INT8's rows: what add_products takes; what the sums of a group begin with, as int32.
inline RowLayout int8_row(int depth) { return RowLayout(depth, sizeof(Int8Input)); }

inline void quantise_int8(const float* x, int depth, void* row) {
    const RowLayout layout = int8_row(depth);
    Int8Input* integers = static_cast<Int8Input*>(row);
    float* scales = layout.scales(row);
    int32_t* beginnings = reinterpret_cast<int32_t*>(scales + layout.groups);
    each_group(x, depth, [=](int group, float scale, const int32_t* values, int32_t sum) {
        for (int index = 0; index < GROUP; index++)
            integers[group * GROUP + index] = Int8Input(values[index / QUAD * QUAD + INPUT_ORDER[index % QUAD]]);
        scales[group] = scale;
        beginnings[group] = -WEIGHT_OFFSET * sum;
    });
}

}  // namespace tandem
