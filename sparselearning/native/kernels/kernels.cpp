// Sparse convolution on a CPU, with a C interface; sparselearning/sparse/ops.py is its only caller.
//
// A weight of shape (out_channels, in_channels / groups, kernel_y, kernel_x) is stored by rows: `start` has
// out_channels + 1 entries, `column` counts inside one flattened row. A linear layer is a 1x1 convolution over one
// image, one pixel high and as wide as the batch.
//
// Every function returns 0, or 1 when the indices do not fit the shape, 2 when memory runs out, 3 when a layer is
// too large for 32-bit offsets.
#if __has_include(<unistd.h>)
#include <unistd.h>
#endif

#include <climits>
#include <cstring>
#include <utility>

#include "geometry.h"
#include "parallel.h"

// Sums that live in an array stay in registers only if every loop over them is unrolled.
#define UNROLL _Pragma("GCC unroll 32")

template <class S>
struct Rows {
    int64_t count;
    const int32_t* start;
    const int32_t* column;
    const S* value;
};

// Planes of one strip together: seven eighths of a core's second-level cache, as far as 1 MB of it was measured.
inline int64_t cache_bytes() {
    static const int64_t bytes = [] {
        int64_t found = 0;
#ifdef _SC_LEVEL2_CACHE_SIZE
        found = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
        return (found > 0 ? std::clamp<int64_t>(found, 1 << 18, 1 << 20) : 1 << 20) / 8 * 7;
    }();
    return bytes;
}

// Of the first-level cache, what the planes under one tile may take; the rest is for indices and sums that pass through.
constexpr int64_t L1_BYTES = 24576;

// Nonzeros of a row in one block of channels, at least, on average.
constexpr int64_t NONZEROS_TOGETHER = 24;

// Tiles from which on it pays to look up where every nonzero reads.
constexpr int64_t TILES_TO_LOOK_UP = 2;

// Indices, and numbers multiplied, read and written, from which on several threads are worth waking for them.
constexpr int64_t MANY_INDICES = 1 << 17;
#ifndef MANY_NUMBERS
#define MANY_NUMBERS (1 << 20)
#endif

// Rows whose sums of one tile stay in the second-level cache.
constexpr int64_t ROWS_TOGETHER = 512;

#define VECTOR_BYTES 16
#define TILE 8
namespace portable {
#include "vector.inc"
}
#undef VECTOR_BYTES
#undef TILE

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define X86_DISPATCH

#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define VECTOR_BYTES 32
#define TILE 8
namespace avx2 {
#include "vector.inc"
}
#undef VECTOR_BYTES
#undef TILE
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")
#define VECTOR_BYTES 64
#define TILE 16
namespace avx512 {
#include "vector.inc"
}
#undef VECTOR_BYTES
#undef TILE
#pragma GCC pop_options
#endif

