// AVX-512 with VNNI.
#pragma once

#include <immintrin.h>

namespace tandem {


constexpr int INT8_TILE_ROWS = 8, INT4_TILE_ROWS = 8;  // whose sums registers hold

using Line = __m512i;
using Sums = __m512i;
using Reals = __m512;

inline Sums zero_sums() { return _mm512_setzero_si512(); }
inline Line load_line(const void* line) { return _mm512_load_si512(line); }
inline Line splat_quad(const void* quad) { return _mm512_set1_epi32(load_word(quad)); }
// sums[o] += unsigned bytes 4 o .. 4 o + 3 times signed bytes 4 o .. 4 o + 3
inline Sums add_dots(Sums sums, Line unsigned_bytes, Line signed_bytes) {
    return _mm512_dpbusd_epi32(sums, unsigned_bytes, signed_bytes);
}
inline Line low_nibbles(Line line) { return _mm512_and_si512(line, _mm512_set1_epi8(15)); }
inline Line high_nibbles(Line line) { return low_nibbles(_mm512_srli_epi16(line, 4)); }
inline void store_line(void* line, Line value) { _mm512_store_si512(line, value); }

inline Reals zero_reals() { return _mm512_setzero_ps(); }
inline Reals load_reals(const float* source) { return _mm512_loadu_ps(source); }
inline Reals load_halves(const uint16_t* source) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)source)); }
inline Reals splat_real(float value) { return _mm512_set1_ps(value); }
inline Reals to_reals(Sums sums) { return _mm512_cvtepi32_ps(sums); }
inline Reals times(Reals a, Reals b) { return _mm512_mul_ps(a, b); }
inline Reals fused(Reals a, Reals b, Reals c) { return _mm512_fmadd_ps(a, b, c); }
inline void store_reals(float* target, Reals value) { _mm512_storeu_ps(target, value); }

// INT8: weights are bytes that have WEIGHT_OFFSET added, which a group's sums begin with taken away.
using Int8Input = int8_t;
constexpr int WEIGHT_OFFSET = 128;
using WideSums = Sums;
using WideLine = Line;
constexpr int WIDE_LINE_BYTES = LINE_BYTES;

inline WideSums begin_sums(int32_t beginning) { return _mm512_set1_epi32(beginning); }
inline WideLine load_wide(const void* line) { return load_line(line); }
inline WideLine widen_line(const void* line) { return load_line(line); }
inline void store_wide(void* line, WideLine value) { store_line(line, value); }
inline WideSums add_products(WideSums sums, const WideLine& line, const Int8Input* inputs) { return add_dots(sums, line, splat_quad(inputs)); }

}  // namespace tandem
