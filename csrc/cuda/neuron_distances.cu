// Differences first, squares after: exact where rows are nearly equal. See mtz/neuron_distances.h.
//
// Two instructions an element, a subtraction and a fused multiply-add (four where float64 is split into two float32), in
// tiles that pass through shared memory (cuda/pieces.cuh). Where there are many, tiles of 128 x 128 pairs (64 x 64 in
// float64): of the instructions a thread issues for 16 columns in float32, 2048 are these, 64 load them, and about 100 bring
// the next piece. A block takes 36 KiB of shared memory and 128 registers a thread: two share a processor on every
// architecture from 8.0 on.
//
// With few tiles for a whole GPU, in float32, tiles are of 32 x 32 pairs, and the eight warps of a block share out the
// columns: of the instructions a thread issues for 64 columns 512 are these, 24 load them, and about 60 bring the next piece,
// straight to its place with two on their way (51 KiB). The warps' sums are added up at the end, in order. Only where even
// such tiles are far too few do blocks share out the columns as well: slices go to the workspace, and are added up in order
// by a second launch. The other types have slices of large tiles, and of tiles of half the side where a large one would get
// few columns. The shape alone decides (cuda/neuron_distances_plan.cuh).
//
// A sum of d squares in float32 rounds d times: so runs of kRun columns are summed in registers, and the runs added up by the
// thread they belong to: in the result, or, where it has few sums, in registers.
#include "cuda/neuron_distances_plan.cuh"