namespace {

enum InstructionSet { PORTABLE, AVX2, AVX512 };

template <class S>
struct Kernels {
    decltype(&portable::convolve<S, true>) convolve[2];
    decltype(&portable::weight_gradient<S, true>) weight_gradient[2];
    decltype(&portable::transpose<S>) transpose;
    decltype(&portable::multiply_few<S>) multiply_few;
    decltype(&portable::affine<S>) affine;
};

#define KERNELS_OF(set) \
    {{set::convolve<S, false>, set::convolve<S, true>}, \
     {set::weight_gradient<S, false>, set::weight_gradient<S, true>}, \
     set::transpose<S>, \
     set::multiply_few<S>, \
     set::affine<S>}

template <class S>
const Kernels<S>& kernels(int instruction_set) {
    static const Kernels<S> table[] = {
        KERNELS_OF(portable),
#ifdef X86_DISPATCH
        KERNELS_OF(avx2),
        KERNELS_OF(avx512),
#endif
    };
    return table[instruction_set];
}

bool all_below(const int32_t* index, int64_t count, int64_t limit, const Parallel& parallel) {
    std::atomic<bool> below{true};
    parallel.only_if(count > MANY_INDICES).run(count, [&](int64_t from, int64_t to) {
        bool found = true;
        for (int64_t k = from; k < to; ++k) found &= uint32_t(index[k]) < uint32_t(limit);
        if (!found) below = false;
    });
    return below;
}

bool fits(const int32_t* start, const int32_t* column, int64_t rows, int64_t columns, const Parallel& parallel) {
    if (start[0] != 0) return false;
    for (int64_t r = 0; r < rows; ++r)
        if (start[r + 1] < start[r]) return false;
    return all_below(column, start[rows], columns, parallel);
}

// Exceptions stop at the C interface.
template <class Body>
int guarded(const Body& body) {
    try {
        return body();
    } catch (...) {
        return 2;
    }
}

Conv conv_of(const int64_t* shape) {
    Conv conv;
    static_assert(sizeof(Conv) == 19 * sizeof(int64_t), "interface.py passes 19 numbers");
    std::memcpy(&conv, shape, sizeof conv);
    return conv;
}

Parallel threads_for(const Conv& c, int64_t nonzeros, const Parallel& parallel) {
    const int64_t read = c.in_channels * c.height * c.width, pixels = c.out_height * c.out_width;
    return parallel.only_if(c.images * (read + (c.out_channels + nonzeros) * pixels) > MANY_NUMBERS);
}

template <class S>
int forward(const int64_t* shape, const S* x, const int32_t* start, const int32_t* column, const S* value,
            const S* bias, bool relu, S* y, int instruction_set, const Parallel& parallel) {
    const Conv c = conv_of(shape);
    if (!fits(start, column, c.out_channels, c.in_channels / c.groups * c.taps(), parallel)) return 1;
    if (c.images == 0) return 0;
    return kernels<S>(instruction_set).convolve[c.batch_last](forward_grid(c), c.images, c.in_channels, x,
                                                              {c.out_channels, start, column, value}, c.groups, bias,
                                                              relu, y, threads_for(c, start[c.out_channels], parallel));
}

// `start`, `column` and `order` as sl_transpose_rows gives them.
template <class S>
int input_gradient(const int64_t* shape, const S* dy, const int32_t* start, const int32_t* column, const int32_t* order,
                   const S* value, S* dx, int instruction_set, const Parallel& parallel) {
    const Conv c = conv_of(shape);
    const int64_t rows = c.in_channels * c.stride_y * c.stride_x;
    if (!fits(start, column, rows, c.out_channels / c.groups * c.taps(), parallel)) return 1;
    if (c.images == 0) return 0;
    const int64_t nonzeros = start[rows];
    if (!all_below(order, nonzeros, nonzeros, parallel)) return 1;
    std::vector<S> ordered(nonzeros);
    parallel.only_if(nonzeros > MANY_INDICES).run(nonzeros, [&](int64_t from, int64_t to) {
        for (int64_t k = from; k < to; ++k) ordered[k] = value[order[k]];
    });
    return kernels<S>(instruction_set).convolve[c.batch_last](input_gradient_grid(c), c.images, c.out_channels, dy,
                                                              {rows, start, column, ordered.data()}, c.groups, nullptr,
                                                              false, dx, threads_for(c, nonzeros, parallel));
}

template <class S>
int weight_gradient(const int64_t* shape, const S* x, const S* dy, const int32_t* start, const int32_t* column,
                    S* gradient, int instruction_set, const Parallel& parallel) {
    const Conv c = conv_of(shape);
    if (!fits(start, column, c.out_channels, c.in_channels / c.groups * c.taps(), parallel)) return 1;
    if (c.images == 0) {
        std::memset(gradient, 0, sizeof(S) * start[c.out_channels]);
        return 0;
    }
    return kernels<S>(instruction_set).weight_gradient[c.batch_last](forward_grid(c), c.images, c.in_channels, x,
                                                                     {c.out_channels, start, column, nullptr}, c.groups,
                                                                     dy, gradient,
                                                                     threads_for(c, start[c.out_channels], parallel));
}

// Sorts the nonzeros by (input channel, phase), as the input gradient reads them. A row of the result is one phase
// plane of one input channel; its columns are output channel in the group * taps + tap.
int transpose_rows(const int64_t* shape, const int32_t* start, const int32_t* column, int32_t* to_start,
                   int32_t* to_column, int32_t* order) {
    const Conv c = conv_of(shape);
    const int64_t taps = c.taps(), phases = c.stride_y * c.stride_x;
    const int64_t per_group = c.in_channels / c.groups, rows_per_group = c.out_channels / c.groups;
    if (!fits(start, column, c.out_channels, per_group * taps, {1, nullptr})) return 1;
    std::vector<int64_t> phase(taps);
    for (int64_t t = 0; t < taps; ++t)
        phase[t] = tap_of(t / c.kernel_x, c.stride_y, c.pad_y, c.dilation_y).phase * c.stride_x +
                   tap_of(t % c.kernel_x, c.stride_x, c.pad_x, c.dilation_x).phase;
    const auto row_of = [&](int64_t out_channel, int64_t k) {
        return (out_channel / rows_per_group * per_group + column[k] / taps) * phases + phase[column[k] % taps];
    };
    std::vector<int32_t> next(c.in_channels * phases + 1);
    for (int64_t o = 0; o < c.out_channels; ++o)
        for (int64_t k = start[o]; k < start[o + 1]; ++k) ++next[row_of(o, k) + 1];
    for (size_t r = 1; r < next.size(); ++r) next[r] += next[r - 1];
    std::copy(next.begin(), next.end(), to_start);
    for (int64_t o = 0; o < c.out_channels; ++o)
        for (int64_t k = start[o]; k < start[o + 1]; ++k) {
            const int32_t at = next[row_of(o, k)]++;
            to_column[at] = int32_t(o % rows_per_group * taps + column[k] % taps);
            order[at] = int32_t(k);
        }
    return 0;
}

template <class S>
int few(const S* x, int64_t batch, int64_t inputs, int64_t outputs, const int32_t* start, const int32_t* column,
        const S* value, const S* bias, bool relu, S* y, int instruction_set, const Parallel& parallel) {
    if (!fits(start, column, outputs, inputs, parallel)) return 1;
    kernels<S>(instruction_set).multiply_few({outputs, start, column, value}, x, batch, inputs, bias, relu, y, parallel);
    return 0;
}

}  // namespace

