// Random layers through every kernel, against plain loops; and random wrong arguments through the C interface, which
// refuses them or computes something of them. To be built with sanitizers. From the repository's root:
//
//     FLAGS="-std=c++17 -g -O1 -Wno-psabi -fsanitize=address,undefined -fno-sanitize-recover=all"
//     g++ $FLAGS tests/native/sanitize.cpp -o /tmp/sanitize && /tmp/sanitize 300 100000
//
// Tensors lie in vectors of their exact size, so that any access beyond an end is caught.
#include <cmath>
#include <cstdio>
#include <random>

#define MANY_NUMBERS 0  // small layers are shared among threads too
#include "../../sparselearning/native/kernels/kernels.cpp"
#include "../../sparselearning/native/kernels/zero.cpp"

namespace {

std::mt19937 generator(0);

int64_t draw(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator); }

// Normal numbers, from some place of a table on: to draw each took nine tenths of the time of wrong calls.
template <class S>
std::vector<S> numbers(int64_t count) {
    static const std::vector<double> table = [] {
        std::vector<double> drawn((1 << 16) + 1);
        for (double& x : drawn) x = std::normal_distribution<double>()(generator);
        return drawn;
    }();
    std::vector<S> result(count);
    size_t at = draw(0, table.size() - 1);
    for (S& x : result) {
        x = S(table[at]);
        if (++at == table.size()) at = 0;
    }
    return result;
}

template <class S>
struct Case {
    Conv c;
    std::vector<int32_t> start, column;
    std::vector<S> value, x, dy, bias;
    bool relu;

    int64_t at(int64_t n, int64_t channel, int64_t row, int64_t col, int64_t channels, int64_t height, int64_t width,
               bool batch_last) const {
        if (batch_last) return ((channel * height + row) * width + col) * c.images + n;
        return ((n * channels + channel) * height + row) * width + col;
    }

    // Calls visit(nonzero, x, dy, dx, y) with the indices of what every product of the convolution reads and adds to.
    template <class Visit>
    void products(const Visit& visit) const {
        const int64_t per_group = c.in_channels / c.groups, rows_per_group = c.out_channels / c.groups;
        for (int64_t o = 0; o < c.out_channels; ++o)
            for (int64_t k = start[o]; k < start[o + 1]; ++k) {
                const int64_t channel = o / rows_per_group * per_group + column[k] / c.taps();
                const int64_t tap = column[k] % c.taps();
                for (int64_t n = 0; n < c.images; ++n)
                    for (int64_t y = 0; y < c.out_height; ++y)
                        for (int64_t x = 0; x < c.out_width; ++x) {
                            const int64_t row = y * c.stride_y - c.pad_y + tap / c.kernel_x * c.dilation_y;
                            const int64_t col = x * c.stride_x - c.pad_x + tap % c.kernel_x * c.dilation_x;
                            if (row < 0 || row >= c.height || col < 0 || col >= c.width) continue;
                            const auto in = [&](bool batch_last) {
                                return at(n, channel, row, col, c.in_channels, c.height, c.width, batch_last);
                            };
                            const auto out = [&](bool batch_last) {
                                return at(n, o, y, x, c.out_channels, c.out_height, c.out_width, batch_last);
                            };
                            visit(k, in(c.batch_last && !c.x_first), out(c.batch_last && !c.y_first), in(c.batch_last),
                                  out(c.batch_last));
                        }
            }
    }
};

