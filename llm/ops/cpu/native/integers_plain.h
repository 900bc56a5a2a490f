// Plain C++, lane by lane.
#pragma once

namespace tandem {


constexpr int INT8_TILE_ROWS = 2, INT4_TILE_ROWS = 2;  // whose sums registers hold

// float32 of IEEE half, normal and subnormal; scales are never infinite.
inline float widen_half(uint16_t bits) {
    const uint32_t sign = uint32_t(bits & 0x8000) << 16, rest = uint32_t(bits & 0x7FFF) << 13;
    float magnitude;
    std::memcpy(&magnitude, &rest, sizeof magnitude);
    magnitude *= 0x1p112f;
    uint32_t word;
    std::memcpy(&word, &magnitude, sizeof word);
    word |= sign;
    std::memcpy(&magnitude, &word, sizeof magnitude);
    return magnitude;
}

struct Sums {
    int32_t lanes[16];
};
using Line = Sums;

struct Reals {
    float lanes[16];
};

template <class Result, class Make>
inline Result each_lane(Make make) {
    Result result;
    for (int lane = 0; lane < 16; lane++) result.lanes[lane] = make(lane);
    return result;
}

template <class Result>
inline Result copied(const void* source) {
    Result result;
    std::memcpy(&result, source, sizeof result);
    return result;
}

inline Sums zero_sums() { return Sums{}; }
inline Sums load_line(const void* line) { return copied<Sums>(line); }
inline Sums splat_quad(const void* quad) {
    return each_lane<Sums>([word = load_word(quad)](int) { return word; });
}
inline Sums add_dots(Sums sums, Sums unsigned_bytes, Sums signed_bytes) {
    return each_lane<Sums>([&](int lane) {
        int32_t total = 0;
        for (int byte = 0; byte < 32; byte += 8)
            total += int32_t(uint8_t(uint32_t(unsigned_bytes.lanes[lane]) >> byte)) * int8_t(uint32_t(signed_bytes.lanes[lane]) >> byte);
        return int32_t(uint32_t(sums.lanes[lane]) + uint32_t(total));
    });
}
inline Sums low_nibbles(Sums line) {
    return each_lane<Sums>([&](int lane) { return line.lanes[lane] & 0x0F0F0F0F; });
}
inline Sums high_nibbles(Sums line) {
    return each_lane<Sums>([&](int lane) { return int32_t(uint32_t(line.lanes[lane]) >> 4 & 0x0F0F0F0F); });
}
inline void store_line(void* line, Sums value) { std::memcpy(line, &value, sizeof value); }

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

// INT8: weights are bytes that have WEIGHT_OFFSET added, which a group's sums begin with taken away.
using Int8Input = int8_t;
constexpr int WEIGHT_OFFSET = 128;
using WideSums = Sums;
using WideLine = Line;
constexpr int WIDE_LINE_BYTES = LINE_BYTES;

inline WideSums begin_sums(int32_t beginning) { return each_lane<Sums>([&](int) { return beginning; }); }
inline WideLine load_wide(const void* line) { return load_line(line); }
inline WideLine widen_line(const void* line) { return load_line(line); }
inline void store_wide(void* line, WideLine value) { store_line(line, value); }
inline WideSums add_products(WideSums sums, const WideLine& line, const Int8Input* inputs) { return add_dots(sums, line, splat_quad(inputs)); }

}  // namespace tandem
