// Sparse convolutions and linear layers on a CPU, with a C interface; sparselearning/sparse/ops.py calls it.
#include <climits>
#include <cstring>
#include <utility>

#include "cutting.h"
#include "product.h"

// Sums that lie in an array stay in registers only if every loop over them is unrolled.
#define UNROLL _Pragma("GCC unroll 32")

#define VECTOR_BYTES 16
#define TILE 8
namespace portable {
#include "vectorized.inc"
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
#include "vectorized.inc"
}
#undef VECTOR_BYTES
#undef TILE
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")
#define VECTOR_BYTES 64
#define TILE 16
namespace avx512 {
#include "vectorized.inc"
}
#undef VECTOR_BYTES
#undef TILE
#pragma GCC pop_options
#endif

namespace {

enum InstructionSet { PORTABLE, AVX2, AVX512 };

template <class S>
struct Kernels {
    void (*convolve)(const Product<S>&);
    void (*weight_gradient)(const Product<S>&);
    void (*multiply_few)(const Product<S>&);
    void (*transpose)(const Transposition<S>&, const Parallel&);
    void (*affine)(const Affine<S>&, const Parallel&);
};

#define KERNELS_OF(set) \
    {set::convolve<S>, set::weight_gradient<S>, set::multiply_few<S>, set::transpose<S>, set::affine<S>}

template <class S>
const Kernels<S>& kernels(const Machine& machine) {
    static const Kernels<S> table[] = {
        KERNELS_OF(portable),
#ifdef X86_DISPATCH
        KERNELS_OF(avx2),
        KERNELS_OF(avx512),
#endif
    };
    return table[machine.instruction_set];
}

Parallel parallel_of(const Machine& machine) { return {int(machine.threads), machine.fork}; }

Parallel threads_for(const Conv& c, int64_t nonzeros, const Parallel& parallel) {
    const int64_t read = c.in_channels * c.height * c.width, pixels = c.out_height * c.out_width;
    return parallel.only_if(c.images * (read + (c.out_channels + nonzeros) * pixels) > MANY_NUMBERS);
}

void check_below(const int32_t* index, int64_t count, int64_t limit, const Parallel& parallel) {
    std::atomic<bool> below{true};
    parallel.only_if(count > MANY_INDICES).run(count, [&](int64_t from, int64_t to) {
        bool found = true;
        for (int64_t k = from; k < to; ++k) found &= uint32_t(index[k]) < uint32_t(limit);
        if (!found) below = false;
    });
    if (!below) throw MISFIT;
}

template <class S>
void check_fit(const Rows<S>& rows, int64_t columns, const Parallel& parallel) {
    if (rows.start[0] != 0) throw MISFIT;
    for (int64_t r = 0; r < rows.count; ++r)
        if (rows.start[r + 1] < rows.start[r]) throw MISFIT;
    check_below(rows.column, rows.nonzeros(), columns, parallel);
}

// The rows of the weight, one for each output channel.
template <class S>
Rows<S> rows_of(const Layer<S>& layer, const Parallel& parallel) {
    const Conv& c = layer.conv;
    const Rows<S> rows{c.out_channels, layer.start, layer.column, layer.value};
    check_fit(rows, c.in_channels / c.groups * c.taps(), parallel);
    return rows;
}

template <class S>
void forward(const Machine& machine, const Layer<S>& layer) {
    const Conv& c = layer.conv;
    const Parallel parallel = parallel_of(machine);
    const Rows<S> rows = rows_of(layer, parallel);
    if (c.images == 0) return;
    kernels<S>(machine).convolve({forward_grid(c), c.images, c.in_channels, c.groups, c.batch_last != 0, rows, layer.x,
                                  nullptr, layer.bias, layer.relu != 0, layer.result,
                                  threads_for(c, rows.nonzeros(), parallel)});
}

// A row is one phase plane of one input channel.
template <class S>
void input_gradient(const Machine& machine, const Layer<S>& layer) {
    const Conv& c = layer.conv;
    const Parallel parallel = parallel_of(machine);
    Rows<S> rows{c.in_channels * c.stride_y * c.stride_x, layer.start, layer.column, nullptr};
    check_fit(rows, c.out_channels / c.groups * c.taps(), parallel);
    if (c.images == 0) return;
    const int64_t nonzeros = rows.nonzeros();
    check_below(layer.order, nonzeros, nonzeros, parallel);
    std::vector<S> ordered(nonzeros);
    parallel.only_if(nonzeros > MANY_INDICES).run(nonzeros, [&](int64_t from, int64_t to) {
        for (int64_t k = from; k < to; ++k) ordered[k] = layer.value[layer.order[k]];
    });
    rows.value = ordered.data();
    kernels<S>(machine).convolve({input_gradient_grid(c), c.images, c.out_channels, c.groups, c.batch_last != 0, rows,
                                  layer.dy, nullptr, nullptr, false, layer.result, threads_for(c, nonzeros, parallel)});
}

template <class S>
void weight_gradient(const Machine& machine, const Layer<S>& layer) {
    const Conv& c = layer.conv;
    const Parallel parallel = parallel_of(machine);
    const Rows<S> rows = rows_of(layer, parallel);
    if (c.images == 0) {
        std::fill(layer.result, layer.result + rows.nonzeros(), S(0));
        return;
    }
    kernels<S>(machine).weight_gradient({forward_grid(c), c.images, c.in_channels, c.groups, c.batch_last != 0, rows,
                                         layer.x, layer.dy, nullptr, false, layer.result,
                                         threads_for(c, rows.nonzeros(), parallel)});
}

// The forward pass of a linear layer whose batch has few rows, each of them contiguous.
template <class S>
void few(const Machine& machine, const Layer<S>& layer) {
    const Conv& c = layer.conv;
    const Parallel parallel = parallel_of(machine);
    kernels<S>(machine).multiply_few({{}, c.width, c.in_channels, 1, false, rows_of(layer, parallel), layer.x, nullptr,
                                      layer.bias, layer.relu != 0, layer.result, parallel});
}

template <class S>
void transpose(const Machine& machine, const Transposition<S>& given) {
    kernels<S>(machine).transpose(given, parallel_of(machine));
}

template <class S>
void affine(const Machine& machine, const Affine<S>& given) {
    kernels<S>(machine).affine(given, parallel_of(machine));
}

// Sorts the nonzeros by (input channel, phase), as the input gradient reads them. A row of the result is one phase
// plane of one input channel; its columns are output channel in the group * taps + tap.
void transpose_rows(const Machine& machine, const Layer<float>& layer, int32_t* to_start, int32_t* to_column,
                    int32_t* order) {
    const Conv& c = layer.conv;
    const int32_t *start = layer.start, *column = layer.column;
    const int64_t taps = c.taps(), phases = c.stride_y * c.stride_x;
    const int64_t per_group = c.in_channels / c.groups, rows_per_group = c.out_channels / c.groups;
    rows_of(layer, parallel_of(machine));
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
}

// Exceptions stop at the C interface.
template <class Body>
Status guarded(const Body& body) {
    try {
        body();
        return OK;
    } catch (Status status) {
        return status;
    } catch (...) {
        return NO_MEMORY;
    }
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

EXPORT Status sl_transpose_rows(const Machine* machine, const Layer<float>* layer, int32_t* to_start,
                                int32_t* to_column, int32_t* order) {
    return guarded([&] { transpose_rows(*machine, *layer, to_start, to_column, order); });
}

#define EXPORT_FOR(S, function, Arguments) \
    EXPORT Status sl_##function##_##S(const Machine* machine, const Arguments<S>* arguments) { \
        return guarded([&] { function(*machine, *arguments); }); \
    }
#define EXPORT_FOR_ALL(function, Arguments) \
    EXPORT_FOR(float, function, Arguments) \
    EXPORT_FOR(double, function, Arguments)

EXPORT_FOR_ALL(forward, Layer)
EXPORT_FOR_ALL(input_gradient, Layer)
EXPORT_FOR_ALL(weight_gradient, Layer)
EXPORT_FOR_ALL(few, Layer)
EXPORT_FOR_ALL(transpose, Transposition)
EXPORT_FOR_ALL(affine, Affine)
