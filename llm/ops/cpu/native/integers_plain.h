// Plain C++, lane by lane.
#pragma once

namespace tandem {

constexpr int INTEGER_ROWS = 2;  // whose sums registers hold

// float32 of IEEE half, normal and subnormal; scales are never infinite.
inline float widen_half(uint16_t bits) {
    const uint32_t sign = uint32_t(bits & 0x8000) << 16, rest = uint32_t(bits & 0x7FFF) << 13;
    float magnitude;
    std::memcpy(&magnitude, &rest, sizeof magnitude);
    magnitude *= 0x1p112f;
    uint32_t word;
    std::memcpy(&word, &magnitude, sizeof word);
    word |= sign;
    std::memcpy(&magnitude, &word, sizeof word);
    return magnitude;
}

struct Sums {
    int32_t lanes[BLOCK_OUTPUTS];
};
struct Reals {
    float lanes[BLOCK_OUTPUTS];
};
struct Pairs {
    int16_t lanes[2 * BLOCK_OUTPUTS];
};

template <class Result, class Make>
inline Result each_lane(Make make) {
    Result result;
    for (int lane = 0; lane < BLOCK_OUTPUTS; lane++) result.lanes[lane] = make(lane);
    return result;
}

template <class Result>
inline Result copied(const void* source) {
    Result result;
    std::memcpy(&result, source, sizeof result);
    return result;
}

inline Pairs load_pairs(const void* source) { return copied<Pairs>(source); }
inline void store_pairs(void* target, Pairs value) { std::memcpy(target, &value, sizeof value); }

// A line's weights, of which make(byte) is one.
template <class Make>
inline void each_weight(const void* line, Pairs* two, Make make) {
    const auto* bytes = static_cast<const uint8_t*>(line);
    for (int place = 0; place < LINE_BYTES; place++) two[place % 2].lanes[place / 2] = int16_t(make(bytes[place]));
}

// From a line of bytes that have 128 added.
inline void widen_bytes(const void* line, Pairs* two) {
    each_weight(line, two, [](int byte) { return byte - 128; });
}

// From a line of two quads' nibbles.
inline void widen_nibbles(const void* line, Pairs* four) {
    each_weight(line, four, [](int byte) { return byte & 15; });
    each_weight(line, four + 2, [](int byte) { return byte >> 4; });
}

inline Sums zero_sums() { return Sums{}; }
inline Sums add_products(Sums sums, const Pairs& weights, const int16_t* two_inputs) {
    for (int lane = 0; lane < BLOCK_OUTPUTS; lane++)
        sums.lanes[lane] += weights.lanes[2 * lane] * two_inputs[0] + weights.lanes[2 * lane + 1] * two_inputs[1];
    return sums;
}

// A line's low nibbles and its high ones, as bytes.
inline void split_nibbles(const void* line, Pairs* two) {
    const auto* bytes = static_cast<const uint8_t*>(line);
    uint8_t low[LINE_BYTES], high[LINE_BYTES];
    for (int place = 0; place < LINE_BYTES; place++) low[place] = bytes[place] & 15, high[place] = bytes[place] >> 4;
    two[0] = copied<Pairs>(low);
    two[1] = copied<Pairs>(high);
}
template <class Join>
inline Pairs joined_bytes(const Pairs& a, const Pairs& b, Join join) {
    uint8_t left[LINE_BYTES], right[LINE_BYTES];
    store_pairs(left, a);
    store_pairs(right, b);
    for (int place = 0; place < LINE_BYTES; place++) left[place] = uint8_t(join(left[place], right[place]));
    return copied<Pairs>(left);
}
inline Pairs add_bytes(const Pairs& a, const Pairs& b) {
    return joined_bytes(a, b, [](int x, int y) { return x + y; });
}
inline Pairs subtract_bytes(const Pairs& a, const Pairs& b) {
    return joined_bytes(a, b, [](int x, int y) { return x - y; });
}
inline Pairs splat_byte(char value) {
    Pairs result;
    std::memset(&result, value, sizeof result);
    return result;
}

struct MixedStart {
    int32_t whole;

    MixedStart(int32_t first, int32_t second, int32_t rest) : whole(first + second + rest) {}
};
using MixedSums = Sums;
inline MixedSums begin_sums(const MixedStart& start) {
    return each_lane<Sums>([&](int) { return start.whole; });
}
inline MixedSums add_mixed(MixedSums sums, const Pairs& weights, const int8_t* four_inputs) {
    uint8_t bytes[LINE_BYTES];
    store_pairs(bytes, weights);
    for (int place = 0; place < LINE_BYTES; place++) sums.lanes[place / QUAD] += bytes[place] * four_inputs[place % QUAD];
    return sums;
}
inline Sums end_sums(const MixedSums& sums, const MixedStart&) { return sums; }

inline Reals zero_reals() { return Reals{}; }
inline Reals load_reals(const float* source) { return copied<Reals>(source); }
inline Reals load_halves(const uint16_t* source) {
    return each_lane<Reals>([&](int lane) { return widen_half(source[lane]); });
}
inline Reals splat_real(float value) {
    return each_lane<Reals>([&](int) { return value; });
}
inline Reals to_reals(Sums sums) {
    return each_lane<Reals>([&](int lane) { return float(sums.lanes[lane]); });
}
inline Reals times(Reals a, Reals b) {
    return each_lane<Reals>([&](int lane) { return a.lanes[lane] * b.lanes[lane]; });
}
inline Reals fused(Reals a, Reals b, Reals c) {
    return each_lane<Reals>([&](int lane) { return __builtin_fmaf(a.lanes[lane], b.lanes[lane], c.lanes[lane]); });
}
inline void store_reals(float* target, Reals value) { std::memcpy(target, &value, sizeof value); }

}  // namespace tandem
