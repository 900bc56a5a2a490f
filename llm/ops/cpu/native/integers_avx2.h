// AVX2.
#pragma once

#include <immintrin.h>

namespace tandem {

constexpr int INTEGER_ROWS = 4;  // whose sums registers hold

struct Sums {
    __m256i low, high;
};
struct Reals {
    __m256 low, high;
};
struct Pairs {
    __m256i low, high;
};

// Keeps the compiler from putting off additions until it has no registers left, and from loading weights again for every row.
inline __m256i in_register(__m256i value) {
    asm("" : "+x"(value));
    return value;
}

inline Pairs load_pairs(const void* source) {
    const __m256i* parts = static_cast<const __m256i*>(source);
    return {in_register(_mm256_load_si256(parts)), in_register(_mm256_load_si256(parts + 1))};
}
inline void store_pairs(void* target, Pairs value) {
    _mm256_store_si256((__m256i*)target, value.low);
    _mm256_store_si256((__m256i*)target + 1, value.high);
}
template <class Change>
inline Pairs changed(Pairs value, Change change) {
    return {change(value.low), change(value.high)};
}

// From a line of bytes that have 128 added.
inline void widen_bytes(const void* line, Pairs* two) {
    const Pairs bytes = changed(load_pairs(line), [](__m256i part) { return _mm256_xor_si256(part, _mm256_set1_epi8(-128)); });
    two[0] = changed(bytes, [](__m256i part) { return _mm256_srai_epi16(_mm256_slli_epi16(part, 8), 8); });
    two[1] = changed(bytes, [](__m256i part) { return _mm256_srai_epi16(part, 8); });
}

// From a line of two quads' nibbles.
inline void widen_nibbles(const void* line, Pairs* four) {
    const __m256i mask = _mm256_set1_epi16(15);
    const Pairs nibbles = load_pairs(line);
    four[0] = changed(nibbles, [mask](__m256i part) { return _mm256_and_si256(part, mask); });
    four[1] = changed(nibbles, [mask](__m256i part) { return _mm256_and_si256(_mm256_srli_epi16(part, 8), mask); });
    four[2] = changed(nibbles, [mask](__m256i part) { return _mm256_and_si256(_mm256_srli_epi16(part, 4), mask); });
    four[3] = changed(nibbles, [](__m256i part) { return _mm256_srli_epi16(part, 12); });
}

inline Sums zero_sums() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline Sums add_products(Sums sums, Pairs weights, const int16_t* two_inputs) {
    const __m256i inputs = _mm256_set1_epi32(load_word(two_inputs));
    return {in_register(_mm256_add_epi32(sums.low, _mm256_madd_epi16(weights.low, inputs))),
            in_register(_mm256_add_epi32(sums.high, _mm256_madd_epi16(weights.high, inputs)))};
}

inline Pairs joined(Pairs a, Pairs b, __m256i (*join)(__m256i, __m256i)) { return {join(a.low, b.low), join(a.high, b.high)}; }

// A line's low nibbles and its high ones, as bytes.
inline void split_nibbles(const void* line, Pairs* two) {
    const __m256i mask = _mm256_set1_epi8(15);
    const Pairs both = load_pairs(line);
    two[0] = changed(both, [mask](__m256i part) { return _mm256_and_si256(part, mask); });
    two[1] = changed(both, [mask](__m256i part) { return _mm256_and_si256(_mm256_srli_epi16(part, 4), mask); });
}
inline Pairs add_bytes(Pairs a, Pairs b) {
    return joined(a, b, [](__m256i x, __m256i y) { return _mm256_add_epi8(x, y); });
}
inline Pairs subtract_bytes(Pairs a, Pairs b) {
    return joined(a, b, [](__m256i x, __m256i y) { return _mm256_sub_epi8(x, y); });
}
inline Pairs splat_byte(char value) { return {_mm256_set1_epi8(value), _mm256_set1_epi8(value)}; }

// Sums of 16 bits, two of each output: of half a group each. They may wrap on the way, but are right in the end (mixed_rows.h), so the
// multiplication that widens them is done once for a group. A pair of products is at most 2 * 120 * 127, which fits.
struct MixedStart {
    int16_t first, second;
    int32_t rest;

    MixedStart(int32_t first, int32_t second, int32_t rest) : first(int16_t(first)), second(int16_t(second)), rest(rest) {}
};
struct MixedSums {
    __m256i low, high;
};
inline MixedSums begin_sums(const MixedStart& start) {
    const __m256i both = _mm256_set1_epi32(load_word(&start));
    return {both, both};
}
inline MixedSums add_mixed(MixedSums sums, Pairs weights, const int8_t* four_inputs) {
    const __m256i inputs = _mm256_set1_epi32(load_word(four_inputs));
    return {in_register(_mm256_add_epi16(sums.low, _mm256_maddubs_epi16(weights.low, inputs))),
            in_register(_mm256_add_epi16(sums.high, _mm256_maddubs_epi16(weights.high, inputs)))};
}
inline Sums end_sums(MixedSums sums, const MixedStart& start) {
    const __m256i ones = _mm256_set1_epi16(1), rest = _mm256_set1_epi32(start.rest);
    return {_mm256_add_epi32(_mm256_madd_epi16(sums.low, ones), rest), _mm256_add_epi32(_mm256_madd_epi16(sums.high, ones), rest)};
}

inline Reals zero_reals() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Reals load_reals(const float* source) { return {_mm256_loadu_ps(source), _mm256_loadu_ps(source + 8)}; }
inline Reals load_halves(const uint16_t* source) {
    return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)source)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)source + 1))};
}
inline Reals splat_real(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
inline Reals to_reals(Sums sums) { return {_mm256_cvtepi32_ps(sums.low), _mm256_cvtepi32_ps(sums.high)}; }
inline Reals times(Reals a, Reals b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
inline Reals fused(Reals a, Reals b, Reals c) { return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)}; }
inline void store_reals(float* target, Reals value) {
    _mm256_storeu_ps(target, value.low);
    _mm256_storeu_ps(target + 8, value.high);
}

}  // namespace tandem
