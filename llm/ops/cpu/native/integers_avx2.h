// AVX2, which can multiply unsigned by signed bytes only into 16 bits: enough for a group of nibbles, no more.
#pragma once

#include <immintrin.h>

namespace tandem {


constexpr int INT8_TILE_ROWS = 4, INT4_TILE_ROWS = 4;  // whose sums registers hold

struct Line {
    __m256i low, high;
};
using Sums = Line;  // pairs of 16 bits
struct Reals {
    __m256 low, high;
};

// Keeps the compiler from putting off additions until it has no registers left.
inline __m256i in_register(__m256i value) {
    asm("" : "+x"(value));
    return value;
}

inline Sums zero_sums() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline Line load_line(const void* line) { return {_mm256_load_si256((const __m256i*)line), _mm256_load_si256((const __m256i*)line + 1)}; }
inline Line splat_quad(const void* quad) {
    const __m256i value = _mm256_set1_epi32(load_word(quad));
    return {value, value};
}
// Nibbles times bytes, at most eight times: 8 * 2 * 15 * 128 < 2^15.
inline Sums add_dots(Sums sums, Line nibbles, Line bytes) {
    return {in_register(_mm256_add_epi16(sums.low, _mm256_maddubs_epi16(nibbles.low, bytes.low))),
            in_register(_mm256_add_epi16(sums.high, _mm256_maddubs_epi16(nibbles.high, bytes.high)))};
}
inline Line low_nibbles(Line line) {
    const __m256i mask = _mm256_set1_epi8(15);
    return {_mm256_and_si256(line.low, mask), _mm256_and_si256(line.high, mask)};
}
inline Line high_nibbles(Line line) { return low_nibbles({_mm256_srli_epi16(line.low, 4), _mm256_srli_epi16(line.high, 4)}); }
inline void store_line(void* line, Line value) {
    _mm256_store_si256((__m256i*)line, value.low);
    _mm256_store_si256((__m256i*)line + 1, value.high);
}

inline Reals zero_reals() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Reals load_reals(const float* source) { return {_mm256_loadu_ps(source), _mm256_loadu_ps(source + 8)}; }
inline Reals load_halves(const uint16_t* source) {
    return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)source)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)source + 1))};
}
inline Reals splat_real(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
inline Reals to_reals(Sums sums) {
    const __m256i ones = _mm256_set1_epi16(1);
    return {_mm256_cvtepi32_ps(_mm256_madd_epi16(sums.low, ones)), _mm256_cvtepi32_ps(_mm256_madd_epi16(sums.high, ones))};
}
inline Reals times(Reals a, Reals b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
inline Reals fused(Reals a, Reals b, Reals c) { return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)}; }
inline void store_reals(float* target, Reals value) {
    _mm256_storeu_ps(target, value.low);
    _mm256_storeu_ps(target + 8, value.high);
}

// INT8: weights are widened to 16 bits, of which an instruction multiplies and adds pairs. Inputs 0 and 2 of a quad are one pair, 1 and 3 the
// other: so can bytes be widened where they lie.
using Int8Input = int16_t;
constexpr int WEIGHT_OFFSET = 0;
struct WideSums {
    __m256i low, high;  // 32 bits
};
struct WideLine {
    __m256i low[2], high[2];
};
constexpr int WIDE_LINE_BYTES = 2 * LINE_BYTES;

inline WideSums begin_sums(int32_t) { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline WideLine load_wide(const void* line) {
    const __m256i* parts = static_cast<const __m256i*>(line);
    return {{_mm256_load_si256(parts), _mm256_load_si256(parts + 1)}, {_mm256_load_si256(parts + 2), _mm256_load_si256(parts + 3)}};
}
inline WideLine widen_line(const void* line) {
    const Line bytes = load_line(line);
    const __m256i offset = _mm256_set1_epi8(-128);
    const __m256i low = _mm256_xor_si256(bytes.low, offset), high = _mm256_xor_si256(bytes.high, offset);
    return {{_mm256_srai_epi16(_mm256_slli_epi16(low, 8), 8), _mm256_srai_epi16(low, 8)},
            {_mm256_srai_epi16(_mm256_slli_epi16(high, 8), 8), _mm256_srai_epi16(high, 8)}};
}
inline void store_wide(void* line, WideLine value) {
    __m256i* parts = static_cast<__m256i*>(line);
    for (int pair = 0; pair < 2; pair++) {
        _mm256_store_si256(parts + pair, value.low[pair]);
        _mm256_store_si256(parts + 2 + pair, value.high[pair]);
    }
}
inline WideSums add_products(WideSums sums, const WideLine& line, const Int8Input* inputs) {
    for (int pair = 0; pair < 2; pair++) {
        const __m256i input = _mm256_set1_epi32(load_word(inputs + 2 * pair));
        sums.low = in_register(_mm256_add_epi32(sums.low, _mm256_madd_epi16(line.low[pair], input)));
        sums.high = in_register(_mm256_add_epi32(sums.high, _mm256_madd_epi16(line.high[pair], input)));
    }
    return sums;
}
inline Reals to_reals(WideSums sums) { return {_mm256_cvtepi32_ps(sums.low), _mm256_cvtepi32_ps(sums.high)}; }

}  // namespace tandem