template <class S>
Case<S> random_case() {
    Case<S> t;
    Conv& c = t.c;
    c.groups = draw(1, 2);
    c.images = draw(0, 3) ? draw(1, 40) : 16;
    c.in_channels = c.groups * (draw(0, 9) ? draw(1, 4) : draw(80, 160));  // so many are computed in blocks
    c.out_channels = c.groups * draw(1, 4);
    c.kernel_y = draw(1, 3), c.kernel_x = draw(1, 4);
    c.stride_y = draw(1, 3), c.stride_x = draw(1, 2);
    c.pad_y = draw(0, 2), c.pad_x = draw(0, 3);
    c.dilation_y = draw(1, 2), c.dilation_x = draw(1, 3);
    c.height = std::max<int64_t>(1, c.dilation_y * (c.kernel_y - 1) + 1 - 2 * c.pad_y) + draw(0, 9);
    c.width = std::max<int64_t>(1, c.dilation_x * (c.kernel_x - 1) + 1 - 2 * c.pad_x) + draw(0, 20);
    c.out_height = (c.height + 2 * c.pad_y - c.dilation_y * (c.kernel_y - 1) - 1) / c.stride_y + 1;
    c.out_width = (c.width + 2 * c.pad_x - c.dilation_x * (c.kernel_x - 1) - 1) / c.stride_x + 1;
    c.batch_last = draw(0, 1), c.x_first = c.batch_last && draw(0, 1), c.y_first = c.batch_last && draw(0, 1);
    const double density = draw(0, 4) / 4.0;
    const int64_t columns = c.in_channels / c.groups * c.taps();
    t.start.push_back(0);
    for (int64_t o = 0; o < c.out_channels; ++o) {
        for (int64_t k = 0; k < columns; ++k)
            if (std::uniform_real_distribution<double>()(generator) < density) t.column.push_back(int32_t(k));
        t.start.push_back(int32_t(t.column.size()));
    }
    t.value = numbers<S>(t.column.size());
    t.x = numbers<S>(c.images * c.in_channels * c.height * c.width);
    t.dy = numbers<S>(c.images * c.out_channels * c.out_height * c.out_width);
    t.bias = numbers<S>(c.out_channels);
    t.relu = draw(0, 1);
    return t;
}

// A linear layer, whose input and output lie row by row or channel by channel.
template <class S>
Case<S> random_rows() {
    Case<S> t;
    const int64_t batch = draw(0, 1) ? draw(1, 70) : draw(1, 150), features = draw(1, 300), outputs = draw(1, 300);
    t.c = {1, features, 1, batch, outputs, 1, batch, 1, 1, 1, 1, 0, 0, 1, 1, 1, 0, draw(0, 1), draw(0, 1)};
    t.start.push_back(0);
    for (int64_t o = 0; o < outputs; ++o) {
        for (int64_t k = draw(0, 20); k < features; k += draw(1, 20)) t.column.push_back(int32_t(k));
        t.start.push_back(int32_t(t.column.size()));
    }
    t.value = numbers<S>(t.column.size());
    t.x = numbers<S>(batch * features);
    t.dy = numbers<S>(batch * outputs);
    t.bias = numbers<S>(outputs);
    t.relu = draw(0, 1);
    return t;
}

template <class S, class T>
void compare(const char* what, const std::vector<S>& found, const std::vector<T>& expected) {
    for (size_t i = 0; i < found.size(); ++i)
        if (!(std::abs(double(found[i]) - expected[i]) <= 1e-3 * (1 + std::abs(double(expected[i]))))) {
            std::printf("%s differs at %zu: %g instead of %g\n", what, i, double(found[i]), double(expected[i]));
            std::exit(1);
        }
}

template <class T>
Span<const T> span(const std::vector<T>& numbers) {
    return {numbers.empty() ? nullptr : numbers.data(), int64_t(numbers.size())};
}

template <class T>
Span<T> target(std::vector<T>& numbers) {
    return {numbers.empty() ? nullptr : numbers.data(), int64_t(numbers.size())};
}

// A forward pass of a layer that adds no residual and is not pooled; what it writes is to be filled in.
template <class S>
Layer<S> layer_of(const Case<S>& t, const Conv& c) {
    Layer<S> layer{};
    layer.conv = c, layer.relu = t.relu;
    layer.start = span(t.start), layer.column = span(t.column), layer.value = span(t.value), layer.bias = span(t.bias);
    layer.x = span(t.x), layer.dy = span(t.dy);
    return layer;
}

// The sum of dy over each channel.
template <class S>
std::vector<double> sums_over_channels(const Case<S>& t) {
    const Conv& c = t.c;
    std::vector<double> sums(c.out_channels);
    for (size_t i = 0; i < t.dy.size(); ++i) {
        const int64_t pixels = c.out_height * c.out_width;
        sums[c.batch_last && !c.y_first ? i / (pixels * c.images) : i / pixels % c.out_channels] += t.dy[i];
    }
    return sums;
}

