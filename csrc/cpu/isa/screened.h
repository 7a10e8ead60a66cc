// Squared differences of all pairs of rows by one multiply-add a number where that is accurate:
//
//     1/2 |a_i - b_j|^2 = 1/2 |a_i|^2 + 1/2 |b_j|^2 - a_i b_j
//
// and by subtracting first wherever that cancels. Which of the two a pair gets depends on its two rows alone, and either
// way the sum over k has one order, so blocks, threads and the order of the rows do not show in the result.
#pragma once

#include "cpu/isa/rows.h"

namespace mtz::cpu::MTZ_ISA {

// Distances below 1 / kCancels of the half norms' sum are recomputed: rounding grows by as much. With float64 a million
// leaves nine digits for results in float32.
template <class T>
constexpr double kCancels = sizeof(T) == 4 ? 2.0 : 1048576.0;

constexpr Index kWorthScreening = 64;  // columns: with fewer, nearly parallel rows are common and the rest is overhead
constexpr Index kMany = 32;            // one pair in so many: subtracting a whole block costs less than those alone

template <class T>
inline Index screened_workspace(const Blocks& b) {
    const Index bytes = (b.rows + b.columns) * Index(sizeof(double)) + b.rows * b.columns;
    return block_workspace<T>(b) + ceil_div(bytes, 64) * kPanel<T>;
}

// half[r] += 1/2 sum_k panel[k, r]^2
template <class T>
inline void add_half_norms(const T* panel, Index depth, double* half) {
    constexpr Index P = kPanel<T>;
    for (Index k = 0; k < depth; ++k)
#pragma GCC unroll 16
        for (Index r = 0; r < P; ++r) half[r] += 0.5 * double(panel[k * P + r]) * double(panel[k * P + r]);
}

// What pairs of a block are recomputed from: its rows, room for a panel of either matrix, and pairs that wait until there
// is one for every lane.
template <class T, class Out>
struct Cancelled {
    const T *a, *b;
    Index a_row, a_column, b_row, b_column, d;
    Out* out;
    Index out_row;
    T *a_panel, *b_panel;  // [kDepth, P]
    Index count, i[kPanel<T>], j[kPanel<T>];

    // sum[l] += sum_k (a_panel[k, l] - b_panel[k, l])^2 over a run, in the order of a tile
    static void add_lanes(const T* a_panel, const T* b_panel, Index run, T* sum) {
        constexpr int lanes = Simd<T>::kLanes, vectors = kPanel<T> / lanes;
        Vector<T> all[vectors] = {};
        for (Index k = 0; k < run; ++k)
#pragma GCC unroll 4
            for (int v = 0; v < vectors; ++v) {
                const Index at = k * kPanel<T> + v * lanes;
                const Vector<T> e = load(b_panel + at) - load(a_panel + at);
                all[v] += e * e;
            }
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) store(sum + v * lanes, load(sum + v * lanes) + all[v]);
    }

    void flush() {
        constexpr Index P = kPanel<T>;
        alignas(64) T sum[P] = {};
        for (Index k0 = 0; k0 < d; k0 += kDepth) {
            const Index depth = smaller(kDepth, d - k0);
            const auto a_of = [&](Index l) { return l < count ? a + i[l] * a_row + k0 * a_column : nullptr; };
            const auto b_of = [&](Index l) { return l < count ? b + j[l] * b_row + k0 * b_column : nullptr; };
            pack_panel_of<T>(a_of, a_column, depth, a_panel);
            pack_panel_of<T>(b_of, b_column, depth, b_panel);
            for (Index k = 0; k < depth; k += kRun)
                add_lanes(a_panel + k * P, b_panel + k * P, smaller(kRun, depth - k), sum);
        }
        for (Index l = 0; l < count; ++l) out[i[l] * out_row + j[l]] = Out(T(0.5) * sum[l]);
        count = 0;
    }

    void add(Index row, Index column) {
        i[count] = row;
        j[count] = column;
        if (++count == kPanel<T>) flush();
    }
};

// One block, as block_of_rows with Difference. `memory` is [screened_workspace], aligned to 64.
template <class T, class Out>
inline void screened_block(const T* a, Index a_row, Index a_column, const T* b, Index b_row, Index b_column, Index rows,
                           Index columns, Index d, Out* out, Index out_row, const Blocks& blocks, T* memory) {
    constexpr Index P = kPanel<T>;
    const Work<T> work(memory, blocks);
    double* a_half = reinterpret_cast<double*>(memory + block_workspace<T>(blocks));
    double* b_half = a_half + blocks.rows;
    bool* near = reinterpret_cast<bool*>(b_half + blocks.columns);  // [down, across, P, P], as the tiles
    const Index down = ceil_div(rows, P), across = ceil_div(columns, P);
    for (Index r = 0; r < blocks.rows + blocks.columns; ++r) a_half[r] = 0;
    sum_block<Product>(a, a_row, a_column, b, b_row, b_column, rows, columns, d, work, [&](Index depth) {
        for (Index i = 0; i < down; ++i) add_half_norms(work.a_panels + i * depth * P, depth, a_half + i * P);
        for (Index j = 0; j < across; ++j) add_half_norms(work.b_panels + j * depth * P, depth, b_half + j * P);
    });
    // `visit(place among the tiles, row and first column of the block, columns)` for every row of every tile
    const auto each = [&](auto&& visit) {
        for (Index i = 0; i < down; ++i)
            for (Index j = 0; j < across; ++j)
                for (Index r = 0; r < smaller(P, rows - i * P); ++r)
                    visit(((i * across + j) * P + r) * P, i * P + r, j * P, smaller(P, columns - j * P));
    };
    Index count = 0;
    each([&](Index at, Index i, Index j, Index width) {
        Out values[P];
#pragma GCC unroll 16
        for (Index c = 0; c < P; ++c) {
            const double norms = a_half[i] + b_half[j + c], value = norms - double(work.tiles[at + c]);
            values[c] = Out(value);
            near[at + c] = !(value * kCancels<T> >= norms);  // NaN too
        }
#pragma GCC unroll 16
        for (Index c = 0; c < P; ++c) count += near[at + c];  // columns that are missing are not near
        Out* to = out + i * out_row + j;
        for (Index c = 0; c < width; ++c) to[c] = values[c];
    });
    if (count * kMany > rows * columns) {
        sum_block<Difference>(a, a_row, a_column, b, b_row, b_column, rows, columns, d, work, [](Index) {});
        each([&](Index at, Index i, Index j, Index width) {
            for (Index c = 0; c < width; ++c)
                if (near[at + c]) out[i * out_row + j + c] = Out(T(0.5) * work.tiles[at + c]);
        });
    } else if (count > 0) {
        Cancelled<T, Out> cancelled{a,   b,       a_row,         a_column,      b_row, b_column, d,
                                    out, out_row, work.a_panels, work.b_panels, 0,     {},       {}};
        each([&](Index at, Index i, Index j, Index width) {
            for (Index c = 0; c < width; ++c)
                if (near[at + c]) cancelled.add(i, j + c);
        });
        if (cancelled.count > 0) cancelled.flush();
    }
}

}  // namespace mtz::cpu::MTZ_ISA
