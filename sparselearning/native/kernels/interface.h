// What the functions of the library are given and return. library.py and sparse/interface.py pass these structs, field
// by field in the same order.
#pragma once

#include <cstdint>

#define EXPORT extern "C" __attribute__((visibility("default")))

// Counts the changes of this file. library.py refuses a library that was built from another version of it.
constexpr int64_t INTERFACE = 8;

// What every function returns; library.py turns all but OK into errors.
enum Status { OK, MISFIT, NO_MEMORY, TOO_LARGE, WRONG_SIZES };

// GOMP_parallel's signature: it runs a function on several threads. The caller gives it, so that the threads are those
// of torch's own pool: two OpenMP pools that spin on the same cores slow each other down.
using Fork = void (*)(void (*)(void*), void*, unsigned, unsigned);

// What a function runs on.
struct Machine {
    int64_t instruction_set, threads;
    Fork fork;
    int64_t awake;  // whether the threads have just ended another function's work
};

// A convolution. A linear layer is a 1x1 convolution over one image, one pixel high and as wide as the batch.
struct Conv {
    int64_t images, in_channels, height, width;
    int64_t out_channels, out_height, out_width;
    int64_t kernel_y, kernel_x, stride_y, stride_x, pad_y, pad_x, dilation_y, dilation_x, groups;
    int64_t batch_last;  // memory order of activations: NCHW, or CHWN, where a vector holds one pixel of many images
    // Whether input and output have the batch first in memory all the same: NCHW, or the rows of a linear layer.
    int64_t x_first, y_first;

    int64_t taps() const { return kernel_y * kernel_x; }
};

// A tensor's memory. The functions compare the count with what the sizes say before they read or write anything.
template <class T>
struct Span {
    T* data;
    int64_t count;

    T& operator[](int64_t i) const { return data[i]; }
};

// Max-pooling of windows of y x x pixels that do not overlap; y is 0 where there is none. `place` is which pixel of its
// window each pooled number came from, counted by rows, or NOWHERE where a ReLU cut it.
struct Window {
    Span<uint8_t> place;
    int64_t y, x;

    int64_t pixels() const { return y * x; }
};

constexpr int64_t NOWHERE = 255;

// A sparse layer and the tensors of one call. Tensors that the function does not use are empty. Where the layer's output
// is pooled, y and dy are those of the pooled output. Where there is a `residual`, a forward pass adds it before the ReLU;
// it lies in memory as the result does.
//
// The weight has the shape (out_channels, in_channels / groups, kernel_y, kernel_x) and is stored by rows: row r has
// the nonzeros start[r] to start[r + 1], and `column` is a nonzero's place in the flattened row. The input gradient
// reads the nonzeros as transpose_rows sorts them; `order` says where in `value` each one lies.
template <class S>
struct Layer {
    Conv conv;
    Span<const int32_t> start, column, order;
    Span<const S> value, bias, x, dy, residual;
    Span<S> result, dbias;
    Window window;
    int64_t relu;
    int64_t checked;  // whether an earlier call has found that these indices fit this weight
};

// The nonzeros of a weight, and where they go in the order of the input gradient.
struct Sorting {
    Conv conv;
    Span<const int32_t> start, column;
    Span<int32_t> to_start, to_column, to_order;
};

// result = act(x * scale + shift), per channel. `inner` numbers of one channel lie side by side.
template <class S>
struct Affine {
    Span<const S> x, scale, shift;
    Span<S> result;
    int64_t outer, channels, inner, relu;
};

// A batch normalisation by the statistics of the batch, or its gradients. The `inner` numbers of one channel lie side by
// side. Without `scale` and `shift` these are 1 and 0.
template <class S>
struct Normalisation {
    Span<const S> x, dy, scale, shift;
    Span<S> mean, variance, result, dscale, dshift;
    int64_t channels, inner;
    double eps;

    double scale_of(int64_t c) const { return scale.data ? scale[c] : 1; }
    double shift_of(int64_t c) const { return shift.data ? shift[c] : 0; }
};

// result[column][row] = x[row][column].
template <class S>
struct Transposition {
    Span<const S> x;
    Span<S> result;
    int64_t rows, columns;
};

// The largest number of each window of a plane, one plane after another, each by rows. Windows may overlap, and reach
// beyond the plane, but none lies outside of it.
template <class S>
struct Sliding {
    Span<const S> x;
    Span<S> result;
    int64_t planes, height, width, out_height, out_width;
    int64_t kernel_y, kernel_x, stride_y, stride_x, pad_y, pad_x;
};

// result[n][plane] = the mean of a plane's pixels, each of which has `inner` numbers side by side.
template <class S>
struct Averaging {
    Span<const S> x;
    Span<S> result;
    int64_t planes, pixels, inner;
};

// A pooling, or its gradient. The planes of `channels` channels are height x width pixels, and a pixel has `inner`
// numbers side by side.
template <class S>
struct Pooling {
    Span<const S> x, dy;
    Span<S> result;
    Window window;
    int64_t channels, height, width, inner, relu;
};

// An address among a function's arguments, `field` bytes from their beginning, that is other in each call:
// slots[slot] + offset.
struct Patch {
    int64_t field, slot, offset;
};

// A function of a list, and its arguments, `bytes` of them, as they were in the call that was watched.
struct Entry {
    Status (*function)(const Machine*, const void*);
    const void* arguments;
    int64_t bytes;
    const Patch* patches;
    int64_t count;
};