template <class S>
void check(const Case<S>& t, int64_t set, int64_t threads) {
    const Conv& c = t.c;
    Conv written = c;  // what is written has the order of the vectors
    written.x_first = written.y_first = false;
    std::vector<double> y(t.dy.size()), dx(t.x.size()), dw(t.value.size());
    const std::vector<S> residual = numbers<S>(draw(0, 1) ? y.size() : 0);
    for (size_t i = 0; i < y.size(); ++i) {
        const size_t pixels = c.out_height * c.out_width;
        y[i] = t.bias[c.batch_last ? i / (pixels * c.images) : i / pixels % c.out_channels];
        if (!residual.empty()) y[i] += residual[i];
    }
    t.products([&](int64_t k, int64_t x_at, int64_t dy_at, int64_t dx_at, int64_t y_at) {
        y[y_at] += double(t.value[k]) * t.x[x_at];
        dx[dx_at] += double(t.value[k]) * t.dy[dy_at];
        dw[k] += double(t.dy[dy_at]) * t.x[x_at];
    });
    if (t.relu)
        for (double& v : y) v = std::max(v, 0.0);

    const Machine machine{set, threads, nullptr};
    Layer<S> layer = layer_of(t, written);
    std::vector<S> found(y.size());
    layer.conv.x_first = c.x_first;
    layer.residual = span(residual), layer.result = target(found);
    forward(machine, layer);
    compare("forward", found, y);

    found.assign(dw.size(), 0);
    layer.conv.y_first = c.y_first;
    layer.result = target(found);
    std::vector<S> dbias(c.out_channels);
    layer.dbias = target(dbias);
    weight_gradient(machine, layer);
    compare("weight gradient", found, dw);
    compare("bias gradient", dbias, sums_over_channels(t));

    const int64_t rows = c.in_channels * c.stride_y * c.stride_x;
    std::vector<int32_t> start(rows + 1), column(t.column.size()), order(t.column.size());
    transpose_rows(machine, {c, span(t.start), span(t.column), target(start), target(column), target(order)});
    found.assign(dx.size(), 0);
    layer.conv.x_first = false;
    layer.start = span(start), layer.column = span(column), layer.order = span(order);
    layer.result = target(found);
    input_gradient(machine, layer);
    compare("input gradient", found, dx);

    const int64_t height = draw(1, 40), width = draw(1, 40);
    const std::vector<S> from = numbers<S>(height * width);
    std::vector<S> turned(from.size()), back(from.size());
    transpose(machine, Transposition<S>{span(from), target(turned), height, width});
    transpose(machine, Transposition<S>{span(turned), target(back), width, height});
    if (back != from) std::abort();
}

// The forward pass and the gradients of a linear layer.
template <class S>
void check_rows(const Case<S>& t, int64_t set, int64_t threads) {
    const Conv& c = t.c;
    const auto at = [&](int64_t n, int64_t channel, int64_t channels, bool by_rows) {
        return by_rows ? n * channels + channel : channel * c.width + n;
    };
    std::vector<double> y(t.dy.size()), dx(t.x.size()), dw(t.value.size()), dbias(c.out_channels);
    for (int64_t n = 0; n < c.width; ++n)
        for (int64_t o = 0; o < c.out_channels; ++o) {
            const int64_t y_at = at(n, o, c.out_channels, c.y_first);
            y[y_at] = t.bias[o];
            dbias[o] += t.dy[y_at];
            for (int64_t k = t.start[o]; k < t.start[o + 1]; ++k) {
                const int64_t x_at = at(n, t.column[k], c.in_channels, c.x_first);
                y[y_at] += double(t.value[k]) * t.x[x_at];
                dx[x_at] += double(t.value[k]) * t.dy[y_at];
                dw[k] += double(t.dy[y_at]) * t.x[x_at];
            }
            if (t.relu) y[y_at] = std::max(y[y_at], 0.0);
        }
    const Machine machine{set, threads, nullptr};
    std::vector<S> found(y.size());
    Layer<S> layer = layer_of(t, c);
    layer.result = target(found);
    forward(machine, layer);
    compare("rows", found, y);

    std::vector<S> dw_found(dw.size()), dbias_found(dbias.size());
    layer.result = target(dw_found), layer.dbias = target(dbias_found);
    weight_gradient(machine, layer);
    compare("weight gradient of rows", dw_found, dw);
    compare("bias gradient of rows", dbias_found, dbias);

    std::vector<int32_t> start(c.in_channels + 1), column(t.column.size()), order(t.column.size());
    transpose_rows(machine, {c, span(t.start), span(t.column), target(start), target(column), target(order)});
    found.assign(dx.size(), 0);
    layer.start = span(start), layer.column = span(column), layer.order = span(order), layer.result = target(found);
    input_gradient(machine, layer);
    compare("input gradient of rows", found, dx);
}

