// What the integer products need of an instruction set: AVX-512 VNNI, AVX2, or plain C++, which runs anywhere.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

namespace tandem {

constexpr int BLOCK_OUTPUTS = 16;  // outputs whose weights lie together: four bytes of each are a cache line
constexpr int QUAD = 4;            // inputs of each in a line
constexpr int LINE_BYTES = BLOCK_OUTPUTS * QUAD;
constexpr int GROUP = 32;  // inputs that share a scale

inline int32_t load_word(const void* source) {
    int32_t word;
    std::memcpy(&word, source, sizeof word);
    return word;
}

typedef int16_t EightShorts __attribute__((vector_size(16)));

// Of a group's integers: of each four the first two, and the last two, added up.
struct PairSums {
    int32_t first, last;
};

// A thread's memory for weights made ready, 64-byte aligned, kept until the thread ends.
inline char* panel_memory(size_t bytes) {
    static thread_local std::vector<char> memory;
    if (memory.size() < bytes + 64) memory.resize(bytes + 64);
    return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
}

}  // namespace tandem

// Each defines Sums (32 bits) and Reals, one for each output; and Pairs: two weights of each in 16 bits, whose products an instruction adds
// up. They are for inputs 0 and 2 of four, or 1 and 3: so are bytes and nibbles widened where they lie.
#if defined(TANDEM_PLAIN) || !defined(__AVX2__)
#include "integers_plain.h"
#elif defined(__AVX512VNNI__)
#include "integers_avx512.h"
#else
#include "integers_avx2.h"
#endif
