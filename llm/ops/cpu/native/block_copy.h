// Copies KV blocks from pool to pool and takes their checksums (XXH3, 64 bits, seed 0) in the same pass.
//
// A copy waits for memory; what the checksum computes meanwhile costs next to nothing, where a pass of its own takes half as long as
// the copy. The checksum is of what was read, which is what was written. Blocks are whole stretches of 1,024 bytes.
// Source: the XXH3 specification, "long" inputs.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace tandem {

// Its constants, as llm/ops/xxh3.py lists them.
struct XxhTable {
    uint64_t keys[24], last_keys[8], scramble_keys[8], merge_keys[8], starts[8];
};

// Half a stripe: as wide as most processors' vectors are.
using Half = uint64_t __attribute__((vector_size(32)));

inline Half half_at(const uint64_t* words) {
    Half half;
    std::memcpy(&half, words, sizeof half);
    return half;
}

// The lower 32 bits of each word times those of the other's. Compilers multiply whole words otherwise, in three products.
inline Half product(Half left, Half right) {
#ifdef __AVX2__
    return Half(_mm256_mul_epu32(__m256i(left), __m256i(right)));
#else
    return (left & 0xFFFFFFFFu) * (right & 0xFFFFFFFFu);
#endif
}

inline Half swapped(Half words) {
#ifdef __AVX2__
    return Half(_mm256_shuffle_epi32(__m256i(words), 0x4E));
#else
    return Half{words[1], words[0], words[3], words[2]};
#endif
}

// Each word's lane gains low * high of (word ^ key), and its neighbour the word.
inline Half added(Half lanes, Half words, Half keys) {
    const Half keyed = words ^ keys;
    return lanes + product(keyed, keyed >> 32) + swapped(words);
}

inline Half scrambled(Half lanes, Half keys) {
    const Half prime = Half{} + 0x9E3779B1u, mixed = lanes ^ (lanes >> 47) ^ keys;
    return product(mixed, prime) + (product(mixed >> 32, prime) << 32);
}

inline uint64_t merged(const uint64_t (&lanes)[8], const XxhTable& table, size_t num_bytes) {
    uint64_t total = num_bytes * 0x9E3779B185EBCA87u;
    for (int lane = 0; lane < 8; lane += 2) {
        const uint64_t left = lanes[lane] ^ table.merge_keys[lane], right = lanes[lane + 1] ^ table.merge_keys[lane + 1];
        const auto product = static_cast<unsigned __int128>(left) * right;
        total += static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
    }
    total = (total ^ (total >> 37)) * 0x165667919E3779F9u;
    return total ^ (total >> 32);
}

// The checksum of `num_words` words, which are also copied if there is a target.
template <bool copies>
uint64_t taken(const uint64_t* source, uint64_t* target, size_t num_words, const XxhTable& table) {
    constexpr size_t stretch = 128, stripe = 8, half = 4;
    Half low = half_at(table.starts), high = half_at(table.starts + half);
    for (size_t place = 0; place < num_words; place += stretch) {
        const bool last = place + stretch == num_words;
        for (size_t offset = 0; offset < stretch; offset += stripe) {
            const uint64_t* from = source + place + offset;
            const uint64_t* keys = last && offset + stripe == stretch ? table.last_keys : table.keys + offset / stripe;
            if constexpr (!copies)  // the processor asks for no more than the page that it reads; a copy waits for its stores anyway
                __builtin_prefetch(reinterpret_cast<const char*>(from) + 4096);
            const Half left = half_at(from), right = half_at(from + half);
            if constexpr (copies) {
                std::memcpy(target + place + offset, &left, sizeof left);
                std::memcpy(target + place + offset + half, &right, sizeof right);
            }
            low = added(low, left, half_at(keys));
            high = added(high, right, half_at(keys + half));
        }
        if (!last) {
            low = scrambled(low, half_at(table.scramble_keys));
            high = scrambled(high, half_at(table.scramble_keys + half));
        }
    }
    uint64_t lanes[8];
    std::memcpy(lanes, &low, sizeof low);
    std::memcpy(lanes + half, &high, sizeof high);
    return merged(lanes, table, num_words * 8);
}

}  // namespace tandem
