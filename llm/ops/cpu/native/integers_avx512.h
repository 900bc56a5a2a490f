// AVX-512 with VNNI.
#pragma once

#include <immintrin.h>

namespace tandem {

constexpr int INTEGER_ROWS = 8;  // whose sums registers hold

using Sums = __m512i;
using Reals = __m512;
using Pairs = __m512i;

inline Pairs load_pairs(const void* source) { return _mm512_load_si512(source); }
inline void store_pairs(void* target, Pairs value) { _mm512_store_si512(target, value); }

// From a line of bytes that have 128 added.
inline void widen_bytes(const void* line, Pairs* two) {
    const __m512i bytes = _mm512_xor_si512(load_pairs(line), _mm512_set1_epi8(-128));
    two[0] = _mm512_srai_epi16(_mm512_slli_epi16(bytes, 8), 8);
    two[1] = _mm512_srai_epi16(bytes, 8);
}

// From a line of two quads' nibbles.
inline void widen_nibbles(const void* line, Pairs* four) {
    const __m512i mask = _mm512_set1_epi16(15), nibbles = load_pairs(line);
    four[0] = _mm512_and_si512(nibbles, mask);
    four[1] = _mm512_and_si512(_mm512_srli_epi16(nibbles, 8), mask);
    four[2] = _mm512_and_si512(_mm512_srli_epi16(nibbles, 4), mask);
    four[3] = _mm512_srli_epi16(nibbles, 12);
}

inline Sums zero_sums() { return _mm512_setzero_si512(); }
inline Sums add_products(Sums sums, Pairs weights, const int16_t* two_inputs) {
    return _mm512_dpwssd_epi32(sums, weights, _mm512_set1_epi32(load_word(two_inputs)));
}

// A line's low nibbles and its high ones, as bytes.
inline void split_nibbles(const void* line, Pairs* two) {
    const __m512i mask = _mm512_set1_epi8(15), both = load_pairs(line);
    two[0] = _mm512_and_si512(both, mask);
    two[1] = _mm512_and_si512(_mm512_srli_epi16(both, 4), mask);
}
inline Pairs add_bytes(Pairs a, Pairs b) { return _mm512_add_epi8(a, b); }
inline Pairs subtract_bytes(Pairs a, Pairs b) { return _mm512_sub_epi8(a, b); }
inline Pairs splat_byte(char value) { return _mm512_set1_epi8(value); }

struct MixedStart {
    int32_t whole;

    MixedStart(int32_t first, int32_t second, int32_t rest) : whole(first + second + rest) {}
};
using MixedSums = Sums;
inline MixedSums begin_sums(const MixedStart& start) { return _mm512_set1_epi32(start.whole); }
inline MixedSums add_mixed(MixedSums sums, Pairs weights, const int8_t* four_inputs) {
    return _mm512_dpbusd_epi32(sums, weights, _mm512_set1_epi32(load_word(four_inputs)));
}
inline Sums end_sums(MixedSums sums, const MixedStart&) { return sums; }

inline Reals zero_reals() { return _mm512_setzero_ps(); }
inline Reals load_reals(const float* source) { return _mm512_loadu_ps(source); }
inline Reals load_halves(const uint16_t* source) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)source)); }
inline Reals splat_real(float value) { return _mm512_set1_ps(value); }
inline Reals to_reals(Sums sums) { return _mm512_cvtepi32_ps(sums); }
inline Reals times(Reals a, Reals b) { return _mm512_mul_ps(a, b); }
inline Reals fused(Reals a, Reals b, Reals c) { return _mm512_fmadd_ps(a, b, c); }
inline void store_reals(float* target, Reals value) { _mm512_storeu_ps(target, value); }

}  // namespace tandem