// A convolution that is pooled, and its gradients, are those of the convolution and of the pooling one by one, but for
// the rounding of sums, which may make another of two equally large numbers the largest: a pooled convolution is not
// computed in blocks of channels.
template <class S>
void check_pooling(Case<S> t, int64_t set, int64_t threads) {
    Conv& c = t.c;
    c.batch_last = true, c.y_first = false;
    const Machine machine{set, threads, nullptr};
    const int64_t y = draw(1, std::min<int64_t>(c.out_height, 3)), x = draw(1, std::min<int64_t>(c.out_width, 4));
    const int64_t pooled = c.images * c.out_channels * (c.out_height / y) * (c.out_width / x);
    std::vector<uint8_t> place(pooled), found_place(pooled);
    Layer<S> layer = layer_of(t, c);
    layer.dy = {}, layer.relu = false;
    std::vector<S> whole(t.dy.size()), expected(pooled), found(pooled);
    layer.result = target(whole);
    forward(machine, layer);
    Pooling<S> pooling{span(whole), {}, target(expected), {target(place), y, x}, c.out_channels, c.out_height,
                       c.out_width, c.images, t.relu};
    pool(machine, pooling);
    layer.result = target(found), layer.window = {target(found_place), y, x}, layer.relu = t.relu;
    forward(machine, layer);
    compare("pooled", found, expected);
    const int64_t across = c.out_width / x, windows = c.out_height / y * across;
    const auto chosen = [&](size_t i, const std::vector<uint8_t>& of) {
        if (of[i] == NOWHERE) return S(0);  // the ReLU's
        const int64_t n = i % c.images, window = i / c.images % windows, channel = i / c.images / windows;
        const int64_t row = window / across * y + of[i] / x, col = window % across * x + of[i] % x;
        return whole[t.at(n, channel, row, col, c.out_channels, c.out_height, c.out_width, true)];
    };
    std::vector<S> largest(pooled), found_largest(pooled);
    for (size_t i = 0; i < place.size(); ++i) largest[i] = chosen(i, place), found_largest[i] = chosen(i, found_place);
    compare("place of the largest number", found_largest, largest);
    compare("largest number", largest, expected);

    const std::vector<S> dy = numbers<S>(pooled);
    pooling.dy = span(dy), pooling.result = target(whole);
    pool_gradient(machine, pooling);
    std::vector<S> dw(t.value.size()), dbias(c.out_channels), dw_found(dw.size()), dbias_found(dbias.size());
    layer.window = {}, layer.dy = span(whole), layer.result = target(dw), layer.dbias = target(dbias);
    weight_gradient(machine, layer);
    layer.window = {target(place), y, x}, layer.dy = span(dy), layer.result = target(dw_found);
    layer.dbias = target(dbias_found);
    weight_gradient(machine, layer);
    compare("weight gradient of a pooled convolution", dw_found, dw);
    compare("bias gradient of a pooled convolution", dbias_found, dbias);

    const int64_t rows = c.in_channels * c.stride_y * c.stride_x;
    std::vector<int32_t> start(rows + 1), column(t.column.size()), order(t.column.size());
    transpose_rows(machine, {c, span(t.start), span(t.column), target(start), target(column), target(order)});
    std::vector<S> dx(t.x.size()), dx_found(t.x.size());
    layer.conv.x_first = false;
    layer.start = span(start), layer.column = span(column), layer.order = span(order);
    layer.result = target(dx_found);
    input_gradient(machine, layer);
    layer.window = {}, layer.dy = span(whole), layer.result = target(dx);
    input_gradient(machine, layer);
    compare("input gradient of a pooled convolution", dx_found, dx);
}

