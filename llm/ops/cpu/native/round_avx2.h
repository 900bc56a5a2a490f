// Rounding a group of floats to integers, with AVX2; AVX-512 uses it too.
#pragma once

#include <immintrin.h>

#include "integers.h"
#include "vector.h"

namespace tandem {

inline __m128i halves_combined(__m256i value, __m128i (*combine)(__m128i, __m128i)) {
    return combine(_mm256_castsi256_si128(value), _mm256_extracti128_si256(value, 1));
}

template <class Value>
inline float largest_magnitude(const Value* x) {
    const __m256i mask = _mm256_set1_epi32(0x7FFFFFFF);
    __m256i most = _mm256_setzero_si256();
    for (int part = 0; part < 4; part++)
        most = _mm256_max_epi32(most, _mm256_and_si256(_mm256_loadu_si256((const __m256i*)x + part), mask));
    __m128i four = halves_combined(most, [](__m128i a, __m128i b) { return _mm_max_epi32(a, b); });
    four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4E));
    four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0xB1));
    return _mm_cvtss_f32(_mm_castsi128_ps(four));
}

struct RoundedGroup {
    __m256i parts[4];  // 32 bits each

    RoundedGroup(const float* x, float inverse) {
        for (int part = 0; part < 4; part++)
            parts[part] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + 8 * part), _mm256_set1_ps(inverse)));
    }

    int32_t sum() const {
        const __m256i eight = _mm256_add_epi32(_mm256_add_epi32(parts[0], parts[1]), _mm256_add_epi32(parts[2], parts[3]));
        __m128i four = halves_combined(eight, [](__m128i a, __m128i b) { return _mm_add_epi32(a, b); });
        four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4E));
        return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xB1)));
    }

    // Each four in the order 0, 2, 1, 3.
    void store(int16_t* out) const {
        for (int half = 0; half < 2; half++) {
            const __m256i first = _mm256_shuffle_epi32(parts[2 * half], 0xD8), second = _mm256_shuffle_epi32(parts[2 * half + 1], 0xD8);
            _mm256_storeu_si256((__m256i*)out + half, _mm256_permute4x64_epi64(_mm256_packs_epi32(first, second), 0xD8));
        }
    }
};

inline Eight halves_swapped(Eight v) { return (Eight)_mm256_permute2f128_ps((__m256)v, (__m256)v, 1); }
inline EightShorts halves_swapped(EightShorts v) { return (EightShorts)_mm_shuffle_epi32((__m128i)v, 0x4E); }

// 0, 2, 1, 3 of each four.
inline EightShorts fours_ordered(EightShorts v) {
    return (EightShorts)_mm_shufflehi_epi16(_mm_shufflelo_epi16((__m128i)v, 0xD8), 0xD8);
}
inline EightShorts widen_eight(const int8_t* bytes) { return (EightShorts)_mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i*)bytes)); }

// 32 floats as bytes.
struct RoundedBytes {
    __m256i first, last;  // 16 bits each: vectors 0 and 1, and 2 and 3; their lower halves, then their upper ones

    RoundedBytes(const Eight* x, float inverse) : first(pair(x, inverse)), last(pair(x + 2, inverse)) {}

    void store(int8_t* out) const {
        const __m256i places = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
        _mm256_storeu_si256((__m256i*)out, _mm256_permutevar8x32_epi32(_mm256_packs_epi16(first, last), places));
    }
    PairSums squares() const { return folded(_mm256_add_epi32(_mm256_madd_epi16(first, first), _mm256_madd_epi16(last, last))); }
    PairSums sums() const { return folded(_mm256_add_epi32(pairs_added(first), pairs_added(last))); }
    int32_t first_four() const {
        const __m128i pairs = _mm256_castsi256_si128(pairs_added(first));
        return _mm_cvtsi128_si32(_mm_add_epi32(pairs, _mm_shuffle_epi32(pairs, 0xB1)));
    }

   private:
    static __m256i pair(const Eight* x, float inverse) {
        return _mm256_packs_epi32(_mm256_cvtps_epi32((__m256)(x[0] * inverse)), _mm256_cvtps_epi32((__m256)(x[1] * inverse)));
    }
    static __m256i pairs_added(__m256i shorts) { return _mm256_madd_epi16(shorts, _mm256_set1_epi16(1)); }
    static PairSums folded(__m256i eight) {
        const __m128i four = halves_combined(eight, [](__m128i a, __m128i b) { return _mm_add_epi32(a, b); });
        const __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4E));
        return {_mm_cvtsi128_si32(two), _mm_extract_epi32(two, 1)};
    }
};

}  // namespace tandem
