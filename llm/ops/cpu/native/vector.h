// Vectors of floats, as wide as the instruction set that this file is compiled for.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace tandem {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

inline Floats load(const float* source) {
    Floats value;
    std::memcpy(&value, source, sizeof value);
    return value;
}

// bfloat16, which is the upper half of a float. Widened by one instruction; compilers make five of a conversion.
inline Floats load(const uint16_t* source) {
#if defined(__AVX512F__)
    return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)source)), 16);
#elif defined(__AVX2__)
    return (Floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)source)), 16);
#else
    Halves halves;
    std::memcpy(&halves, source, sizeof halves);
    return (Floats)(__builtin_convertvector(halves, Words) << 16);
#endif
}

// The first `count` values, and zeros.
template <class Value>
inline Floats load_part(const Value* source, int count) {
    Value values[LANES] = {};
    std::memcpy(values, source, count * sizeof(Value));
    return load(values);
}

// Rounded once wherever the instruction set can, so that no kernel's sum differs from another's by how it was compiled.
inline Floats multiply_add(Floats left, Floats right, Floats total) {
#if defined(__AVX512F__)
    return (Floats)_mm512_fmadd_ps((__m512)left, (__m512)right, (__m512)total);
#elif defined(__AVX2__)
    return (Floats)_mm256_fmadd_ps((__m256)left, (__m256)right, (__m256)total);
#else
    return left * right + total;
#endif
}

inline void store(float* target, Floats value) { std::memcpy(target, &value, sizeof value); }

inline Floats splat(float value) { return value - Floats{}; }

inline float widen(float value) { return value; }
inline float widen(int8_t value) { return float(value); }

inline float widen(uint16_t bits) {
    uint32_t word = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &word, sizeof value);
    return value;
}

inline void narrow(float value, float* target) { *target = value; }

// Rounds to nearest even.
inline void narrow(float value, uint16_t* target) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    *target = uint16_t((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

typedef float Eight __attribute__((vector_size(32)));

inline Eight load_eight(const float* source) {
    Eight value;
    std::memcpy(&value, source, sizeof value);
    return value;
}

inline Eight fold(Floats value) {
#if defined(__AVX512F__)
    return (Eight)_mm512_castps512_ps256((__m512)value) + (Eight)_mm512_extractf32x8_ps((__m512)value, 1);
#else
    return value;
#endif
}

// The sums of four vectors, each in the same order: neighbours, then pairs, then halves.
inline void sum_four(Floats a, Floats b, Floats c, Floats d, float* out) {
#if defined(__AVX2__)
    __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps((__m256)fold(a), (__m256)fold(b)), _mm256_hadd_ps((__m256)fold(c), (__m256)fold(d)));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1)));
#else
    const Eight values[4] = {fold(a), fold(b), fold(c), fold(d)};
    for (int i = 0; i < 4; i++) {
        const Eight& v = values[i];
        out[i] = ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
    }
#endif
}

// In the order of sum_four.
inline float sum(Floats value) {
    float sums[4];
    sum_four(value, value, value, value, sums);
    return sums[0];
}

inline float highest(Floats value) {
    float lanes[LANES];
    store(lanes, value);
    for (int width = LANES / 2; width > 0; width /= 2)
        for (int lane = 0; lane < width; lane++)
            if (lanes[lane + width] > lanes[lane]) lanes[lane] = lanes[lane + width];
    return lanes[0];
}

inline Floats larger(Floats left, Floats right) { return left > right ? left : right; }
inline Floats smaller(Floats left, Floats right) { return left < right ? left : right; }

// exp with a relative error below 4e-7, clamped to what a float holds.
// Range reduction by ln 2 in two parts and a polynomial of degree 7. Source: Moshier, Cephes library, expf.
inline Floats exponential(Floats x) {
    const float MAGIC = 12582912.0f;  // adding it rounds to a whole number, which the lowest bits then hold
    x = smaller(larger(x, splat(-87.0f)), splat(88.0f));
    Floats shifted = x * 1.4426950408889634f + MAGIC;
    Floats whole = shifted - MAGIC;
    Floats rest = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    Floats series = rest * 1.9875691500e-4f + 1.3981999507e-3f;
    series = series * rest + 8.3334519073e-3f;
    series = series * rest + 4.1665795894e-2f;
    series = series * rest + 1.6666665459e-1f;
    series = series * rest + 5.0000001201e-1f;
    Words power = ((Words)shifted - (Words)splat(MAGIC) + 127) << 23;
    return (series * rest * rest + rest + 1.0f) * (Floats)power;
}

inline float exponential(float x) { return exponential(splat(x))[0]; }

}  // namespace tandem