// A batch normalisation of channels whose numbers lie side by side, and its gradients.
template <class S>
void check_normalisation(int64_t set, int64_t threads) {
    const int64_t channels = draw(1, 5), n = draw(0, 5) ? draw(1, 100) : draw(4000, 9000);
    const auto x = numbers<S>(channels * n), dy = numbers<S>(channels * n), scale = numbers<S>(channels);
    const auto shift = numbers<S>(channels);
    std::vector<S> y(x.size()), dx(x.size()), mean(channels), variance(channels), dscale(channels), dshift(channels);
    Normalisation<S> given{span(x), span(dy), span(scale), span(shift), target(mean), target(variance), target(y),
                           target(dscale), target(dshift), channels, n, 1e-2};
    normalise(Machine{set, threads, nullptr}, given);
    given.result = target(dx);
    normalise_gradient(Machine{set, threads, nullptr}, given);
    std::vector<double> expected_y, expected_dx, expected_dscale;
    for (int64_t c = 0; c < channels; ++c) {
        const auto sum = [&](const auto& term) {
            double total = 0;
            for (int64_t i = c * n; i < (c + 1) * n; ++i) total += term(double(x[i]), double(dy[i]));
            return total;
        };
        const double m = sum([](double x, double) { return x; }) / n;
        const double inverse = 1 / std::sqrt(sum([m](double x, double) { return (x - m) * (x - m); }) / n + 1e-2);
        const double dm = sum([](double, double dy) { return dy; }) / n;
        expected_dscale.push_back(sum([=](double x, double dy) { return (x - m) * inverse * dy; }));
        for (int64_t i = c * n; i < (c + 1) * n; ++i) {
            const double normal = (x[i] - m) * inverse;
            expected_y.push_back(normal * scale[c] + shift[c]);
            expected_dx.push_back(scale[c] * inverse * (dy[i] - dm - normal * expected_dscale[c] / n));
        }
    }
    compare("normalisation", y, expected_y);
    compare("gradient of a normalisation", dx, expected_dx);
    compare("gradient of a scale", dscale, expected_dscale);
}

// The mean of each plane, and the largest number of each window of it.
template <class S>
void check_planes(int64_t set, int64_t threads) {
    const int64_t planes = draw(1, 9), height = draw(1, 20), width = draw(1, 40), inner = draw(0, 1) ? 1 : draw(1, 40);
    const auto x = numbers<S>(planes * height * width * inner);
    std::vector<S> mean(planes * inner);
    average_planes(Machine{set, threads, nullptr}, Averaging<S>{span(x), target(mean), planes, height * width, inner});
    std::vector<double> expected(mean.size());
    for (size_t i = 0; i < x.size(); ++i)
        expected[i % inner * planes + i / (height * width * inner)] += double(x[i]) / (height * width);
    compare("mean of planes", mean, expected);

    Sliding<S> given{span(x), {}, planes * inner, height, width};
    given.kernel_y = draw(1, height), given.kernel_x = draw(1, width);
    given.stride_y = draw(1, 3), given.stride_x = draw(1, 3);
    given.pad_y = draw(0, given.kernel_y / 2), given.pad_x = draw(0, given.kernel_x / 2);
    given.out_height = (height + 2 * given.pad_y - given.kernel_y) / given.stride_y + 1;
    given.out_width = (width + 2 * given.pad_x - given.kernel_x) / given.stride_x + 1;
    std::vector<S> largest(given.planes * given.out_height * given.out_width);
    given.result = target(largest);
    pool_planes(Machine{set, threads, nullptr}, given);
    std::vector<double> windows;
    for (int64_t p = 0; p < given.planes; ++p)
        for (int64_t r = 0; r < given.out_height; ++r)
            for (int64_t c = 0; c < given.out_width; ++c) {
                double most = -1e30;
                for (int64_t i = r * given.stride_y - given.pad_y, n = 0; n < given.kernel_y; ++n, ++i)
                    for (int64_t j = c * given.stride_x - given.pad_x, m = 0; m < given.kernel_x; ++m, ++j)
                        if (i >= 0 && i < height && j >= 0 && j < width)
                            most = std::max(most, double(x[(p * height + i) * width + j]));
                windows.push_back(most);
            }
    compare("largest of windows", largest, windows);
}

