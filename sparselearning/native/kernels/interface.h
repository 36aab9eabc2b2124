// What the functions of the library are given and return. library.py and sparse/interface.py pass these structs, field
// by field in the same order.
#pragma once

#include <cstdint>

#define EXPORT extern "C" __attribute__((visibility("default")))

// What every function returns; library.py turns all but OK into errors.
enum Status { OK, MISFIT, NO_MEMORY, TOO_LARGE };

// GOMP_parallel's signature: it runs a function on several threads. The caller gives it, so that the threads are those
// of torch's own pool: two OpenMP pools that spin on the same cores slow each other down.
using Fork = void (*)(void (*)(void*), void*, unsigned, unsigned);

// What a function runs on.
struct Machine {
    int64_t instruction_set, threads;
    Fork fork;
};

// A convolution. A linear layer is a 1x1 convolution over one image, one pixel high and as wide as the batch.
struct Conv {
    int64_t images, in_channels, height, width;
    int64_t out_channels, out_height, out_width;
    int64_t kernel_y, kernel_x, stride_y, stride_x, pad_y, pad_x, dilation_y, dilation_x, groups;
    int64_t batch_last;  // memory order of activations: NCHW, or CHWN, where a vector holds one pixel of many images
    int64_t x_first, y_first;  // with batch_last: whether input and output are in NCHW all the same

    int64_t taps() const { return kernel_y * kernel_x; }
};

// A sparse layer and the tensors of one call. Tensors that the function does not use are null.
//
// The weight has the shape (out_channels, in_channels / groups, kernel_y, kernel_x) and is stored by rows: row r has
// the nonzeros start[r] to start[r + 1], and `column` is a nonzero's place in the flattened row. The input gradient
// reads the nonzeros as transpose_rows sorts them; `order` says where in `value` each one lies.
template <class S>
struct Layer {
    Conv conv;
    const int32_t *start, *column, *order;
    const S *value, *bias;
    const S *x, *dy;
    S* result;
    int64_t relu;
};

// result = act(x * scale + shift), per channel. `inner` numbers of one channel lie side by side.
template <class S>
struct Affine {
    const S *x, *scale, *shift;
    S* result;
    int64_t outer, channels, inner, relu;
};

// result[column][row] = x[row][column].
template <class S>
struct Transposition {
    const S* x;
    S* result;
    int64_t rows, columns;
};
