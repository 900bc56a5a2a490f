// Matrices of any weight format, and their product with rows that were made ready for it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "product_float.h"

namespace tandem {

enum Format : int32_t { FLOAT32 = 0, BFLOAT16 = 1 };

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
inline size_t input_row_bytes(const Matrix& matrix) { return (size_t(matrix.depth) * sizeof(float) + 63) / 64 * 64; }

// Makes a row of floats ready to be multiplied.
inline void prepare_row(const Matrix& matrix, const float* x, void* row) { std::memcpy(row, x, size_t(matrix.depth) * sizeof(float)); }

// out[row * out_stride + o] for outputs first <= o < last, on the calling thread. `first` is a multiple of 32, `last` too or the end.
// A row's sums depend on nothing but the row, whatever the number of rows.
inline void multiply(const Matrix& matrix, const void* input, int num_rows, float* out, size_t out_stride, int first, int last) {
    const float* rows = static_cast<const float*>(input);
    size_t stride = input_row_bytes(matrix) / sizeof(float);
    if (matrix.format == FLOAT32) {
        multiply_float(static_cast<const float*>(matrix.values), matrix.depth, rows, stride, num_rows, out, out_stride, first, last);
    } else {
        multiply_float(static_cast<const uint16_t*>(matrix.values), matrix.depth, rows, stride, num_rows, out, out_stride, first, last);
    }
}

}  // namespace tandem