int64_t wrong_number() {
    const int64_t choices[] = {0, -1, 1, 2, 3, 17, 65536, INT32_MAX, int64_t(INT32_MAX) + 1, INT64_MAX, INT64_MIN};
    return choices[draw(0, 10)];
}

template <class T>
void damage(std::vector<T>& tensor) {
    const int64_t size = tensor.size();
    if (draw(0, 1) && size)
        tensor[draw(0, size - 1)] = T(wrong_number());
    else
        tensor = std::vector<T>(draw(0, size + 3));
    tensor.shrink_to_fit();
}

// Every function with wrong numbers in its structs, and tensors of wrong lengths and contents. A tensor's count is
// true, because Python passes the one that torch tells.
template <class S>
int refused_of_wrong(Status (*run)(const Machine*, const Layer<S>*)) {
    Case<S> t = draw(0, 3) ? random_case<S>() : random_rows<S>();
    std::vector<S> result(draw(0, 1) ? t.dy.size() : draw(0, 1) ? t.x.size() : t.value.size());
    std::vector<S> dbias(draw(0, 9) ? draw(0, 1) * t.c.out_channels : draw(0, 9));
    const std::vector<S> residual(draw(0, 1) ? 0 : draw(0, 5) ? t.dy.size() : draw(0, 9));
    std::vector<int32_t> order(t.column.size());
    for (size_t i = 0; i < order.size(); ++i) order[i] = int32_t(i);
    for (int64_t changes = draw(0, 2); changes > 0; --changes) {
        int64_t* const numbers = &t.c.images;
        if (draw(0, 1)) numbers[draw(0, sizeof(Conv) / sizeof(int64_t) - 1)] = wrong_number();
        const int64_t which = draw(0, 9);
        if (which == 0) damage(t.start);
        if (which == 1) damage(t.column);
        if (which == 2) damage(t.value);
        if (which == 3) damage(t.bias);
        if (which == 4) damage(t.x);
        if (which == 5) damage(t.dy);
        if (which == 6) damage(order);
        if (which == 7) damage(result);
    }
    const Machine machine{draw(0, 20) ? 0 : wrong_number(), draw(0, 9) ? 1 : draw(-3, 3), nullptr};
    Layer<S> layer = layer_of(t, t.c);
    layer.order = span(order), layer.residual = span(residual);
    layer.result = target(result), layer.dbias = target(dbias);
    std::vector<uint8_t> place;
    if (draw(0, 1)) {
        const int64_t y = draw(0, 5) ? draw(1, 4) : wrong_number(), x = draw(0, 5) ? draw(1, 4) : wrong_number();
        int64_t numbers = y > 0 && x > 0;
        for (int64_t size : {t.c.images, t.c.out_channels, t.c.out_height, t.c.out_width})
            numbers = size > 0 && size < 1000 ? numbers * size : 0;
        if (numbers) numbers = t.c.images * t.c.out_channels * (t.c.out_height / y) * (t.c.out_width / x);
        place.resize(numbers && numbers < 1'000'000 && draw(0, 5) ? numbers : draw(0, 50));
        for (uint8_t& pixel : place) pixel = uint8_t(draw(0, 255));
        std::vector<S>& pooled = draw(0, 1) ? result : t.dy;
        pooled.assign(place.size(), S(1));
        layer.dy = span(t.dy), layer.result = target(result);
        layer.window = {target(place), y, x};
    }
    const bool refused = run(&machine, &layer) != OK;
    const Sorting sorting{t.c, span(t.start), span(t.column), target(order), target(order), target(order)};
    sl_transpose_rows(&machine, &sorting);
    return refused;
}

