// How a convolution becomes a walk over flat memory; shared by every instruction set.
//
// Let one axis have stride s, dilation d and padding p. Output o reads input i = s*o + d*k - p for tap k. Write
// d*k - p = s*shift + phase with 0 <= phase < s; then i = s*(o + shift) + phase: the tap reads the plane of phase
// `phase` at position o + shift. Splitting an input into its s*s phase planes makes every stride look like stride 1.
//
// Planes and outputs are laid out on one flat grid: rows of `pitch` positions, images of `image_pitch`. The zeros that
// pad one row (image) on the right also pad the next on the left, so one shift of a flat index serves all positions,
// and vectors run across rows and images alike. Outputs that fall on padding are computed and dropped.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "interface.h"

inline int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }

struct Tap {
    int64_t shift, phase;
};

inline Tap tap_of(int64_t k, int64_t stride, int64_t pad, int64_t dilation) {
    const int64_t distance = k * dilation - pad;
    const int64_t shift = floor_div(distance, stride);
    return {shift, distance - shift * stride};
}

// The shift of a tap where positions [0, read) hold numbers and outputs are [0, write). A tap that reads nothing but
// padding is moved next to them, where it reads padding too: a large dilation costs no memory.
inline int64_t near_shift(int64_t k, int64_t stride, int64_t pad, int64_t dilation, int64_t size, int64_t out_size) {
    return std::clamp(tap_of(k, stride, pad, dilation).shift, -out_size, (size + stride - 1) / stride);
}

inline int64_t phase_size(int64_t size, int64_t phase, int64_t stride) {
    return size > phase ? (size - phase + stride - 1) / stride : 0;
}

// A phase plane inside a tensor: element (image, channel, row, column) lies at
// image * image_stride + channel * channel_stride + row * row_stride + column * step + start.
struct View {
    int64_t rows, columns, image_stride, channel_stride, row_stride, step, start;
};

// Tensors are NCHW in memory, or CHWN ("batch last"), where one vector holds one pixel of many images.
struct Plane {
    int64_t images, channels, height, width;
    bool batch_last, rows;  // rows: of a linear layer, one for each column of the grid

    View phase(int64_t phase_y, int64_t phase_x, int64_t stride_y, int64_t stride_x) const {
        if (rows) return {1, width, 0, 1, 0, channels, 0};
        const int64_t pixel = batch_last ? images : 1;
        return {phase_size(height, phase_y, stride_y),
                phase_size(width, phase_x, stride_x),
                batch_last ? 1 : channels * height * width,
                height * width * pixel,
                stride_y * width * pixel,
                stride_x * pixel,
                (phase_y * width + phase_x) * pixel};
    }
};

inline Plane input_plane(const Conv& c) {
    return {c.images, c.in_channels, c.height, c.width, c.batch_last && !c.x_first, !c.batch_last && c.x_first};
}

inline Plane output_plane(const Conv& c) {
    return {c.images, c.out_channels, c.out_height, c.out_width, c.batch_last && !c.y_first,
            !c.batch_last && c.y_first};
}

// Images whose batch is last are one image whose rows are as many times as long, where taps are as far apart and the
// stride along a row is 1.
inline Conv as_one_image(Conv c) {
    const int64_t n = c.images, longest = std::max({c.width, c.out_width, c.pad_x, c.dilation_x});
    if (!c.batch_last || c.x_first || c.y_first || c.stride_x != 1 || n * longest > INT32_MAX) return c;
    for (int64_t* size : {&c.width, &c.out_width, &c.pad_x, &c.dilation_x}) *size *= n;
    c.images = 1;
    c.batch_last = 0;
    return c;
}

// Those that are read pixel by pixel are one image of a single row: every number is written where one was read.
inline Conv as_one_row(const Conv& given) {
    const bool single = given.taps() == 1 && given.stride_y * given.stride_x == 1 && !given.pad_y && !given.pad_x;
    if (!single || given.height * given.width * given.images > INT32_MAX) return given;
    Conv c = as_one_image(given);
    if (c.batch_last) return given;
    c.width = c.out_width = c.width * c.height;
    c.height = c.out_height = 1;
    return c;
}

// One direction of a convolution on its flat grid: the planes read and written, and the shift of every tap.
struct Grid {
    int64_t images, pitch, image_pitch;  // with the batch last, a grid is of one vector of images, and `images` is 1
    int64_t height, width;               // rows and columns written
    int64_t before = 0, after = 0;       // how far shifts reach to the left and to the right of a position
    int64_t reach_y = 0, reach_x = 0;    // how far the first shift is from the last one, along each axis
    std::vector<View> read, write;
    std::vector<int64_t> tap_plane;  // which of `read` a tap uses
    std::vector<int64_t> tap_shift;  // in flat positions

    // From the first position written to the last one.
    int64_t positions() const { return (images - 1) * image_pitch + (height - 1) * pitch + width; }
};

// The pitch of an axis: rows hold `read` valid positions, outputs are [0, write), and taps read at these shifts.
inline int64_t shared_pitch(int64_t read, int64_t write, const std::vector<int64_t>& shifts) {
    const int64_t low = std::min<int64_t>(0, *std::min_element(shifts.begin(), shifts.end()));
    const int64_t high = std::max<int64_t>(0, *std::max_element(shifts.begin(), shifts.end()));
    return std::max(write + high, read - low);
}

// Refuses a grid that is almost all padding: an image one pixel high and a million wide, read as one of a million rows.
inline void check_padding(const Grid& grid, int64_t rows_pitch, int64_t numbers) {
    int64_t positions;
    if (__builtin_mul_overflow(rows_pitch, grid.pitch, &positions) ||
        __builtin_mul_overflow(positions, grid.images, &positions) || positions / 64 > numbers + (1 << 12))
        throw TOO_LARGE;
}

