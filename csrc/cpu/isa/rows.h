// All pairs of rows of two matrices, by product or by squared difference:
//
//     out[i, j] = scale * sum_k op(a[i, k], b[j, k])                                a [n, d], b [m, d] -> out [n, m]
//
// A task is a block of the output, small enough that the packed rows of b stay in the second-level cache. Sums run over
// kRun numbers in registers and the runs one after another, whatever the blocks, so that neither the number of threads nor
// the block size shows in the result.
#pragma once

#include "cpu/isa/pack.h"

namespace mtz::cpu::MTZ_ISA {

constexpr Index kDepth = 256;  // columns packed at a time
constexpr Index kRun = 128;    // columns summed in registers: keeps the rounding error of 4608 columns below 1e-6

struct Blocks {
    Index rows, columns;  // of a block, multiples of the panel
    Index down, across;   // how many
};

// The block size that finishes first, by the count of multiply-adds and of numbers packed in the busiest thread.
template <class T>
inline Blocks choose_blocks(Index batch, Index n, Index m, int threads) {
    constexpr Index P = kPanel<T>;
    Blocks best{};
    double least = 0;
    for (Index rows = 256; rows >= 32; rows /= 2)
        for (Index columns = 512; columns >= 32; columns /= 2) {
            const Index r = smaller(rows, ceil_div(n, P) * P), c = smaller(columns, ceil_div(m, P) * P);
            const Blocks blocks{r, c, ceil_div(n, r), ceil_div(m, c)};
            const double rounds = double(ceil_div(batch * blocks.down * blocks.across, threads));
            const double cost = rounds * (double(r * c) + 8.0 * double(r + c));
            if (least == 0 || cost < least * 0.999) {
                best = blocks;
                least = cost;
            }
        }
    return best;
}

template <class T>
inline Index block_workspace(const Blocks& b) {
    return kDepth * (b.rows + b.columns) + b.rows * b.columns;
}

// The sums of one block, and where they are.
template <class T>
struct Work {
    T *a_panels, *b_panels, *tiles;  // [down, P, P] rows of tiles
    Work(T* work, const Blocks& blocks)
        : a_panels(work), b_panels(a_panels + kDepth * blocks.rows), tiles(b_panels + kDepth * blocks.columns) {}
};

// `packed(depth)` is called whenever the panels of so many columns lie in `work`.
template <class Op, class In, class T, class Packed>
inline void sum_block(const In* a, Index a_row, Index a_column, const In* b, Index b_row, Index b_column, Index rows,
                      Index columns, Index d, const Work<T>& work, Packed&& packed) {
    constexpr Index P = kPanel<T>;
    const auto [a_panels, b_panels, tiles] = work;
    const Index down = ceil_div(rows, P), across = ceil_div(columns, P);
    for (Index e = 0; e < down * across * P * P; ++e) tiles[e] = 0;
    for (Index k0 = 0; k0 < d; k0 += kDepth) {
        const Index depth = smaller(kDepth, d - k0);
        pack_rows(a + k0 * a_column, a_row, a_column, rows, depth, a_panels);
        pack_rows(b + k0 * b_column, b_row, b_column, columns, depth, b_panels);
        packed(depth);
        for (Index i = 0; i < down; ++i)
            for (Index j = 0; j < across; ++j)
                for (Index k = 0; k < depth; k += kRun)
                    add_tile<T, Op>(a_panels + (i * depth + k) * P, b_panels + (j * depth + k) * P,
                                    straight(smaller(kRun, depth - k), P, P), tiles + (i * across + j) * P * P);
    }
}

// One block. `memory` is [block_workspace], aligned to 64.
template <class Op, class In, class T, class Out>
inline void block_of_rows(const In* a, Index a_row, Index a_column, const In* b, Index b_row, Index b_column,
                          Index rows, Index columns, Index d, T scale, Out* out, Index out_row, const Blocks& blocks,
                          T* memory) {
    constexpr Index P = kPanel<T>;
    const Work<T> work(memory, blocks);
    sum_block<Op>(a, a_row, a_column, b, b_row, b_column, rows, columns, d, work, [](Index) {});
    const Index across = ceil_div(columns, P);
    for (Index i = 0; i < rows; ++i)
        for (Index j = 0; j < across; ++j) {
            const T* tile = work.tiles + (i / P * across + j) * P * P + i % P * P;
            Out* to = out + i * out_row + j * P;
            const Index width = smaller(P, columns - j * P);
            for (Index e = 0; e < width; ++e) to[e] = Out(scale * tile[e]);
        }
}

}  // namespace mtz::cpu::MTZ_ISA
