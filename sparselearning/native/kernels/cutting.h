// How a grid is cut into strips, tiles and blocks of channels, so that what is read stays in a cache and sums stay in
// registers; shared by every instruction set.
#pragma once

#if __has_include(<unistd.h>)
#include <unistd.h>
#endif

#include "geometry.h"

// What a kernel computes at once: numbers in a vector, vectors in a tile, numbers at one position of the grid (1 in
// NCHW; with the batch last those of several images), bytes of a number.
struct Unit {
    int64_t lanes, tile, width, bytes;

    int64_t tile_positions() const { return tile * lanes / width; }
};

// The bytes of a core's caches; 0 or less where the system does not say.
#ifdef _SC_LEVEL2_CACHE_SIZE
inline int64_t first_level() { return sysconf(_SC_LEVEL1_DCACHE_SIZE); }
inline int64_t second_level() { return sysconf(_SC_LEVEL2_CACHE_SIZE); }
#else
inline int64_t first_level() { return 0; }
inline int64_t second_level() { return 0; }
#endif

// Planes of one strip together: seven eighths of a core's second-level cache, of which at most 1 MB was measured.
inline int64_t cache_bytes() {
    static const int64_t found = second_level();
    return (found > 0 ? std::clamp<int64_t>(found, 1 << 18, 1 << 20) : 1 << 20) / 8 * 7;
}

// What the planes under one tile may take of the first-level cache; indices and sums pass through the rest.
inline int64_t first_cache_bytes() {
    static const int64_t found = first_level();
    return std::clamp<int64_t>(found, 32 << 10, 48 << 10) / 4 * 3;
}

// Multiply-adds of vectors that a row has for one tile in one block of channels, at least and on average. Where a vector
// fills a cache line, the second level feeds half as many of them a cycle, and smaller blocks for the first level pay.
constexpr int64_t WORK_TOGETHER = 192, WORK_OF_LINES = 128;

// A piece of the grid whose planes stay in the second-level cache; its first image, and its positions.
struct Strip {
    int64_t image, begin, end;
};

// A piece of a strip whose sums stay in registers.
struct Tile {
    int64_t position;   // from the strip's begin
    int rows, columns;  // columns in vectors
    int64_t target;     // where its sums go, from the first ones of a row on
};

constexpr int TALLEST = 8;  // rows of a tile

// What one sweep over the weight's rows computes: a whole strip, or a single tile where rows are cut into segments. A
// row of sums has `pitch` positions.
struct Piece {
    int64_t length, pitch;
    std::vector<Tile> tiles;
    std::vector<std::vector<Run>> runs;  // one list for each view written
};

// With the batch last, strips of whole rows, and of whole windows that are as many rows high. The strips of each of
// `parts` of the rows come together, of all images, so that a thread for each part has memory pages of its own.
inline std::vector<Strip> cut_rows(const Grid& grid, const Unit& unit, int64_t images, int64_t room, int64_t parts,
                                   int64_t window) {
    const int64_t even = 2 * std::max<int64_t>(window, 1);
    const int64_t longest = std::max(room / grid.pitch / even * even, even);
    const int64_t count = (grid.height + longest - 1) / longest;
    std::vector<Strip> strips;
    for (int64_t part = 0; part < parts; ++part)
        for (int64_t image = 0; image < images; image += unit.width)
            for (int64_t i = count * part / parts; i < count * (part + 1) / parts; ++i) {
                const int64_t top = std::min(i * longest, grid.height);
                const int64_t bottom = std::min(top + longest, grid.height);
                strips.push_back({image, top * grid.pitch, (bottom - 1) * grid.pitch + grid.width});
            }
    return strips;
}

// In NCHW, strips of whole vectors, whatever rows they cross.
inline std::vector<Strip> cut_vectors(const Grid& grid, const Unit& unit, int64_t room) {
    const int64_t vectors = (grid.positions() + unit.lanes - 1) / unit.lanes;
    const int64_t longest = std::max<int64_t>(room / unit.lanes / unit.tile * unit.tile, unit.tile);
    const int64_t count = (vectors + longest - 1) / longest;
    std::vector<Strip> strips;
    for (int64_t i = 0; i < count; ++i)
        strips.push_back({0, vectors * i / count * unit.lanes, vectors * (i + 1) / count * unit.lanes});
    return strips;
}

