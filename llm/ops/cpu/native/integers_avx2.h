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
