// What tokens are drawn by: logits turned into weights, and the sums that a draw looks through first.
#pragma once

#include <algorithm>
#include <cmath>

#include "vector.h"

namespace tandem {

constexpr int DRAW_GROUP = 256;       // as in llm/sampling.py
constexpr float LEAST_POWER = -87.0f;  // exp of less than this is no normal float, and counts as nothing

typedef float Four __attribute__((vector_size(16)));
typedef double FourWide __attribute__((vector_size(32)));

inline Floats weigh(Floats values, float highest, float factor) {
    const Floats power = (values - highest) * factor;
    return (Floats)((Words)exponential(power) & (Words)(power >= splat(LEAST_POWER)));
}

// weights[i] = exp((values[i] - the highest) * factor), and the sum of each DRAW_GROUP of them. The order of the sums depends on nothing
// but the place in the row.
inline void weigh_row(const float* values, int count, float factor, float* weights, double* sums) {
    const int whole = count / LANES * LANES;
    Floats top = whole < count ? load_part(values + whole, count - whole) : splat(-INFINITY);
    for (int lane = count - whole; lane < LANES; lane++) top[lane] = -INFINITY;
    for (int index = 0; index < whole; index += LANES) top = larger(load(values + index), top);
    const float peak = highest(top);
    for (int first = 0; first < count; first += DRAW_GROUP) {
        const int last = std::min(first + DRAW_GROUP, count);
        int index = first;
        for (; index + LANES <= last; index += LANES) store(weights + index, weigh(load(values + index), peak, factor));
        FourWide totals = {};
        for (int place = first; place + 4 <= index; place += 4) {
            Four four;
            std::memcpy(&four, weights + place, sizeof four);
            totals += __builtin_convertvector(four, FourWide);
        }
        double total = totals[0] + totals[1] + totals[2] + totals[3];
        for (; index < last; index++) total += weights[index] = weigh(splat(values[index]), peak, factor)[0];
        sums[first / DRAW_GROUP] = total;
    }
}

}  // namespace tandem
