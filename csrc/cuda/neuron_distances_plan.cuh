// How the pairs of neuron_distances are shared out among blocks: by the shape alone, so that results do not depend on the
// device.
#pragma once

#include <initializer_list>

#include "cuda/pieces.cuh"
#include "mtz/neuron_distances.h"

namespace mtz::cuda {

constexpr int kRun = 128, kPiece = 16;
// Blocks that fill a large GPU: two for each of its processors.
#ifndef MTZ_ENOUGH_BLOCKS
#define MTZ_ENOUGH_BLOCKS 264
#endif
constexpr Index kEnoughBlocks = MTZ_ENOUGH_BLOCKS, kProcessors = kEnoughBlocks / 2;
constexpr Index kLeastColumns = 64, kManyColumns = 256;  // of a slice; and worth a large tile

// Tiles of 32 x 32 pairs, whose columns eight warps share out: of a piece of 64 columns each takes two words for 8 x 4 sums a
// thread. (Tiles of 64 x 32, a block of 512 threads a processor, take a tenth longer: all of it waits at every barrier.)
using Grouped = Tile<float, 8, 4, 64, 4, 8, 8, 3>;

struct Plan {
    int rows;                            // of a tile
    Index down, across, slices, length;  // tiles of a matrix; slices of the columns, of `length` each

    Plan(const NeuronDistancesArgs& g, int tile_rows, int tile_columns)
        : rows(tile_rows),
          down(ceil_div(g.n, tile_rows)),
          across(ceil_div(g.m, tile_columns)),
          slices(1),
          length(g.d),
          batch_(g.batch) {}

    // Slices for `wanted` blocks, of at least `least` columns, and of whole pieces.
    Plan sliced(Index wanted, Index least, int piece) const {
        Plan plan = *this;
        const Index shared_out = larger(1, smaller(wanted / larger(1, blocks()), length / least));
        plan.length = larger(1, ceil_div(ceil_div(length, shared_out), piece)) * piece;
        plan.slices = larger(1, ceil_div(length, plan.length));
        return plan;
    }
    Index blocks() const { return batch_ * down * across * slices; }

    // About how many cycles it takes in float32, as measured on an H200, by the columns of the tiles that a processor works
    // on; besides for each tile, until its first piece is there and while sums are added up and written; and for the second
    // launch that slices take. Two tiles share a processor.
    Index cycles() const {
        const Index rounds = ceil_div(blocks(), kProcessors);
        if (rows == 128) return rounds * (366 * length + 1500) + 2500;
        return rounds * (23 * length + 2500) + 2500 + (slices > 1 ? 10000 : 0);
    }

  private:
    Index batch_;
};

// The plan of the fewest cycles: tiles of 128 x 128 where there are enough of them for all processors, else of 32 x 32; slices
// where also those are far too few.
inline Plan plan_in_float(const NeuronDistancesArgs& g) {
    Plan best(g, 128, 128);
    const Plan small(g, Grouped::kRows, Grouped::kColumns);
    if (small.blocks() > INT32_MAX) return best;  // grouped_kernel counts blocks in 32 bits
    for (const Plan& other : {small, small.sliced(kProcessors, kRun, Grouped::kDepth)})
        if (other.cycles() < best.cycles()) best = other;
    return best;
}

// Rows of a tile that a thread has: 8, but 4 in float64, and where 8 would leave processors idle. (Pieces of half precision
// are too few words for all threads of a small tile.)
inline int rows_a_thread(const NeuronDistancesArgs& g) {
    if (g.out_scalar == Scalar::float64) return 4;
    const Index tiles = g.batch * ceil_div(g.n, 128) * ceil_div(g.m, 128);
    const bool half = g.in == Scalar::float16 || g.in == Scalar::bfloat16;
    return half || tiles * larger(1, g.d / kManyColumns) >= kEnoughBlocks ? 8 : 4;
}

inline Plan plan_of(const NeuronDistancesArgs& g) {
    if (g.in == Scalar::float32) return plan_in_float(g);
    const int side = 16 * rows_a_thread(g);
    return Plan(g, side, side).sliced(kEnoughBlocks, kLeastColumns, kPiece);
}

}  // namespace mtz::cuda