namespace mtz::cuda {
namespace {

// Pieces of 8 x 8 sums a thread come in two steps, those of 4 x 4 in one.
template <class S, int R, int Depth>
using Square = Tile<S, R, R, Depth, 16, 16, 1, R == 8 ? 1 : 2>;

// Rows i0 ... of matrix p, as many as are left of `most`.
template <template <class> class Source, class In>
__device__ __forceinline__ Source<In> rows_of(const Matrices& m, Index p, Index i0, Index rows, int most) {
    return {static_cast<const In*>(m.data) + p * m.batch_stride + i0 * m.row_stride, m.row_stride, m.column_stride,
            int(smaller(most, rows - i0))};
}

// to [slices, batch, n, m]: half of the sum of squared differences over the columns of each slice.
template <template <class> class Source, class In, class S, class T, class Out, int R, int Depth>
__global__ void __launch_bounds__(kTileThreads, Source<In>::kWords ? 2 : 1)
    distances_kernel(Index first_block, NeuronDistancesArgs g, Plan plan, Out* to) {
    using Tile = Square<S, R, Depth>;
    SharedMemory memory;
    const Pieces<In, Tile> shared(memory);
    const Index per_slice = plan.down * plan.across, per_matrix = per_slice * plan.slices;
    const Index block = first_block + blockIdx.x, p = block / per_matrix, slice = block % per_matrix / per_slice;
    // bands of 8 rows of tiles, down first, so that neighbouring blocks share both operands in the cache
    const Index tile = block % per_slice, band = tile / (8 * plan.across), high = smaller(8, plan.down - 8 * band);
    const Index within = tile % (8 * plan.across);
    const Index i0 = (8 * band + within % high) * Tile::kRows, j0 = within / high * Tile::kColumns;
    const auto a = rows_of<Source, In>(g.a, p, i0, g.n, Tile::kRows);
    const auto b = rows_of<Source, In>(g.b, p, j0, g.m, Tile::kColumns);
    Out* out = to + ((slice * g.batch + p) * g.n + i0) * g.m + j0;
    T sum[R][R] = {};
    sum_over_rows<SquaredDifference, kRun, Tile>(
        a, b, slice * plan.length, smaller(g.d, (slice + 1) * plan.length), shared, sum, [&](int k) {
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

// The same in small tiles of float32, groups of threads sharing out the columns.
template <template <class> class Source>
__global__ void __launch_bounds__(Grouped::kThreads, 2)
    grouped_kernel(Index first_block, NeuronDistancesArgs g, Plan plan, float* to) {
    using Tile = Grouped;
    SharedMemory memory;
    const Pieces<float, Tile> shared(memory);
    // In 32 bits, and none that is not needed, as the first piece waits for these divisions. Neighbouring blocks share their
    // rows of b.
    const unsigned down = unsigned(plan.down), across = unsigned(plan.across), slices = unsigned(plan.slices);
    const unsigned block = unsigned(first_block) + blockIdx.x, strip = block / down;
    const unsigned matrix = strip < across ? 0 : strip / across, p = matrix < slices ? 0 : matrix / slices;
    const Index i0 = Index(block - strip * down) * Tile::kRows, j0 = Index(strip - matrix * across) * Tile::kColumns;
    const Index slice = matrix - p * slices;
    const auto a = rows_of<Source, float>(g.a, p, i0, g.n, Tile::kRows);
    const auto b = rows_of<Source, float>(g.b, p, j0, g.m, Tile::kColumns);
    float sum[8][4] = {}, total[8][4] = {};
    sum_over_rows<SquaredDifference, kRun * Tile::kGroups, Tile>(
        a, b, slice * plan.length, smaller(g.d, (slice + 1) * plan.length), shared, sum, [&](int) {
#pragma unroll
            for (int r = 0; r < 8; ++r)
#pragma unroll
                for (int c = 0; c < 4; ++c) total[r][c] += sum[r][c];
        });
    const Word<float> value = add_groups<Tile>(total, shared.a);
    const int thread = int(threadIdx.x) % Tile::kGroup, group = int(threadIdx.x) / Tile::kGroup;
    const int i = tile_row<8>(thread) + Tile::kHigh * group, j = tile_column<8>(thread);
    float* out = to + ((slice * g.batch + p) * g.n + i0 + i) * g.m + j0 + j;
#pragma unroll
    for (int c = 0; c < 4; ++c)
        if (i < a.count && j + 8 * c < b.count) out[8 * c] = 0.5f * value.at[c];
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

// A block for each tile and slice, by the kernel for rows that are words or not.
template <class In, class Tile, class Out>
cudaError_t launch_tiles(void (*in_words_kernel)(Index, NeuronDistancesArgs, Plan, Out*),
                         void (*kernel)(Index, NeuronDistancesArgs, Plan, Out*), const NeuronDistancesArgs& g,
                         const Plan& plan, Out* to, void* stream) {
    SharedSize shared;
    Pieces<In, Tile>::count(shared);
    return launch_in_turn(in_words<In>(g.a) && in_words<In>(g.b) ? in_words_kernel : kernel, plan.blocks(),
                          Tile::kThreads, shared.bytes(), stream, g, plan, to);
}

template <class In, class S, class T, class Out, int R, int Depth>
cudaError_t run(const NeuronDistancesArgs& g, const Plan& plan, void* to, void* stream) {
    static_assert(kPiece % Depth == 0, "a slice is whole pieces");
    return launch_tiles<In, Square<S, R, Depth>>(distances_kernel<WordRows, In, S, T, Out, R, Depth>,
                                                 distances_kernel<Rows, In, S, T, Out, R, Depth>, g, plan,
                                                 static_cast<Out*>(to), stream);
}

cudaError_t run_grouped(const NeuronDistancesArgs& g, const Plan& plan, void* to, void* stream) {
    return launch_tiles<float, Grouped>(grouped_kernel<WordRows>, grouped_kernel<Rows>, g, plan,
                                        static_cast<float*>(to), stream);
}

cudaError_t run_tiles(const NeuronDistancesArgs& g, const Plan& plan, void* to, void* stream) {
    switch (g.in) {
        case Scalar::float32:
            return plan.rows == 128 ? run<float, float, float, float, 8, 16>(g, plan, to, stream)
                                    : run_grouped(g, plan, to, stream);
        case Scalar::float64:
            return g.out_scalar == Scalar::float64 ? run<double, double, double, double, 4, 16>(g, plan, to, stream)
                   : plan.rows == 64               ? run<double, Split, float, float, 4, 8>(g, plan, to, stream)
                                                   : run<double, Split, float, float, 8, 8>(g, plan, to, stream);
        case Scalar::float16:
            return run<Half, float, float, float, 8, 16>(g, plan, to, stream);
        case Scalar::bfloat16:
            return run<BFloat16, float, float, float, 8, 16>(g, plan, to, stream);
    }
    return cudaErrorInvalidValue;
}

template <class Out>
cudaError_t add_slices(const NeuronDistancesArgs& g, const void* from, Index slices, void* stream) {
    const Index count = g.batch * g.n * g.m;
    return launch_over(add_slices_kernel<Out>, count, 256, stream, static_cast<const Out*>(from), slices, count,
                       static_cast<Out*>(g.out));
}

}  // namespace

std::size_t neuron_distances_workspace(const NeuronDistancesArgs& g) {
    const Plan plan = plan_of(g);
    return plan.slices > 1 ? std::size_t(plan.slices * g.batch * g.n * g.m) * scalar_size(g.out_scalar) : 0;
}

Status neuron_distances(const NeuronDistancesArgs& g, void* workspace, void* stream) {
    const bool to_float = g.out_scalar == Scalar::float32;
    if (!to_float && (g.in != Scalar::float64 || g.out_scalar != Scalar::float64)) return {Code::unsupported};
    if (g.batch * g.n * g.m == 0) return {};
    const Plan plan = plan_of(g);
    void* to = plan.slices > 1 ? workspace : g.out;
    Status status;
    if (g.d > 0 && failed(status, run_tiles(g, plan, to, stream))) return status;
    if (g.d == 0 || plan.slices > 1)
        failed(status, (to_float ? add_slices<float> : add_slices<double>)(g, to, g.d == 0 ? 0 : plan.slices, stream));
    return status;
}

}  // namespace mtz::cuda
