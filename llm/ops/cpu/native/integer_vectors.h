// Vectors of whole numbers: bytes widened to 16 bits, multiplied in pairs, summed in 32 bits. Sums are exact, so their order is free.
#pragma once

#include "quantise.h"
#include "vector.h"

namespace tandem {

constexpr int WIDE = 2 * LANES;  // numbers of 16 bits in a vector

typedef int8_t Bytes __attribute__((vector_size(WIDE)));
typedef int16_t Shorts __attribute__((vector_size(2 * WIDE)));

inline Words load(const int32_t* source) {
    Words value;
    std::memcpy(&value, source, sizeof value);
    return value;
}

inline void store(int32_t* target, Words value) { std::memcpy(target, &value, sizeof value); }

inline Shorts load(const int16_t* source) {
    Shorts value;
    std::memcpy(&value, source, sizeof value);
    return value;
}

// One instruction; compilers make five of a conversion.
inline Shorts load(const int8_t* source) {
#if defined(__AVX512F__)
    return (Shorts)_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)source));
#elif defined(__AVX2__)
    return (Shorts)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)source));
#else
    Bytes value;
    std::memcpy(&value, source, sizeof value);
    return __builtin_convertvector(value, Shorts);
#endif
}

// The first `count` of WIDE numbers, and zeros.
inline Shorts load_part(const int8_t* source, int count) {
    Bytes value = {};
    std::memcpy(&value, source, count);
    return __builtin_convertvector(value, Shorts);
}

// total[i] + left[2 i] right[2 i] + left[2 i + 1] right[2 i + 1]
inline Words multiply_add(Shorts left, Shorts right, Words total) {
#if defined(__AVX512VNNI__)
    return (Words)_mm512_dpwssd_epi32((__m512i)total, (__m512i)left, (__m512i)right);
#elif defined(__AVX2__)
    return total + (Words)_mm256_madd_epi16((__m256i)left, (__m256i)right);
#else
    for (int i = 0; i < LANES; i++) total[i] += left[2 * i] * right[2 * i] + left[2 * i + 1] * right[2 * i + 1];
    return total;
#endif
}

// LANES bytes of each, in turns.
inline Shorts interleave(const int8_t* first, const int8_t* second) {
#if defined(__AVX512F__)
    const __m128i one = _mm_loadu_si128((const __m128i*)first), two = _mm_loadu_si128((const __m128i*)second);
    return (Shorts)_mm512_cvtepi8_epi16(_mm256_set_m128i(_mm_unpackhi_epi8(one, two), _mm_unpacklo_epi8(one, two)));
#elif defined(__AVX2__)
    const __m128i one = _mm_loadl_epi64((const __m128i*)first), two = _mm_loadl_epi64((const __m128i*)second);
    return (Shorts)_mm256_cvtepi8_epi16(_mm_unpacklo_epi8(one, two));
#else
    Shorts value;
    for (int i = 0; i < LANES; i++) value[2 * i] = first[i], value[2 * i + 1] = second[i];
    return value;
#endif
}

// Both tokens' weights, for interleaved values.
inline Shorts splat_pair(int32_t pair) { return (Shorts)(Words{} + pair); }

// The sums of four vectors.
inline void sum_four(Words a, Words b, Words c, Words d, int32_t* out) {
#if defined(__AVX512F__)
    const auto fold = [](Words v) { return _mm256_add_epi32(_mm512_castsi512_si256((__m512i)v), _mm512_extracti32x8_epi32((__m512i)v, 1)); };
#elif defined(__AVX2__)
    const auto fold = [](Words v) { return (__m256i)v; };
#endif
#if defined(__AVX2__)
    const __m256i pairs = _mm256_hadd_epi32(_mm256_hadd_epi32(fold(a), fold(b)), _mm256_hadd_epi32(fold(c), fold(d)));
    _mm_storeu_si128((__m128i*)out, _mm_add_epi32(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1)));
#else
    const Words values[4] = {a, b, c, d};
    for (int i = 0; i < 4; i++) {
        out[i] = 0;
        for (int lane = 0; lane < LANES; lane++) out[i] += values[i][lane];
    }
#endif
}

// To nearest, halves to even.
inline Words rounded(Floats value) {
#if defined(__AVX512F__)
    return (Words)_mm512_cvtps_epi32((__m512)value);
#elif defined(__AVX2__)
    return (Words)_mm256_cvtps_epi32((__m256)value);
#else
    Words whole;
    for (int i = 0; i < LANES; i++) whole[i] = int32_t(std::nearbyint(value[i]));
    return whole;
#endif
}

// Magnitudes as integers: those of infinite values and of NaN are above all others.
inline Words larger_magnitude(Words most, Floats value) {
    const Words bits = (Words)value & 0x7FFFFFFF;
    return bits > most ? bits : most;
}

inline float largest(Words magnitudes) {
    int32_t most = 0;
    for (int lane = 0; lane < LANES; lane++) most = std::max(most, magnitudes[lane]);
    float value;
    std::memcpy(&value, &most, sizeof value);
    return value;
}

// Whole numbers of at most LARGEST in magnitude, which times the scale that is returned are the values; `size` is a multiple of LANES.
// The scale is NaN if a value is not finite.
template <int LARGEST, class Integer>
inline float to_integers(const float* values, int size, Integer* integers) {
    typedef Integer Narrow __attribute__((vector_size(LANES * sizeof(Integer))));
    Words most = {};
    for (int index = 0; index < size; index += LANES) most = larger_magnitude(most, load(values + index));
    const Span span(largest(most), LARGEST);
    for (int index = 0; index < size; index += LANES) {
        const Words whole = span.finite() ? rounded(load(values + index) * span.inverse) : Words{};
        const Narrow narrow = __builtin_convertvector(whole, Narrow);
        std::memcpy(integers + index, &narrow, sizeof narrow);
    }
    return span.scale;
}

}  // namespace tandem
