// Random layers through every kernel, against plain loops, to be built with sanitizers. From the repository's root:
//
//     FLAGS="-std=c++17 -g -O1 -Wno-psabi -fsanitize=address,undefined -fno-sanitize-recover=all"
//     g++ $FLAGS tests/native/sanitize.cpp -o /tmp/sanitize && /tmp/sanitize 300
//
// Tensors lie in vectors of their exact size, so that any access beyond an end is caught.
#include <cmath>
#include <cstdio>
#include <random>

#define MANY_NUMBERS 0  // small layers are shared among threads too
#include "../../sparselearning/native/kernels/kernels.cpp"

namespace {

std::mt19937 generator(0);

int64_t draw(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator); }

template <class S>
std::vector<S> numbers(int64_t count) {
    std::vector<S> result(count);
    for (S& x : result) x = S(std::normal_distribution<double>()(generator));
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
    c.batch_last = draw(0, 1), c.x_first = draw(0, 1), c.y_first = draw(0, 1);
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

template <class S>
void compare(const char* what, const std::vector<S>& found, const std::vector<double>& expected) {
    for (size_t i = 0; i < found.size(); ++i)
        if (!(std::abs(double(found[i]) - expected[i]) <= 1e-3 * (1 + std::abs(expected[i])))) {
            std::printf("%s differs at %zu: %g instead of %g\n", what, i, double(found[i]), expected[i]);
            std::exit(1);
        }
}

template <class S>
void check(const Case<S>& t, int64_t set, int64_t threads) {
    const Conv& c = t.c;
    Conv written = c;  // what is written has the order of the vectors
    written.x_first = written.y_first = false;
    std::vector<double> y(t.dy.size()), dx(t.x.size()), dw(t.value.size());
    for (size_t i = 0; i < y.size(); ++i) {
        const size_t pixels = c.out_height * c.out_width;
        y[i] = t.bias[c.batch_last ? i / (pixels * c.images) : i / pixels % c.out_channels];
    }
    t.products([&](int64_t k, int64_t x_at, int64_t dy_at, int64_t dx_at, int64_t y_at) {
        y[y_at] += double(t.value[k]) * t.x[x_at];
        dx[dx_at] += double(t.value[k]) * t.dy[dy_at];
        dw[k] += double(t.dy[dy_at]) * t.x[x_at];
    });
    if (t.relu)
        for (double& v : y) v = std::max(v, 0.0);

    const Machine machine{set, threads, nullptr};
    Layer<S> layer{written, t.start.data(), t.column.data(), nullptr, t.value.data(), t.bias.data(), t.x.data(),
                   t.dy.data(), nullptr, t.relu};
    std::vector<S> found(y.size());
    layer.conv.x_first = c.x_first;
    layer.result = found.data();
    forward(machine, layer);
    compare("forward", found, y);

    found.assign(dw.size(), 0);
    layer.conv.y_first = c.y_first;
    layer.result = found.data();
    weight_gradient(machine, layer);
    compare("weight gradient", found, dw);

    const int64_t rows = c.in_channels * c.stride_y * c.stride_x;
    std::vector<int32_t> start(rows + 1), column(t.column.size()), order(t.column.size());
    Layer<float> indices{};
    indices.conv = c, indices.start = t.start.data(), indices.column = t.column.data();
    transpose_rows(machine, indices, start.data(), column.data(), order.data());
    found.assign(dx.size(), 0);
    layer.conv.x_first = false;
    layer.start = start.data(), layer.column = column.data(), layer.order = order.data();
    layer.result = found.data();
    input_gradient(machine, layer);
    compare("input gradient", found, dx);

    const int64_t height = draw(1, 40), width = draw(1, 40);
    const std::vector<S> from = numbers<S>(height * width);
    std::vector<S> turned(from.size()), back(from.size());
    transpose(machine, Transposition<S>{from.data(), turned.data(), height, width});
    transpose(machine, Transposition<S>{turned.data(), back.data(), width, height});
    if (back != from) std::abort();
}

}  // namespace

int main(int argc, char** argv) {
    const int rounds = argc > 1 ? std::atoi(argv[1]) : 100;
    for (int i = 0; i < rounds; ++i)
        for (int set = 0; set <= sl_instruction_set(); ++set) {
            check(random_case<float>(), set, draw(1, 3));
            check(random_case<double>(), set, draw(1, 3));
        }
    std::printf("%d rounds on %d instruction sets: no difference\n", rounds, sl_instruction_set() + 1);
}
