// Rows of floats as integers, ready for the integer products. A row's integers depend on nothing but the row.
#pragma once

#include <algorithm>
#include <limits>

// Either has largest_magnitude and RoundedGroup. The former is above every float if any value is infinite or NaN: their bits, taken as
// integers, are above those of the others.
#if defined(TANDEM_PLAIN) || !defined(__AVX2__)
#include "round_plain.h"
#else
#include "round_avx2.h"
#endif

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

// A row made ready: integers from -127 to 127, a scale for each group, and each group's integers added up. Depths that are no multiple of a
// group are filled up with zeros.
struct RowLayout {
    int groups;
    size_t integer_bytes;

    RowLayout(int depth, size_t bytes_of_one) : groups((depth + GROUP - 1) / GROUP), integer_bytes(size_t(groups) * GROUP * bytes_of_one) {}

    size_t bytes() const { return (integer_bytes + size_t(groups) * 2 * sizeof(float) + 63) / 64 * 64; }
    float* scales(void* row) const { return reinterpret_cast<float*>(static_cast<char*>(row) + integer_bytes); }
};

// Calls take(group, scale, rounded integers) for each group of a row. Halves are rounded to even.
template <class Take>
inline void each_group(const float* x, int depth, Take take) {
    for (int group = 0; group * GROUP < depth; group++) {
        const int have = std::min(GROUP, depth - group * GROUP);
        const float* values = x + group * GROUP;
        float padded[GROUP];
        if (have < GROUP) {
            std::fill(std::copy_n(values, have, padded), padded + GROUP, 0.0f);
            values = padded;
        }
        const Span span(largest_magnitude(values));
        static constexpr float nothing[GROUP] = {};
        take(group, span.scale, RoundedGroup(span.finite() ? values : nothing, span.inverse));
    }
}

// INT4's rows: int8 integers; sums are told times their scale, as float.
inline RowLayout int4_row(int depth) { return RowLayout(depth, 1); }

inline void quantise_int4(const float* x, int depth, void* row) {
    const RowLayout layout = int4_row(depth);
    int8_t* integers = static_cast<int8_t*>(row);
    float *scales = layout.scales(row), *sums = scales + layout.groups;
    each_group(x, depth, [=](int group, float scale, const RoundedGroup& values) {
        values.store(integers + group * GROUP);
        scales[group] = scale;
        sums[group] = scale * float(values.sum());
    });
}

// INT8's rows: what add_products takes; what the sums of a group begin with, as int32.
inline RowLayout int8_row(int depth) { return RowLayout(depth, sizeof(Int8Input)); }

inline void quantise_int8(const float* x, int depth, void* row) {
    const RowLayout layout = int8_row(depth);
    Int8Input* integers = static_cast<Int8Input*>(row);
    float* scales = layout.scales(row);
    int32_t* beginnings = reinterpret_cast<int32_t*>(scales + layout.groups);
    each_group(x, depth, [=](int group, float scale, const RoundedGroup& values) {
        values.store(integers + group * GROUP);
        scales[group] = scale;
        beginnings[group] = -WEIGHT_OFFSET * values.sum();
    });
}

}  // namespace tandem
