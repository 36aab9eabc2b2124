// Sparse convolutions and linear layers on a CPU, with a C interface; sparselearning/sparse/ops.py calls it.
#ifdef __x86_64__
#include <immintrin.h>
#endif

#include <array>
#include <cmath>
#include <cstring>
#include <iterator>
#include <type_traits>
#include <utility>

#include "checks.h"
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

constexpr int64_t MOST_THREADS = 1024;

constexpr int64_t MOST_BYTES = sizeof(Layer<double>);  // of a function's arguments: a layer has the most fields

// The widest instruction set of this processor.
int best_instruction_set() {
    static const int best = [] {
#ifdef X86_DISPATCH
        __builtin_cpu_init();
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
            __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma"))
            return AVX512;
        if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return AVX2;
#endif
        return PORTABLE;
    }();
    return best;
}

}  // namespace

bool all_below(const int32_t* index, int64_t count, int64_t limit) {
#ifdef X86_DISPATCH
    if (best_instruction_set() == AVX512) return avx512::all_below(index, count, limit);
    if (best_instruction_set() == AVX2) return avx2::all_below(index, count, limit);
#endif
    return portable::all_below(index, count, limit);
}

namespace {

template <class S>
struct Kernels {
    void (*convolve)(const Product<S>&);
    void (*weight_gradient)(const Product<S>&);
    bool (*multiply_few)(const Product<S>&);
    void (*transpose)(const Transposition<S>&, const Parallel&);
    void (*affine)(const Affine<S>&, const Parallel&);
    void (*normalise)(const Normalisation<S>&, const Parallel&);
    void (*normalise_gradient)(const Normalisation<S>&, const Parallel&);
    void (*pool)(const Pooling<S>&, const Parallel&);
    void (*pool_gradient)(const Pooling<S>&, const Parallel&);
    void (*pool_planes)(const Sliding<S>&, const Parallel&);
    void (*average_planes)(const Averaging<S>&, const Parallel&);
};

#define KERNELS_OF(set) \
    {set::convolve<S>, set::weight_gradient<S>, set::multiply_few<S>,       set::transpose<S>, \
     set::affine<S>,   set::normalise<S>,       set::normalise_gradient<S>, set::pool<S>, \
     set::pool_gradient<S>, set::pool_planes<S>, set::average_planes<S>}

// Whether half of the lanes of the widest vectors would be empty: then narrower ones move half as many bytes.
template <class S>
bool is_narrow(int64_t numbers) {
    return numbers <= int64_t(32 / sizeof(S));
}

template <class S>
bool is_narrow(const Product<S>& product) {
    return is_narrow<S>(product.batch_last ? product.images : product.grid.positions());
}

template <class S>
const Kernels<S>& kernels(const Machine& machine, bool narrow = false) {
    static const Kernels<S> table[] = {
        KERNELS_OF(portable),
#ifdef X86_DISPATCH
        KERNELS_OF(avx2),
        KERNELS_OF(avx512),
#endif
    };
    require(machine.instruction_set >= 0 && machine.instruction_set <= best_instruction_set());
    return table[narrow ? std::min<int64_t>(machine.instruction_set, AVX2) : machine.instruction_set];
}

Parallel parallel_of(const Machine& machine) {
    return {int(std::clamp<int64_t>(machine.threads, 1, MOST_THREADS)), machine.fork, machine.awake != 0};
}

Parallel threads_for(const Conv& c, int64_t nonzeros, const Parallel& parallel) {
    const int64_t read = c.in_channels * c.height * c.width, pixels = c.out_height * c.out_width;
    return parallel.only_if(c.images * (read + (c.out_channels + nonzeros) * pixels), MANY_NUMBERS);
}

// The rows of the weight, one for each output channel, and the sizes of the layer, after all checks of them.
template <class S>
Rows<S> rows_of(const Layer<S>& layer, const Parallel& parallel) {
    const Conv& c = layer.conv;
    check_sizes(c);
    if (!layer.checked)
        check_indices(layer.start, layer.column, c.out_channels, c.in_channels / c.groups * c.taps(), parallel);
    return {c.out_channels, layer.start.data, layer.column.data, layer.value.data};
}

// The numbers of a layer's output, pooled if it has a window.
template <class S>
int64_t written_numbers(const Layer<S>& layer) {
    const Conv& c = layer.conv;
    const Window& window = layer.window;
    const int64_t numbers = output_numbers(c);
    if (!window.y) return numbers;
    check_window(window, c.out_height, c.out_width);
    const int64_t pooled = c.images * c.out_channels * (c.out_height / window.y) * (c.out_width / window.x);
    require(c.batch_last && !c.y_first && window.place.count == pooled);
    return pooled;
}

template <class S>
void check_forward(const Layer<S>& layer) {
    const Conv& c = layer.conv;
    require(layer.value.count == layer.column.count);
    require(layer.bias.count == (layer.bias.data ? c.out_channels : 0));
    require(layer.x.count == input_numbers(c) && layer.result.count == written_numbers(layer));
    const bool alone = !layer.window.y && !c.y_first;
    require(layer.residual.count == (layer.residual.data && alone ? layer.result.count : 0));
}

// Whether a product makes rows of a linear layer, and so few that it needs no grid.
bool makes_few_rows(const Conv& c, bool by_rows) { return by_rows && !c.batch_last && c.width <= FEW; }

// A convolution that computes the same: pixel by pixel where that can be, and on whole vectors of two pixels where those
// of one would be half empty.
template <class S>
Conv simplified(const Machine& machine, const Layer<S>& layer) {
    const Conv& c = layer.conv;
    if (layer.window.y || !c.batch_last) return c;
    const bool halves = machine.instruction_set == AVX512 && c.images == int64_t(32 / sizeof(S));
    const Conv row = as_one_row(c);
    return row.batch_last && halves && c.out_width % 2 == 0 ? as_one_image(c) : row;
}

// Multiplies `rows` with the few rows of x, which has so many features; by_rows: whether they lie row by row.
template <class S>
void multiply_few(const Machine& machine, const Conv& c, const Rows<S>& rows, const S* x, int64_t features,
                  bool by_rows, const S* bias, bool relu, S* result) {
    const Parallel parallel = threads_for(c, rows.nonzeros(), parallel_of(machine));
    Product<S> product{{}, c.width, features, 1, false, by_rows, true, rows, x, result, parallel};
    product.bias = bias, product.relu = relu;
    require(kernels<S>(machine).multiply_few(product), MISFIT);
}

template <class S>
void forward(const Machine& machine, const Layer<S>& layer) {
    check_sizes(layer.conv);
    check_forward(layer);
    const Conv c = simplified(machine, layer);
    const Parallel parallel = parallel_of(machine);
    const S *x = layer.x.data, *bias = layer.bias.data;
    if (makes_few_rows(c, c.y_first) && !layer.window.y) {
        check_starts(layer.start, layer.column, c.out_channels);
        const Rows<S> rows{c.out_channels, layer.start.data, layer.column.data, layer.value.data, layer.checked != 0};
        return multiply_few(machine, c, rows, x, c.in_channels, c.x_first, bias, layer.relu, layer.result.data);
    }
    const Rows<S> rows = rows_of(layer, parallel);
    Product<S> product{forward_grid(c), c.images, c.in_channels, c.groups, c.batch_last != 0,
                       !c.batch_last && c.x_first, !c.batch_last && c.y_first, rows, x, layer.result.data,
                       threads_for(c, rows.nonzeros(), parallel)};
    product.bias = bias, product.relu = layer.relu != 0;
    product.window = layer.window, product.residual = layer.residual.data;
    kernels<S>(machine, is_narrow(product)).convolve(product);
}

// A row is one phase plane of one input channel.
template <class S>
void input_gradient(const Machine& machine, const Layer<S>& layer) {
    check_sizes(layer.conv);
    require(layer.dy.count == written_numbers(layer) && layer.result.count == input_numbers(layer.conv));
    const Conv c = simplified(machine, layer);
    const Parallel parallel = parallel_of(machine);
    const int64_t planes = c.in_channels * c.stride_y * c.stride_x, nonzeros = layer.column.count;
    check_indices(layer.start, layer.column, planes, c.out_channels / c.groups * c.taps(), parallel);
    require(layer.order.count == nonzeros && layer.value.count == nonzeros);
    check_below(layer.order, nonzeros, parallel);
    Memory memory;
    S* const ordered = static_cast<S*>(memory.at_least(nonzeros * sizeof(S)));
    parallel.only_if(nonzeros, MANY_INDICES).run(nonzeros, [&](int64_t from, int64_t to) {
        for (int64_t k = from; k < to; ++k) ordered[k] = layer.value[layer.order[k]];
    });
    const Rows<S> rows{planes, layer.start.data, layer.column.data, ordered};
    if (makes_few_rows(c, c.x_first) && !layer.window.y)
        return multiply_few(machine, c, rows, layer.dy.data, c.out_channels, c.y_first, {}, false, layer.result.data);
    Product<S> product{input_gradient_grid(c), c.images, c.out_channels, c.groups, c.batch_last != 0,
                       !c.batch_last && c.y_first, !c.batch_last && c.x_first, rows, layer.dy.data, layer.result.data,
                       threads_for(c, nonzeros, parallel)};
    product.x_window = layer.window;
    kernels<S>(machine, is_narrow(product)).convolve(product);
}

template <class S>
void weight_gradient(const Machine& machine, const Layer<S>& layer) {
    const Conv& c = layer.conv;
    const Parallel parallel = parallel_of(machine);
    const Rows<S> rows = rows_of(layer, parallel);
    require(layer.result.count == layer.column.count);
    require(layer.x.count == input_numbers(c) && layer.dy.count == written_numbers(layer));
    require(layer.dbias.count == 0 || layer.dbias.count == c.out_channels);
    Product<S> product{forward_grid(c), c.images, c.in_channels, c.groups, c.batch_last != 0,
                       !c.batch_last && c.x_first, !c.batch_last && c.y_first, rows, layer.x.data, layer.result.data,
                       threads_for(c, rows.nonzeros(), parallel)};
    product.dy = layer.dy.data, product.dy_window = layer.window;
    product.dbias = layer.dbias.count ? layer.dbias.data : nullptr;
    kernels<S>(machine, is_narrow(product)).weight_gradient(product);
}

template <class S>
void transpose(const Machine& machine, const Transposition<S>& given) {
    require(given.rows >= 0 && given.columns >= 0);
    const int64_t numbers = product_of({given.rows, given.columns});
    require(given.x.count == numbers && given.result.count == numbers);
    if (numbers) kernels<S>(machine).transpose(given, parallel_of(machine));
}

template <class S>
void affine(const Machine& machine, const Affine<S>& given) {
    require(given.outer >= 0 && given.channels >= 0 && given.inner >= 0);
    const int64_t numbers = product_of({given.outer, given.channels, given.inner});
    require(given.x.count == numbers && given.result.count == numbers);
    require(given.scale.count == given.channels && given.shift.count == given.channels);
    if (numbers) kernels<S>(machine).affine(given, parallel_of(machine));
}

// The statistics and gradients that a normalisation writes have one number for each channel.
template <class S>
Parallel check_normalisation(const Machine& machine, const Normalisation<S>& given) {
    require(given.channels >= 0 && given.inner >= 1);
    const int64_t numbers = product_of({given.channels, given.inner});
    require(given.x.count == numbers && given.result.count == numbers);
    require(given.scale.count == (given.scale.data ? given.channels : 0));
    require(given.shift.count == (given.shift.data ? given.channels : 0));
    require(given.mean.count == given.channels && given.variance.count == given.channels);
    return parallel_of(machine).only_if(numbers, MANY_INDICES);
}

template <class S>
void normalise(const Machine& machine, const Normalisation<S>& given) {
    const Parallel parallel = check_normalisation(machine, given);
    kernels<S>(machine).normalise(given, parallel);
}

template <class S>
void normalise_gradient(const Machine& machine, const Normalisation<S>& given) {
    const Parallel parallel = check_normalisation(machine, given);
    require(given.dy.count == given.x.count);
    require(given.dscale.count == given.channels && given.dshift.count == given.channels);
    kernels<S>(machine).normalise_gradient(given, parallel);
}

// The numbers before a pooling, after all checks of its sizes.
template <class S>
int64_t check_pooling(const Pooling<S>& given) {
    const Window& window = given.window;
    for (int64_t size : {given.channels, given.inner}) require(size >= 0 && size <= INT32_MAX);
    check_window(window, given.height, given.width);
    const int64_t rows = given.height / window.y, columns = given.width / window.x;
    require(window.place.count == product_of({rows, columns, given.inner, given.channels}));
    return product_of({given.height, given.width, given.inner, given.channels});
}

template <class S>
void pool(const Machine& machine, const Pooling<S>& given) {
    const int64_t numbers = check_pooling(given);
    require(given.x.count == numbers && given.result.count == given.window.place.count);
    const Parallel parallel = parallel_of(machine).only_if(numbers, MANY_INDICES);
    if (numbers) kernels<S>(machine, is_narrow<S>(given.inner)).pool(given, parallel);
}

template <class S>
void pool_gradient(const Machine& machine, const Pooling<S>& given) {
    const int64_t numbers = check_pooling(given);
    require(given.result.count == numbers && given.dy.count == given.window.place.count);
    const Parallel parallel = parallel_of(machine).only_if(numbers, MANY_INDICES);
    if (numbers) kernels<S>(machine, is_narrow<S>(given.inner)).pool_gradient(given, parallel);
}

inline void check_windows(int64_t size, int64_t kernel, int64_t stride, int64_t pad, int64_t out_size) {
    for (int64_t each : {size, kernel, stride, out_size}) require(each >= 1 && each <= INT32_MAX);
    require(pad >= 0 && pad < kernel && (out_size - 1) * stride - pad < size);
}

template <class S>
void pool_planes(const Machine& machine, const Sliding<S>& given) {
    check_windows(given.height, given.kernel_y, given.stride_y, given.pad_y, given.out_height);
    check_windows(given.width, given.kernel_x, given.stride_x, given.pad_x, given.out_width);
    const int64_t numbers = product_of({given.planes, given.height, given.width});
    require(given.planes >= 0 && given.x.count == numbers);
    require(given.result.count == product_of({given.planes, given.out_height, given.out_width}));
    if (numbers) kernels<S>(machine).pool_planes(given, parallel_of(machine).only_if(numbers, MANY_INDICES));
}

template <class S>
void average_planes(const Machine& machine, const Averaging<S>& given) {
    for (int64_t size : {given.planes, given.pixels, given.inner}) require(size >= 1 && size <= INT32_MAX);
    const int64_t numbers = product_of({given.planes, given.pixels, given.inner});
    require(given.x.count == numbers && given.result.count == given.planes * given.inner);
    kernels<S>(machine).average_planes(given, parallel_of(machine).only_if(numbers, MANY_INDICES));
}

// Sorts the nonzeros by (input channel, phase), as the input gradient reads them. A row of the result is one phase
// plane of one input channel; its columns are output channel in the group * taps + tap.
void transpose_rows(const Machine& machine, const Sorting& given) {
    const Conv& c = given.conv;
    const auto &start = given.start, &column = given.column;
    check_weight(c);
    const int64_t taps = c.taps(), phases = c.stride_y * c.stride_x;
    const int64_t per_group = c.in_channels / c.groups, rows_per_group = c.out_channels / c.groups;
    check_indices(start, column, c.out_channels, per_group * taps, parallel_of(machine));
    require(given.to_start.count == c.in_channels * phases + 1);
    require(given.to_column.count == column.count && given.to_order.count == column.count);
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
    std::copy(next.begin(), next.end(), given.to_start.data);
    for (int64_t o = 0; o < c.out_channels; ++o)
        for (int64_t k = start[o]; k < start[o + 1]; ++k) {
            const int32_t at = next[row_of(o, k)]++;
            given.to_column[at] = int32_t(o % rows_per_group * taps + column[k] % taps);
            given.to_order[at] = int32_t(k);
        }
}

// Calls the functions of a list one after another, until one fails. Each gets arguments of its own, so that several
// threads may run the same list.
Status run_list(Machine machine, const Entry* entries, int64_t count, char* const* slots) {
    for (const Entry* entry = entries; entry != entries + count; ++entry, machine.awake = true) {
        alignas(Layer<double>) char arguments[MOST_BYTES];
        if (entry->bytes < 0 || entry->bytes > MOST_BYTES) return WRONG_SIZES;
        std::memcpy(arguments, entry->arguments, entry->bytes);
        for (const Patch* patch = entry->patches; patch != entry->patches + entry->count; ++patch) {
            const char* const address = slots[patch->slot] + patch->offset;
            std::memcpy(arguments + patch->field, &address, sizeof address);
        }
        if (const Status status = entry->function(&machine, arguments)) return status;
    }
    return OK;
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

EXPORT int sl_instruction_set() { return best_instruction_set(); }

// Which version of interface.h this is; the sizes of its structs go to `sizes`.
EXPORT int64_t sl_interface(int64_t* sizes) {
    const size_t known[] = {sizeof(Machine), sizeof(Layer<float>), sizeof(Sorting), sizeof(Affine<float>),
                            sizeof(Transposition<float>), sizeof(Normalisation<float>), sizeof(Pooling<float>),
                            sizeof(Sliding<float>), sizeof(Averaging<float>), sizeof(Patch), sizeof(Entry)};
    std::copy(std::begin(known), std::end(known), sizes);
    return INTERFACE;
}

EXPORT Status sl_transpose_rows(const Machine* machine, const Sorting* given) {
    return guarded([&] { transpose_rows(*machine, *given); });
}

EXPORT Status sl_run(const Machine* machine, const Entry* entries, int64_t count, char* const* slots) {
    return run_list(*machine, entries, count, slots);
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
EXPORT_FOR_ALL(transpose, Transposition)
EXPORT_FOR_ALL(affine, Affine)
EXPORT_FOR_ALL(normalise, Normalisation)
EXPORT_FOR_ALL(normalise_gradient, Normalisation)
EXPORT_FOR_ALL(pool, Pooling)
EXPORT_FOR_ALL(pool_gradient, Pooling)
EXPORT_FOR_ALL(pool_planes, Sliding)
EXPORT_FOR_ALL(average_planes, Averaging)