// In NCHW, where tiles are whole vectors of an image's rows: strips of whole rows of one image.
inline std::vector<Strip> cut_lines(const Grid& grid, int64_t room) {
    const int64_t longest = std::max<int64_t>(room / grid.pitch / TALLEST * TALLEST, TALLEST);
    const int64_t count = (grid.height + longest - 1) / longest;
    std::vector<Strip> strips;
    for (int64_t image = 0; image < grid.images; ++image)
        for (int64_t i = 0; i < count; ++i) {
            const int64_t begin = image * grid.image_pitch + i * longest * grid.pitch;
            const int64_t rows = std::min(longest, grid.height - i * longest);
            strips.push_back({0, begin, begin + (rows - 1) * grid.pitch + grid.width});
        }
    return strips;
}

inline std::vector<Strip> cut_strips(const Grid& grid, const Unit& unit, int64_t images, int64_t planes,
                                     int64_t parts, int64_t window = 0, bool in_lines = false) {
    const int64_t room = cache_bytes() / unit.bytes / unit.width / planes - grid.before - grid.after;
    if (in_lines) return cut_lines(grid, room);
    return unit.width > 1 ? cut_rows(grid, unit, images, room, parts, window) : cut_vectors(grid, unit, room);
}

inline int64_t longest_strip(const std::vector<Strip>& strips) {
    int64_t longest = 0;
    for (const Strip& strip : strips) longest = std::max(longest, strip.end - strip.begin);
    return longest;
}

// With the batch last, tiles of rows and columns: nearly square ones share the most input among their taps.
inline std::vector<Tile> cut_squares(const Grid& grid, const Unit& unit, const Strip& strip) {
    const int64_t wide = unit.width / unit.lanes, positions = std::max<int64_t>(unit.tile / wide, 1);
    const int tallest = grid.width * 4 <= positions ? 4 : grid.width * 2 <= positions || positions >= 8 ? 2 : 1;
    const int64_t rows = (strip.end - strip.begin + grid.pitch - 1) / grid.pitch;
    std::vector<Tile> tiles;
    for (int64_t row = 0; row < rows;) {
        int height = tallest;
        while (row + height > rows) height /= 2;
        const int64_t longest = positions / height;
        const int64_t across = (grid.width + longest - 1) / longest;
        for (int64_t i = 0; i < across; ++i) {
            const int64_t first = grid.width * i / across;
            const int columns = int((grid.width * (i + 1) / across - first) * wide);
            tiles.push_back({row * grid.pitch + first, height, columns, (row * grid.pitch + first) * unit.width});
        }
        row += height;
    }
    return tiles;
}

// In NCHW, tiles of whole vectors of a row, and of the rows below it. Where a row has no whole number of vectors, two
// tiles share some of its positions, and compute them twice.
inline std::vector<Tile> cut_lines(const Grid& grid, const Unit& unit, const Strip& strip) {
    const int64_t vectors = (grid.width + unit.lanes - 1) / unit.lanes, least = grid.width % unit.lanes ? 2 : 1;
    const int64_t across = std::max((vectors + unit.tile - 1) / unit.tile, least);
    const int64_t rows = (strip.end - strip.begin + grid.pitch - 1) / grid.pitch;
    int height = TALLEST;
    while (height * ((vectors + across - 1) / across) > unit.tile) height /= 2;
    std::vector<Tile> tiles;
    for (int64_t row = 0; row < rows; row += height) {
        while (row + height > rows) height /= 2;
        for (int64_t i = 0; i < across; ++i) {
            const int64_t first = vectors * i / across, columns = vectors * (i + 1) / across - first;
            const int64_t left = std::min(first * unit.lanes, grid.width - columns * unit.lanes);
            tiles.push_back({row * grid.pitch + left, height, int(columns), 0});
        }
    }
    return tiles;
}

// Whether rows of a grid are nearly whole vectors.
inline bool has_lines(const Grid& grid, int64_t lanes) {
    return grid.width >= lanes && (grid.width + lanes - 1) / lanes * lanes * 4 <= grid.width * 5;
}