// The widest instruction set of this processor: 0 portable, 1 AVX2 and FMA, 2 AVX-512.
EXPORT int sl_instruction_set() {
#ifdef X86_DISPATCH
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma"))
        return AVX512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return AVX2;
#endif
    return PORTABLE;
}

EXPORT int sl_transpose_rows(const int64_t* shape, const int32_t* start, const int32_t* column, int32_t* to_start,
                             int32_t* to_column, int32_t* order, int64_t, int64_t, Fork) {
    return guarded([&] { return transpose_rows(shape, start, column, to_start, to_column, order); });
}

#define EXPORT_FOR(S, name) \
    EXPORT int sl_forward_##name(const int64_t* shape, const S* x, const int32_t* start, const int32_t* column, \
                                 const S* value, const S* bias, int64_t relu, S* y, int64_t set, int64_t threads, Fork fork) { \
        return guarded([&] { \
            return forward<S>(shape, x, start, column, value, bias, relu != 0, y, int(set), Parallel{int(threads), fork}); \
        }); \
    } \
    EXPORT int sl_input_gradient_##name(const int64_t* shape, const S* dy, const int32_t* start, \
                                        const int32_t* column, const int32_t* order, const S* value, S* dx, int64_t set, \
                                        int64_t threads, Fork fork) { \
        return guarded([&] { \
            return input_gradient<S>(shape, dy, start, column, order, value, dx, int(set), Parallel{int(threads), fork}); \
        }); \
    } \
    EXPORT int sl_weight_gradient_##name(const int64_t* shape, const S* x, const S* dy, const int32_t* start, \
                                         const int32_t* column, S* gradient, int64_t set, int64_t threads, Fork fork) { \
        return guarded([&] { \
            return weight_gradient<S>(shape, x, dy, start, column, gradient, int(set), Parallel{int(threads), fork}); \
        }); \
    } \
    EXPORT int sl_few_##name(const S* x, int64_t batch, int64_t inputs, int64_t outputs, const int32_t* start, \
                             const int32_t* column, const S* value, const S* bias, int64_t relu, S* y, int64_t set, \
                             int64_t threads, Fork fork) { \
        return guarded([&] { \
            return few<S>(x, batch, inputs, outputs, start, column, value, bias, relu != 0, y, int(set), \
                          Parallel{int(threads), fork}); \
        }); \
    } \
    EXPORT int sl_transpose_##name(const S* from, int64_t rows, int64_t columns, S* to, int64_t set, int64_t threads, \
                                   Fork fork) { \
        return guarded([&] { \
            kernels<S>(int(set)).transpose(from, rows, columns, to, Parallel{int(threads), fork}); \
            return 0; \
        }); \
    } \
    EXPORT int sl_affine_##name(const S* x, int64_t outer, int64_t channels, int64_t inner, const S* scale, \
                                const S* shift, int64_t relu, S* y, int64_t set, int64_t threads, Fork fork) { \
        return guarded([&] { \
            const Parallel parallel{int(threads), fork}; \
            kernels<S>(int(set)).affine(x, outer, channels, inner, scale, shift, relu != 0, y, parallel); \
            return 0; \
        }); \
    }

EXPORT_FOR(float, float)
EXPORT_FOR(double, double)
