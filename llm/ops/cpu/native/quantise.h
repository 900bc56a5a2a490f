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

constexpr int LARGEST_INTEGER = 32767;  // 16 bits: 8 would cost a model with outliers among its activations 4 % of its likeliest tokens
constexpr float SMALLEST_SPAN = 1e-30f;  // rows and groups that stay below count as zero: their scale's inverse must be finite

// What turns floats of at most `most` in magnitude into integers and back. NaN if a value is not finite: so is then all that comes of it.
struct Span {
    float scale, inverse;

    explicit Span(float most, int largest = LARGEST_INTEGER) : scale(most / float(largest)), inverse(float(largest) / most) {
        if (!(most <= std::numeric_limits<float>::max())) {
            scale = std::numeric_limits<float>::quiet_NaN();
            inverse = 0.0f;
        } else if (most < SMALLEST_SPAN) {
            scale = inverse = 0.0f;
        }
    }

    bool finite() const { return scale == scale; }
};

// A row made ready: integers, each four in the order 0, 2, 1, 3; a scale for each group; each group's integers added up, times their scale.
// Depths that are no multiple of a group are filled up with zeros.
struct RowLayout {
    int groups;

    explicit RowLayout(int depth) : groups((depth + GROUP - 1) / GROUP) {}

    size_t integer_bytes() const { return size_t(groups) * GROUP * sizeof(int16_t); }
    size_t bytes() const { return (integer_bytes() + size_t(groups) * 2 * sizeof(float) + 63) / 64 * 64; }
};

struct Rows {
    const char* first;
    RowLayout layout;
    size_t stride = layout.bytes();

    const int16_t* integers(int row) const { return reinterpret_cast<const int16_t*>(first + row * stride); }
    const float* scales(int row) const { return reinterpret_cast<const float*>(first + row * stride + layout.integer_bytes()); }
    const float* sums(int row) const { return scales(row) + layout.groups; }
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

inline void quantise(const float* x, int depth, void* row) {
    const RowLayout layout(depth);
    int16_t* integers = static_cast<int16_t*>(row);
    float *scales = reinterpret_cast<float*>(integers + layout.groups * GROUP), *sums = scales + layout.groups;
    each_group(x, depth, [=](int group, float scale, const RoundedGroup& values) {
        values.store(integers + group * GROUP);
        scales[group] = scale;
        sums[group] = scale * float(values.sum());
    });
}

}  // namespace tandem