template <class S>
void other_functions_with_wrong_numbers(Status (*affine)(const Machine*, const Affine<S>*),
                                        Status (*transpose)(const Machine*, const Transposition<S>*),
                                        Status (*normalise)(const Machine*, const Normalisation<S>*),
                                        Status (*pool)(const Machine*, const Pooling<S>*)) {
    const auto size = [] { return draw(0, 3) ? draw(0, 5) : wrong_number(); };
    std::vector<S> x(draw(0, 60)), result(draw(0, 60)), scale(draw(0, 5)), shift(draw(0, 5));
    const Machine machine{0, 1, nullptr};
    const Affine<S> given{span(x), span(scale), span(shift), target(result), size(), size(), size(), 1};
    affine(&machine, &given);
    const Transposition<S> turned{span(x), target(result), size(), size()};
    transpose(&machine, &turned);
    std::vector<S> mean(draw(0, 5)), variance(draw(0, 5)), dscale(draw(0, 5)), dshift(draw(0, 5));
    const Normalisation<S> norm{span(x), span(shift), span(scale), span(shift), target(mean), target(variance),
                                target(result), target(dscale), target(dshift), size(), size(), 1e-5};
    normalise(&machine, &norm);
    std::vector<uint8_t> place(draw(0, 60), uint8_t(draw(0, 255)));
    const Pooling<S> pooling{span(x), span(x), target(result), {target(place), size(), size()}, size(), size(), size(),
                             size(), 1};
    pool(&machine, &pooling);
    const std::vector<int8_t> mask(x.size(), 1);
    const Weight weight{int64_t(x.data()), int64_t(mask.data()), int64_t(x.size()),
                        draw(0, 3) ? int64_t(sizeof(S)) : wrong_number()};
    sl_zero_inactive(&machine, &weight, 1);
}

template <class S>
void planes_with_wrong_numbers(Status (*average)(const Machine*, const Averaging<S>*),
                               Status (*pool)(const Machine*, const Sliding<S>*)) {
    const auto size = [] { return draw(0, 3) ? draw(0, 5) : wrong_number(); };
    std::vector<S> x(draw(0, 60)), result(draw(0, 60));
    const Machine machine{0, 1, nullptr};
    const Averaging<S> averaging{span(x), target(result), size(), size(), size()};
    average(&machine, &averaging);
    const Sliding<S> sliding{span(x), target(result), size(), size(), size(), size(), size(),
                             size(),  size(),         size(), size(), size(), size()};
    pool(&machine, &sliding);
}

}  // namespace

int main(int argc, char** argv) {
    const int rounds = argc > 1 ? std::atoi(argv[1]) : 100, wrong = argc > 2 ? std::atoi(argv[2]) : 10'000;
    for (int i = 0; i < rounds; ++i)
        for (int set = 0; set <= sl_instruction_set(); ++set) {
            check(random_case<float>(), set, draw(1, 3));
            check(random_case<double>(), set, draw(1, 3));
            check_pooling(random_case<float>(), set, draw(1, 3));
            check_pooling(random_case<double>(), set, draw(1, 3));
            check_rows(random_rows<float>(), set, draw(1, 3));
            check_rows(random_rows<double>(), set, draw(1, 3));
            check_normalisation<float>(set, draw(1, 3));
            check_normalisation<double>(set, draw(1, 3));
            check_planes<float>(set, draw(1, 3));
            check_planes<double>(set, draw(1, 3));
        }
    int refused = 0;
    for (int i = 0; i < wrong / 6; ++i) {
        for (auto run : {sl_forward_float, sl_input_gradient_float, sl_weight_gradient_float})
            refused += refused_of_wrong<float>(run);
        for (auto run : {sl_forward_double, sl_input_gradient_double, sl_weight_gradient_double})
            refused += refused_of_wrong<double>(run);
        other_functions_with_wrong_numbers(sl_affine_float, sl_transpose_float, sl_normalise_float, sl_pool_float);
        other_functions_with_wrong_numbers(sl_affine_float, sl_transpose_float, sl_normalise_gradient_float,
                                           sl_pool_gradient_float);
        other_functions_with_wrong_numbers(sl_affine_double, sl_transpose_double, sl_normalise_double, sl_pool_double);
        other_functions_with_wrong_numbers(sl_affine_double, sl_transpose_double, sl_normalise_gradient_double,
                                           sl_pool_gradient_double);
        planes_with_wrong_numbers(sl_average_planes_float, sl_pool_planes_float);
        planes_with_wrong_numbers(sl_average_planes_double, sl_pool_planes_double);
    }
    std::printf("%d calls with wrong arguments: %d refused, none out of bounds\n", wrong / 6 * 6, refused);
    std::printf("%d rounds on %d instruction sets: no difference\n", rounds, sl_instruction_set() + 1);
}
