// y = x W^T for weights in float32 or bfloat16, as they lie in the checkpoint: [outputs, depth]. Sums are float32.
#pragma once

#include <algorithm>

#include "buffer.h"
#include "vector.h"

namespace tandem {

template <int COUNT>
inline void sum_all(const Floats* values, float* out) {
    constexpr int FOURS = COUNT / 4 * 4;
#pragma GCC unroll 4
    for (int i = 0; i < FOURS; i += 4) sum_four(values[i], values[i + 1], values[i + 2], values[i + 3], out + i);
#pragma GCC unroll 4
    for (int i = FOURS; i < COUNT; i++) out[i] = sum(values[i]);
}

// out[o][r] = weights[o] . inputs[r]. One sum along the depth for each, so that it is the same in a tile of any shape.
template <int OUTPUTS, int ROWS, class Weight>
inline void dot_tile(const Weight* const* weights, const float* const* inputs, int depth, float (*out)[ROWS]) {
    Floats sums[OUTPUTS][ROWS] = {};
    const auto add = [&](auto load_weight, auto load_input) {
        Floats loaded[OUTPUTS];
#pragma GCC unroll 16
        for (int o = 0; o < OUTPUTS; o++) loaded[o] = load_weight(weights[o]);
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; r++) {
            Floats input = load_input(inputs[r]);
#pragma GCC unroll 16
            for (int o = 0; o < OUTPUTS; o++) sums[o][r] = multiply_add(loaded[o], input, sums[o][r]);
        }
    };
    int index = 0;
    for (; index + LANES <= depth; index += LANES)
        add([index](const Weight* line) { return load(line + index); }, [index](const float* line) { return load(line + index); });
    if (const int rest = depth - index; rest > 0)
        add([=](const Weight* line) { return load_part(line + index, rest); },
            [=](const float* line) { return load_part(line + index, rest); });
    sum_all<OUTPUTS * ROWS>(&sums[0][0], &out[0][0]);
}

// A tile whose outputs and rows may reach beyond the end: the last ones are then computed again.
template <int OUTPUTS, int ROWS, class Weight>
inline void multiply_tile(const Weight* weights, int depth, const float* input, size_t stride, int first, int last, int row, int rows,
                          float* out, size_t out_stride) {
    const Weight* lines[OUTPUTS];
    const float* inputs[ROWS];
    for (int o = 0; o < OUTPUTS; o++) lines[o] = weights + size_t(std::min(first + o, last - 1)) * depth;
    for (int r = 0; r < ROWS; r++) inputs[r] = input + std::min(row + r, rows - 1) * stride;
    float results[OUTPUTS][ROWS];
    dot_tile<OUTPUTS, ROWS>(lines, inputs, depth, results);
    for (int r = 0; r < ROWS && row + r < rows; r++)
        for (int o = 0; o < OUTPUTS && first + o < last; o++) out[(row + r) * out_stride + first + o] = results[o][r];
}

constexpr int PANEL_OUTPUTS = 48;  // they stay in the second-level cache while all rows pass
constexpr int WIDEN_ROWS = 12;     // from here on widening a panel once costs less than widening it again for every four rows

template <class Weight>
inline void multiply_panel(const Weight* weights, int depth, const float* input, size_t stride, int rows, float* out, size_t out_stride,
                           int outputs) {
    for (int row = 0; row < rows; row += 4)
        for (int o = 0; o < outputs; o += 3)
            multiply_tile<3, 4>(weights, depth, input, stride, o, outputs, row, rows, out, out_stride);
}

inline const float* widened(const uint16_t* weights, size_t count) {
    thread_local Buffer memory;
    float* target = memory.take<float>(count);
    for (size_t index = 0; index < count; index++) target[index] = widen(weights[index]);
    return target;
}

template <class Weight>
void multiply_float(const Weight* weights, int depth, const float* input, size_t stride, int rows, float* out, size_t out_stride,
                    int first, int last) {
    if (rows == 1) {
        for (int o = first; o < last; o += 4) multiply_tile<4, 1>(weights, depth, input, stride, o, last, 0, 1, out, out_stride);
        return;
    }
    for (int panel = first; panel < last; panel += PANEL_OUTPUTS) {
        const int outputs = std::min(PANEL_OUTPUTS, last - panel);
        const Weight* lines = weights + size_t(panel) * depth;
        if constexpr (sizeof(Weight) < sizeof(float)) {
            if (rows >= WIDEN_ROWS) {
                multiply_panel(widened(lines, size_t(outputs) * depth), depth, input, stride, rows, out + panel, out_stride, outputs);
                continue;
            }
        }
        multiply_panel(lines, depth, input, stride, rows, out + panel, out_stride, outputs);
    }
}

}  // namespace tandem
