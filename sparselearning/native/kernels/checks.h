// What the caller gives is checked before any tensor is read or written: the sizes, then the lengths, then the indices.
// After that the kernels need no checks of their own.
#pragma once

#include <climits>
#include <initializer_list>

#include "parallel.h"
#include "product.h"

constexpr int64_t MOST_PHASES = 1 << 16;         // stride_y * stride_x
constexpr int64_t MOST_PHASE_PLANES = 1 << 22;   // of all input channels, where the stride is not 1
constexpr int64_t MOST_TAPS = 1 << 20;           // kernel_y * kernel_x

inline void require(bool holds, Status otherwise = WRONG_SIZES) {
    if (!holds) throw otherwise;
}

inline int64_t product_of(std::initializer_list<int64_t> sizes) {
    int64_t product = 1;
    for (int64_t size : sizes) require(!__builtin_mul_overflow(product, size, &product), TOO_LARGE);
    return product;
}

// The numbers of a weight that has no input yet. Every size fits in 31 bits, so that sums and products of two do not
// overflow.
inline void check_weight(const Conv& c) {
    for (int64_t size : {c.in_channels, c.out_channels, c.pad_y, c.pad_x}) require(size >= 0 && size <= INT32_MAX);
    for (int64_t size : {c.kernel_y, c.kernel_x, c.stride_y, c.stride_x, c.dilation_y, c.dilation_x, c.groups})
        require(size >= 1 && size <= INT32_MAX);
    require(c.in_channels % c.groups == 0 && c.out_channels % c.groups == 0);
    const int64_t phases = c.stride_y * c.stride_x;
    require(c.taps() <= MOST_TAPS && c.in_channels * c.taps() <= INT32_MAX, TOO_LARGE);
    require(c.out_channels / c.groups * c.taps() <= INT32_MAX, TOO_LARGE);
    require(phases == 1 || (phases <= MOST_PHASES && c.in_channels * phases <= MOST_PHASE_PLANES), TOO_LARGE);
}

inline void check_axis(int64_t size, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation, int64_t out_size) {
    const int64_t room = size + 2 * pad - dilation * (kernel - 1) - 1;
    require(room >= 0 && out_size == room / stride + 1);
}

// The sizes of a convolution and its activations.
inline void check_sizes(const Conv& c) {
    check_weight(c);
    for (int64_t size : {c.images, c.in_channels, c.height, c.width, c.out_channels, c.out_height, c.out_width})
        require(size >= 1 && size <= INT32_MAX);
    check_axis(c.height, c.kernel_y, c.stride_y, c.pad_y, c.dilation_y, c.out_height);
    check_axis(c.width, c.kernel_x, c.stride_x, c.pad_x, c.dilation_x, c.out_width);
    const bool linear = c.images == 1 && c.height == 1 && c.taps() == 1 && c.stride_y * c.stride_x == 1 && !c.pad_x &&
                        !c.pad_y && c.groups == 1;
    require(c.batch_last || linear || !(c.x_first || c.y_first));
}

inline int64_t input_numbers(const Conv& c) { return product_of({c.images, c.in_channels, c.height, c.width}); }

inline void check_window(const Window& window, int64_t height, int64_t width) {
    require(height <= INT32_MAX && width <= INT32_MAX);
    require(window.y >= 1 && window.y <= NOWHERE && window.x >= 1 && window.x <= NOWHERE);
    require(window.pixels() <= NOWHERE && height >= window.y && width >= window.x);
}

inline int64_t output_numbers(const Conv& c) {
    return product_of({c.images, c.out_channels, c.out_height, c.out_width});
}

// Whether all of `count` indices lie in [0, limit), in the widest instruction set of this processor.
bool all_below(const int32_t* index, int64_t count, int64_t limit);

inline void check_below(const Span<const int32_t>& index, int64_t limit, const Parallel& parallel) {
    std::atomic<bool> below{true};
    parallel.only_if(index.count, MANY_INDICES).run(index.count, [&](int64_t from, int64_t to) {
        if (!all_below(index.data + from, to - from, limit)) below = false;
    });
    require(below, MISFIT);
}

// Where the nonzeros of `rows` rows start.
inline void check_starts(const Span<const int32_t>& start, const Span<const int32_t>& column, int64_t rows) {
    require(start.count == rows + 1 && column.count <= INT32_MAX);
    require(start[0] == 0 && start[rows] == column.count, MISFIT);
    uint32_t bits = 0;  // the highest is set by a start below zero, and by one below the start before it
    for (int64_t r = 0; r < rows; ++r) bits |= uint32_t(start[r + 1]) | (uint32_t(start[r + 1]) - uint32_t(start[r]));
    require(bits >> 31 == 0, MISFIT);
}

// The nonzeros of `rows` rows, whose columns lie in [0, columns).
inline void check_indices(const Span<const int32_t>& start, const Span<const int32_t>& column, int64_t rows,
                          int64_t columns, const Parallel& parallel) {
    check_starts(start, column, rows);
    check_below(column, columns, parallel);
}
