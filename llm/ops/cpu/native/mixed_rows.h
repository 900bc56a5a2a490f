// Rows in 8 bits for four-bit weights. Eights of inputs are mixed first, so that a value that stands out does not cost its group of 32 its
// resolution: y = H x for inputs i, i + 4, ..., i + 28 of a group (i < 4), where H is the Hadamard matrix of 1 and -1, and H H = 8. Weights of
// four bits mixed the same way still fit a byte, so nothing of theirs is lost:
//
//   sum of x n = sum of (H x)(H n) / 8, and with whole q = H x / scale    sum of q (H n) = sum of (H q) n
//
// Both sides are whole numbers. The left one suits many rows (product_mixed.h), the right one few: H q fits 16 bits, and weights are
// multiplied as they lie. So a row's results are the same either way.
#pragma once

#include <cmath>

#include "quantise.h"
#include "vector.h"

namespace tandem {

constexpr int EIGHT = 8;               // inputs that are mixed
constexpr int FOURS = GROUP / EIGHT;   // vectors of a group, in each of which the eights i = 0, 1, 2, 3 have two members
constexpr int LARGEST_BYTE = 127;
constexpr int CENTRE = 60;             // is added to a mixed weight: H n, with n from 0 to 15, is from -60 to 60, or from 0 to 120 if all signs are 1
// Half a group, the two eights i < 2 or i >= 2, is added up in 16 bits (integers_avx2.h): the sum of q H (n - 7.5) is at most |q| |H (n - 7.5)|,
// and the latter at most 4 sqrt(8) 7.5 = 84.9. Groups whose |q| would be above are scaled to LESS_NORM, which rounding makes 384 at most.
constexpr int LARGEST_NORM = 386, LESS_NORM = 380;
static_assert(LARGEST_NORM * 84.853 < INT16_MAX);

// H, of each eight of a group. Sums are taken in one order everywhere.
template <class Vector>
inline void mix_group(Vector* v) {
    const Vector a = v[0] + v[1], b = v[0] - v[1], c = v[2] + v[3], d = v[2] - v[3];
    v[0] = a + c, v[1] = b + d, v[2] = a - c, v[3] = b - d;
    for (int k = 0; k < FOURS; k++) v[k] = halves_swapped(v[k]) + v[k] * Vector{1, 1, 1, 1, -1, -1, -1, -1};
}

// A group's q, and what it is multiplied by to give the inputs' own sizes.
struct MixedGroup {
    RoundedBytes q;
    float scale;

    static MixedGroup of(const float* x) {
        Eight y[FOURS] = {load_eight(x), load_eight(x + EIGHT), load_eight(x + 2 * EIGHT), load_eight(x + 3 * EIGHT)};
        mix_group(y);
        const float most = largest_magnitude(y);
        const MixedGroup made(y, Span(most, LARGEST_BYTE));
        const PairSums squares = made.q.squares();
        const int32_t square = std::max(squares.first, squares.last);
        if (square <= LARGEST_NORM * LARGEST_NORM) return made;
        return MixedGroup(y, Span(most, int(LARGEST_BYTE * LESS_NORM / std::sqrt(float(square)))));
    }

   private:
    MixedGroup(const Eight* y, const Span& span) : q(span.finite() ? y : NOTHING, span.inverse), scale(span.scale / EIGHT) {}

    static constexpr Eight NOTHING[FOURS] = {};
};

// A row made ready: q in bytes; a scale for each group; each group's H q added up, times its scale; what its products begin with.
struct MixedLayout {
    int groups;

    explicit MixedLayout(int depth) : groups(depth / GROUP) {}

    size_t bytes() const { return (size_t(groups) * (GROUP + 2 * sizeof(float) + sizeof(MixedStart)) + 63) / 64 * 64; }
};

struct MixedRows {
    const char* first;
    MixedLayout layout;
    size_t stride = layout.bytes();

    const int8_t* bytes(int row) const { return reinterpret_cast<const int8_t*>(first + row * stride); }
    const float* scales(int row) const { return reinterpret_cast<const float*>(bytes(row) + layout.groups * GROUP); }
    const float* sums(int row) const { return scales(row) + layout.groups; }
    const MixedStart* starts(int row) const { return reinterpret_cast<const MixedStart*>(sums(row) + layout.groups); }
};

inline void quantise_mixed(const float* x, int depth, void* row) {
    const int groups = MixedLayout(depth).groups;
    int8_t* bytes = static_cast<int8_t*>(row);
    float *scales = reinterpret_cast<float*>(bytes + groups * GROUP), *totals = scales + groups;
    MixedStart* starts = reinterpret_cast<MixedStart*>(totals + groups);
    for (int group = 0; group < groups; group++) {
        const MixedGroup made = MixedGroup::of(x + group * GROUP);
        const PairSums sums = made.q.sums();
        const int32_t eights = made.q.first_four();
        made.q.store(bytes + group * GROUP);
        scales[group] = made.scale;
        totals[group] = made.scale * float(EIGHT * eights);
        starts[group] = MixedStart(-CENTRE * sums.first, -CENTRE * sums.last, CENTRE * eights);
    }
}

// The row with H q in 16 bits, as quantise would leave it.
inline void widen_mixed(const MixedRows& rows, int row, char* target) {
    const int groups = rows.layout.groups;
    int16_t* integers = reinterpret_cast<int16_t*>(target);
    for (int group = 0; group < groups; group++) {
        EightShorts v[FOURS];
        for (int k = 0; k < FOURS; k++) v[k] = widen_eight(rows.bytes(row) + group * GROUP + k * EIGHT);
        mix_group(v);
        for (int k = 0; k < FOURS; k++) {
            const EightShorts ordered = fours_ordered(v[k]);
            std::memcpy(integers + group * GROUP + k * EIGHT, &ordered, sizeof ordered);
        }
    }
    std::copy_n(rows.scales(row), 2 * groups, reinterpret_cast<float*>(integers + groups * GROUP));
}

}  // namespace tandem
