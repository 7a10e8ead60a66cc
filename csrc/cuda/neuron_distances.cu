// Differences first, squares after: exact where rows are nearly equal. See mtz/neuron_distances.h.
//
// Two instructions an element, a subtraction and a fused multiply-add (four where float64 is split into two float32), in
// tiles of 128 x 128 pairs (64 x 64 in float64) that pass through shared memory (cuda/rows.cuh): of the instructions a
// thread issues for 16 columns in float32, 2048 are these, 64 load them, and about 100 bring the next piece. A block takes
// 36 KiB of shared memory and 128 registers a thread: two share a processor on every architecture from 8.0 on.
//
// A sum of d squares in float32 rounds d times: so runs of kRun columns are summed in registers, and the runs added up in
// the result, by the thread they belong to.
//
// With few tiles for a whole GPU the columns are shared out as well; slices go to the workspace, and are added up in
// order. Where a tile would get few columns then, tiles are of half the side, which take twice the loads but a quarter of
// the slices. How many depends on the shape alone.
#include "cuda/rows.cuh"
#include "mtz/neuron_distances.h"

namespace mtz::cuda {
namespace {

constexpr int kRun = 128, kPiece = 16;
// Blocks that fill a large GPU: two for each of its processors.
#ifndef MTZ_ENOUGH_BLOCKS
#define MTZ_ENOUGH_BLOCKS 264
#endif
constexpr Index kEnoughBlocks = MTZ_ENOUGH_BLOCKS;
constexpr Index kLeastColumns = 64, kManyColumns = 256;  // of a slice; and worth a large tile

struct Plan {
    Index down, across, slices, columns;  // tiles of a matrix; slices of `columns` columns

