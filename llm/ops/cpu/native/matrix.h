// Matrices of any weight format, and their product with rows that were made ready for it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "product_float.h"
#include "product_mixed.h"

namespace tandem {

enum Format : int32_t { FLOAT32 = 0, BFLOAT16 = 1, INT8 = 2, INT4 = 3, W4A8 = 4 };  // W4A8: INT4 with rows in 8 bits

// y = x W^T with W [outputs, depth]. What the pointers mean is the format's affair.
struct Matrix {
    int32_t format;
    int32_t outputs;
    int32_t depth;
    int32_t unused;
    const void* values;
    const void* scales;
    const void* extra;
};

// Bytes of one row made ready, a multiple of 64.
inline size_t input_row_bytes(const Matrix& matrix) {
    if (matrix.format == INT8 || matrix.format == INT4) return RowLayout(matrix.depth).bytes();
    if (matrix.format == W4A8) return MixedLayout(matrix.depth).bytes();
    return (size_t(matrix.depth) * sizeof(float) + 63) / 64 * 64;
}

// Makes a row of floats ready to be multiplied.
inline void prepare_row(const Matrix& matrix, const float* x, void* row) {
    if (matrix.format == INT8 || matrix.format == INT4) return quantise(x, matrix.depth, row);
    if (matrix.format == W4A8) return quantise_mixed(x, matrix.depth, row);
    std::memcpy(row, x, size_t(matrix.depth) * sizeof(float));
}

// out[row * out_stride + o] for outputs first <= o < last, on the calling thread. `first` is a multiple of 16, `last` too or the end.
// A row's sums depend on nothing but the row, whatever the number of rows.
inline void multiply(const Matrix& matrix, const void* input, int num_rows, float* out, size_t out_stride, int first, int last) {
    const size_t stride = input_row_bytes(matrix);
    const auto multiply_floats = [&]<class Weight>(const Weight* weights) {
        multiply_float(weights, matrix.depth, static_cast<const float*>(input), stride / sizeof(float), num_rows, out, out_stride, first,
                       last);
    };
    if (matrix.format == FLOAT32) return multiply_floats(static_cast<const float*>(matrix.values));
    if (matrix.format == BFLOAT16) return multiply_floats(static_cast<const uint16_t*>(matrix.values));
    const auto* values = static_cast<const uint8_t*>(matrix.values);
    const auto* scales = static_cast<const uint16_t*>(matrix.scales);
    const Target target{out, out_stride, first, last};
    const char* bytes = static_cast<const char*>(input);
    if (matrix.format == W4A8) return multiply_mixed(values, scales, {bytes, MixedLayout(matrix.depth)}, num_rows, target);
    const Rows rows{bytes, RowLayout(matrix.depth)};
    if (matrix.format == INT8) return multiply_integer<Int8Block>(values, scales, rows, num_rows, target);
    multiply_integer<Int4Block>(values, scales, rows, num_rows, target);
}

}  // namespace tandem
