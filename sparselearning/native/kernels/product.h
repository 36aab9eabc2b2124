// What a kernel multiplies: the sparse weight by its rows, and everything else of one call.
#pragma once

#include "geometry.h"
#include "parallel.h"

constexpr int64_t FEW = 112;  // rows of a linear layer that are multiplied without a grid

template <class S>
struct Rows {
    int64_t count;
    const int32_t* start;
    const int32_t* column;
    const S* value;
    bool fit = true;  // whether the columns are known to be those of the weight

    int64_t nonzeros() const { return start[count]; }
};

// The product of a sparse weight and the planes of a grid (a forward pass, or an input gradient if `grid` is that of
// one), or the gradient of the weight.
template <class S>
struct Product {
    Grid grid;
    int64_t images, channels, groups;
    bool batch_last, x_rows, result_rows;  // whether input and result (or dy) are the rows of a linear layer
    Rows<S> rows;
    const S* x;  // the planes that the grid reads
    S* result;
    Parallel parallel;
    const S *dy = nullptr, *bias = nullptr;  // of a weight gradient and a forward pass, if there is a bias
    bool relu = false;
    S* dbias = nullptr;                        // where the weight gradient writes the sums of dy, if anywhere
    Window x_window{}, dy_window{}, window{};  // of x, dy and the result, where one is a pooled output or its gradient
    const S* residual = nullptr;               // what is added to the result before the ReLU, if anything

    int64_t planes() const { return channels * int64_t(grid.read.size()); }
    int64_t channels_per_group() const { return channels / groups; }
    int64_t rows_per_group() const { return rows.count / groups; }
};

// The nonzeros of every row, cut where the input channels go from one block to the next.
struct Segments {
    int64_t blocks;
    std::vector<int32_t> bound;

    template <class S>
    Segments(const Product<S>& product, int64_t together)
        : blocks((product.channels_per_group() + together - 1) / together), bound(product.rows.count * (blocks + 1)) {
        const Rows<S>& rows = product.rows;
        const int64_t columns = together * int64_t(product.grid.tap_shift.size());  // of one block
        product.parallel.only_if(rows.nonzeros(), MANY_INDICES).run(rows.count, [&](int64_t from, int64_t to) {
            for (int64_t row = from; row < to; ++row) {
                const int64_t begin = rows.start[row], end = rows.start[row + 1];
                int64_t least = bound[row] = int32_t(begin);
                for (int64_t block = 1; block < blocks; ++block) {
                    // Columns are about even, and ascend: the bound is near where it would be if they were.
                    int64_t k = std::max(least, begin + (end - begin) * block / blocks);
                    while (k < end && rows.column[k] < block * columns) ++k;
                    while (k > least && rows.column[k - 1] >= block * columns) --k;
                    bound[block * rows.count + row] = int32_t(least = k);
                }
                bound[blocks * rows.count + row] = int32_t(end);
            }
        });
    }
};