inline std::vector<Tile> cut_tiles(const Grid& grid, const Unit& unit, const Strip& strip) {
    if (unit.width > 1) return cut_squares(grid, unit, strip);
    const int64_t vectors = (strip.end - strip.begin) / unit.lanes, count = (vectors + unit.tile - 1) / unit.tile;
    std::vector<Tile> tiles;
    for (int64_t i = 0; i < count; ++i) {
        const int64_t first = vectors * i / count;
        tiles.push_back({first * unit.lanes, 1, int(vectors * (i + 1) / count - first), first * unit.lanes});
    }
    return tiles;
}

inline std::vector<Piece> cut_pieces(const Grid& grid, const Unit& unit, const Strip& strip, bool single_tiles) {
    const auto tiles = cut_tiles(grid, unit, strip);
    std::vector<Piece> pieces;
    if (!single_tiles) {
        const int64_t length = strip.end - strip.begin + unit.lanes;
        pieces.push_back({length, grid.pitch, tiles, {}});
        for (const View& view : grid.write) pieces[0].runs.push_back(runs_of(grid, view, strip.begin, strip.end));
        return pieces;
    }
    for (const Tile& tile : tiles) {
        const int64_t columns = tile.columns * unit.lanes / unit.width;
        pieces.push_back({tile.rows * columns, columns, {{tile.position, tile.rows, tile.columns, 0}}, {}});
        for (const View& view : grid.write) {
            std::vector<Run> runs;
            for (int64_t row = 0; row < tile.rows; ++row) {
                const int64_t begin = strip.begin + tile.position + row * grid.pitch;
                for (Run run : runs_of(grid, view, begin, std::min(begin + columns, strip.end))) {
                    run.flat += row * columns;
                    runs.push_back(run);
                }
            }
            pieces.back().runs.push_back(runs);
        }
    }
    return pieces;
}

inline int64_t count_tiles(const Grid& grid, const Unit& unit, int64_t images) {
    return grid.positions() / unit.tile_positions() * (unit.width > 1 ? images / unit.width : 1);
}

// How many input channels are computed before the next ones. Their part under one tile fits into a core's first-level
// cache, so that all rows find it there; but a row has some nonzeros among them, because its sums are loaded and stored
// again for each block. If it has too few in what fits, blocks are larger, or all channels where cutting the rows costs
// more than it gains: where half the second-level cache holds the input under a tile, or all of that cache where there
// are few tiles. With the batch last only layers of several taps, which read the same input again, gain from blocks of
// the first-level cache.
inline int64_t channels_together(const Grid& grid, const Unit& unit, int64_t images, int64_t channels, int64_t nonzeros,
                                 int64_t rows) {
    const int64_t whole = (grid.positions() + unit.lanes - 1) / unit.lanes * unit.lanes;
    const int64_t across = unit.width > 1 ? unit.tile_positions() : std::min(unit.tile_positions(), whole);
    const int64_t touched = std::min((grid.reach_y + 1) * (across + grid.reach_x), across + grid.before + grid.after);
    const int64_t bytes = touched * unit.width * unit.bytes * int64_t(grid.read.size());
    const int64_t fitting = std::max<int64_t>(first_cache_bytes() / bytes, 1);
    const int64_t vectors = std::max<int64_t>(across * unit.width / unit.lanes, 1);
    const auto enough = [&](int64_t work) { return work / vectors * channels * rows / std::max<int64_t>(nonzeros, 1); };
    const bool read_again = unit.width == 1 || grid.tap_shift.size() > 1;
    const bool lines = unit.lanes * unit.bytes >= 64;
    if (fitting >= enough(lines ? WORK_OF_LINES : WORK_TOGETHER) && channels >= 2 * fitting && read_again) return fitting;
    const int64_t together = std::max(fitting, enough(WORK_TOGETHER));
    const int64_t room = count_tiles(grid, unit, images) < 8 ? cache_bytes() : cache_bytes() / 2;
    return channels >= 3 * together && channels * bytes > room ? together : channels;
}