    Plan(const NeuronDistancesArgs& g, int side) {
        down = ceil_div(g.n, side);
        across = ceil_div(g.m, side);
        const Index wanted = kEnoughBlocks / larger(1, g.batch * down * across);
        const Index shared_out = larger(1, smaller(wanted, g.d / kLeastColumns));
        columns = larger(1, ceil_div(ceil_div(g.d, shared_out), kPiece)) * kPiece;
        slices = larger(1, ceil_div(g.d, columns));
    }
};

// Rows of a tile that a thread has: 8, but 4 in float64, and where 8 would leave processors idle. (Pieces of half precision
// are too few words for all threads of a small tile.)
int rows_a_thread(const NeuronDistancesArgs& g) {
    if (g.out_scalar == Scalar::float64) return 4;
    const Index tiles = g.batch * ceil_div(g.n, 128) * ceil_div(g.m, 128);
    const bool half = g.in == Scalar::float16 || g.in == Scalar::bfloat16;
    return half || tiles * larger(1, g.d / kManyColumns) >= kEnoughBlocks ? 8 : 4;
}

// to [slices, batch, n, m]: half of the sum of squared differences over the columns of each slice.
template <template <class> class Source, class In, class S, class T, class Out, int R, int Depth>
__global__ void __launch_bounds__(kTileThreads, Source<In>::kWords ? 2 : 1)
    distances_kernel(Index first_block, NeuronDistancesArgs g, Plan plan, Out* to) {
    using Tile = Tile<S, R, R, Depth>;
    SharedMemory memory;
    const Pieces<In, Tile> shared(memory);
    const Index per_slice = plan.down * plan.across, per_matrix = per_slice * plan.slices;
    const Index block = first_block + blockIdx.x, p = block / per_matrix, slice = block % per_matrix / per_slice;
    // bands of 8 rows of tiles, down first, so that neighbouring blocks share both operands in the cache
    const Index tile = block % per_slice, band = tile / (8 * plan.across), high = smaller(8, plan.down - 8 * band);
    const Index within = tile % (8 * plan.across);
    const Index i0 = (8 * band + within % high) * Tile::kRows, j0 = within / high * Tile::kColumns;
    const Source<In> a{static_cast<const In*>(g.a.data) + p * g.a.batch_stride + i0 * g.a.row_stride, g.a.row_stride,
                       g.a.column_stride, int(smaller(Tile::kRows, g.n - i0))};
    const Source<In> b{static_cast<const In*>(g.b.data) + p * g.b.batch_stride + j0 * g.b.row_stride, g.b.row_stride,
                       g.b.column_stride, int(smaller(Tile::kColumns, g.m - j0))};
    Out* out = to + ((slice * g.batch + p) * g.n + i0) * g.m + j0;
    T sum[R][R] = {};
    sum_over_rows<SquaredDifference, kRun, Tile>(
        a, b, slice * plan.columns, smaller(g.d, (slice + 1) * plan.columns), shared, sum, [&](int k) {
            const int thread = recomputed(int(threadIdx.x), k), j = tile_column(thread);
            const int columns = b.count - j;
            const bool first = k < kRun;
            int i = tile_row(thread);
            Out* row = out + i * g.m + j;
#pragma unroll
            for (int r = 0; r < R; ++r, i += 16, row += 16 * g.m) {
                const int here = i < a.count ? columns : 0;
                Out before[R];
#pragma unroll
                for (int c = 0; c < R; ++c) before[c] = 16 * c < here && !first ? row[16 * c] : Out(0);
#pragma unroll
                for (int c = 0; c < R; ++c)
                    if (16 * c < here) row[16 * c] = before[c] + Out(T(0.5) * sum[r][c]);
            }
        });
}

// out [count] = sum over slices of from [slices, count], in order; zero without any.
template <class Out>
__global__ void add_slices_kernel(const Out* from, Index slices, Index count, Out* out) {
    for (Index e = blockIdx.x * Index(blockDim.x) + threadIdx.x; e < count; e += Index(gridDim.x) * blockDim.x) {
        Out sum = 0;
        for (Index s = 0; s < slices; ++s) sum += from[s * count + e];
        out[e] = sum;
    }
}

template <class In, class S, class T, class Out, int R, int Depth>
Status run(const NeuronDistancesArgs& g, void* workspace, void* stream) {
    static_assert(kPiece % Depth == 0, "a slice is whole pieces");
    const Plan plan(g, 16 * R);
    const Index count = g.batch * g.n * g.m;
    Out* out = static_cast<Out*>(g.out);
    Status status;
    if (g.d == 0) {
        failed(status, launch_over(add_slices_kernel<Out>, count, 256, stream, out, Index(0), count, out));
        return status;
    }
    Out* to = plan.slices > 1 ? static_cast<Out*>(workspace) : out;
    SharedSize shared;
    Pieces<In, Tile<S, R, R, Depth>>::count(shared);
    if (failed(status, launch_in_turn(in_words<In>(g.a) && in_words<In>(g.b)
                                          ? distances_kernel<WordRows, In, S, T, Out, R, Depth>
                                          : distances_kernel<Rows, In, S, T, Out, R, Depth>,
                                      g.batch * plan.down * plan.across * plan.slices, kTileThreads, shared.bytes(),
                                      stream, g, plan, to)))
        return status;
    if (plan.slices > 1)
        failed(status, launch_over(add_slices_kernel<Out>, count, 256, stream, to, plan.slices, count, out));
    return status;
}

}  // namespace

std::size_t neuron_distances_workspace(const NeuronDistancesArgs& g) {
    const Plan plan(g, 16 * rows_a_thread(g));
    return plan.slices > 1 ? std::size_t(plan.slices * g.batch * g.n * g.m) * scalar_size(g.out_scalar) : 0;
}

Status neuron_distances(const NeuronDistancesArgs& g, void* workspace, void* stream) {
    const bool to_float = g.out_scalar == Scalar::float32;
    if (!to_float && (g.in != Scalar::float64 || g.out_scalar != Scalar::float64)) return {Code::unsupported};
    if (g.batch * g.n * g.m == 0) return {};
    const bool few = rows_a_thread(g) == 4;
    switch (g.in) {
        case Scalar::float32:
            return few ? run<float, float, float, float, 4, 16>(g, workspace, stream)
                       : run<float, float, float, float, 8, 16>(g, workspace, stream);
        case Scalar::float64:
            return !to_float ? run<double, double, double, double, 4, 16>(g, workspace, stream)
                   : few     ? run<double, Split, float, float, 4, 8>(g, workspace, stream)
                             : run<double, Split, float, float, 8, 8>(g, workspace, stream);
        case Scalar::float16:
            return run<Half, float, float, float, 8, 16>(g, workspace, stream);
        case Scalar::bfloat16:
            return run<BFloat16, float, float, float, 8, 16>(g, workspace, stream);
    }
    return {Code::unsupported};
}

}  // namespace mtz::cuda