// Sets the sizes of a grid whose views are known, and the shifts of its taps.
inline void place(Grid& grid, const std::vector<int64_t>& shift_y, const std::vector<int64_t>& shift_x) {
    int64_t rows_read = 0, columns_read = 0;
    grid.height = grid.width = 0;
    for (const View& v : grid.read) {
        rows_read = std::max(rows_read, v.rows);
        columns_read = std::max(columns_read, v.columns);
    }
    for (const View& v : grid.write) {
        grid.height = std::max(grid.height, v.rows);
        grid.width = std::max(grid.width, v.columns);
    }
    grid.pitch = shared_pitch(columns_read, grid.width, shift_x);
    const int64_t rows_pitch = shared_pitch(rows_read, grid.height, shift_y);
    check_padding(grid, rows_pitch, grid.images * (rows_read * columns_read + grid.height * grid.width));
    grid.image_pitch = rows_pitch * grid.pitch;
    const auto reach = [](const std::vector<int64_t>& shifts) {
        const auto [low, high] = std::minmax_element(shifts.begin(), shifts.end());
        return *high - *low;
    };
    grid.reach_y = reach(shift_y);
    grid.reach_x = reach(shift_x);
    for (int64_t y : shift_y)
        for (int64_t x : shift_x) {
            const int64_t shift = y * grid.pitch + x;
            grid.tap_shift.push_back(shift);
            grid.before = std::max(grid.before, -shift);
            grid.after = std::max(grid.after, shift);
        }
}

inline std::vector<int64_t> shifts_down(const Conv& c) {
    std::vector<int64_t> shifts;
    for (int64_t k = 0; k < c.kernel_y; ++k)
        shifts.push_back(near_shift(k, c.stride_y, c.pad_y, c.dilation_y, c.height, c.out_height));
    return shifts;
}

inline std::vector<int64_t> shifts_right(const Conv& c) {
    std::vector<int64_t> shifts;
    for (int64_t k = 0; k < c.kernel_x; ++k)
        shifts.push_back(near_shift(k, c.stride_x, c.pad_x, c.dilation_x, c.width, c.out_width));
    return shifts;
}

// Reads the phase planes of the input, writes the output.
inline Grid forward_grid(const Conv& c) {
    const Plane input = input_plane(c), output = output_plane(c);
    Grid grid;
    grid.images = c.batch_last ? 1 : c.images;
    std::vector<int64_t> plane_of(c.stride_y * c.stride_x, -1);
    for (int64_t ky = 0; ky < c.kernel_y; ++ky)
        for (int64_t kx = 0; kx < c.kernel_x; ++kx) {
            const int64_t phase_y = tap_of(ky, c.stride_y, c.pad_y, c.dilation_y).phase;
            const int64_t phase_x = tap_of(kx, c.stride_x, c.pad_x, c.dilation_x).phase;
            int64_t& plane = plane_of[phase_y * c.stride_x + phase_x];
            if (plane < 0) {
                plane = grid.read.size();
                grid.read.push_back(input.phase(phase_y, phase_x, c.stride_y, c.stride_x));
            }
            grid.tap_plane.push_back(plane);
        }
    grid.write.push_back(output.phase(0, 0, 1, 1));
    place(grid, shifts_down(c), shifts_right(c));
    return grid;
}

// Reads the output's gradient, writes every phase plane of the input's: position j of a plane gets o = j - shift.
inline Grid input_gradient_grid(const Conv& c) {
    const Plane input = input_plane(c), output = output_plane(c);
    Grid grid;
    grid.images = c.batch_last ? 1 : c.images;
    std::vector<int64_t> shift_y = shifts_down(c), shift_x = shifts_right(c);
    for (int64_t& shift : shift_y) shift = -shift;
    for (int64_t& shift : shift_x) shift = -shift;
    grid.tap_plane.assign(c.taps(), 0);
    grid.read.push_back(output.phase(0, 0, 1, 1));
    for (int64_t y = 0; y < c.stride_y; ++y)
        for (int64_t x = 0; x < c.stride_x; ++x)
            grid.write.push_back(input.phase(y, x, c.stride_y, c.stride_x));
    place(grid, shift_y, shift_x);
    return grid;
}

// Part of a grid row: `count` positions from `flat` on, counted from the start of a strip. In the tensor the first one
// lies at `offset`, and the next ones are `step` apart.
struct Run {
    int64_t flat, count, offset, step;
};

// The runs of `view` among the grid's positions `begin` to `end`.
inline std::vector<Run> runs_of(const Grid& grid, const View& view, int64_t begin, int64_t end) {
    std::vector<Run> runs;
    if (!view.rows || !view.columns || begin >= end) return runs;
    for (int64_t image = std::max<int64_t>(0, floor_div(begin, grid.image_pitch)); image < grid.images; ++image) {
        const int64_t base = image * grid.image_pitch;
        if (base >= end) break;
        const int64_t first = std::max<int64_t>(0, floor_div(begin - base, grid.pitch));
        for (int64_t row = first; row < view.rows && base + row * grid.pitch < end; ++row) {
            const int64_t start = base + row * grid.pitch;
            const int64_t from = std::max(start, begin), to = std::min(start + view.columns, end);
            if (from >= to) continue;
            const int64_t offset = image * view.image_stride + row * view.row_stride + view.start;
            runs.push_back({from - begin, to - from, offset + (from - start) * view.step, view.step});
        }
    }
    return runs;
}
