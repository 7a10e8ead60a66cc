// The second moment of patches as a product of the patch matrix with itself that never exists: a block takes a tile of
// 64 x 64 of the result (of the upper triangle) and a slice of the positions, and its pieces of patches are gathered from the
// image straight into shared memory. Any stride, padding, dilation and groups; no border terms, no cancellation. See
// mtz/conv2d_second_moment.h.
//
// Runs of kRun positions are summed in the type of the result, and the runs with the rounding of every addition kept beside
// the sum: as good as float64, which is slow on most GPUs. Slices are added up in order; how many there are depends on the
// shape alone.
#include "cuda/conv2d_second_moment.cuh"
#include "cuda/pieces.cuh"

namespace mtz::cuda {
namespace {

constexpr int kSide = 64;

template <class S>
constexpr int kDepth = 128 / sizeof(S);

struct Plan {
    Index side, tiles, positions, slices, length;  // rows of a matrix, tiles across; slices of `length` positions

    explicit Plan(const Conv2dSecondMomentArgs& g) {
        side = g.channels / g.groups * g.kernel[0] * g.kernel[1];
        tiles = ceil_div(side, kSide);
        positions = g.samples * g.output[0] * g.output[1];
        const Index blocks = larger(1, g.groups * tiles * (tiles + 1) / 2);
        const Index wanted = smaller(ceil_div(kEnoughBlocks, blocks), larger(1, positions / (4 * kRun)));
        length = larger(kRun, ceil_div(ceil_div(positions, wanted), kRun) * kRun);
        slices = ceil_div(positions, length);
    }
    Index sums() const { return slices > 1 ? slices : 0; }  // kept in the workspace: none or all slices
};

// Row (c, uy, ux) of the patch matrix: where it starts in a patch.
struct PatchRow {
    Index offset, y, x;
};

// Column (s, py, px): where its patch starts in x.
struct PatchColumn {
    Index offset, y, x;
};

template <class In>
struct Patches {
    using Element = In;
    static constexpr bool kWords = false;
    const Conv2dSecondMomentArgs& g;
    const PatchRow* rows;  // [kSide], in shared memory
    Index first_channel;

    __device__ __forceinline__ PatchColumn column(Index k) const {
        const Index across = g.output[1], area = g.output[0] * across;
        const Index y = k % area / across * g.stride[0] - g.padding[0], x = k % across * g.stride[1] - g.padding[1];
        return {k / area * g.x_stride[0] + first_channel * g.x_stride[1] + y * g.x_stride[2] + x * g.x_stride[3], y, x};
    }
    __device__ __forceinline__ const In* at(Index i, const PatchColumn& column) const {
        const PatchRow row = rows[i];
        const Index y = column.y + row.y, x = column.x + row.x;
        const bool inside = row.offset != kNoRow && y >= 0 && y < g.height && x >= 0 && x < g.width;
        return inside ? static_cast<const In*>(g.x) + column.offset + row.offset : nullptr;
    }
    static constexpr Index kNoRow = INT64_MIN;
};

template <class In>
__device__ __forceinline__ void find_rows(const Conv2dSecondMomentArgs& g, Index side, Index first, PatchRow* rows) {
    const Index kernel = g.kernel[0] * g.kernel[1];
    for (int i = int(threadIdx.x); i < kSide; i += kTileThreads) {
        const Index row = first + i, c = row / kernel;
        const Index y = row % kernel / g.kernel[1] * g.dilation[0], x = row % g.kernel[1] * g.dilation[1];
        const Index offset = c * g.x_stride[1] + y * g.x_stride[2] + x * g.x_stride[3];
        rows[i] = {row < side ? offset : Patches<In>::kNoRow, y, x};
    }
}

// Element (i, j) of a group's matrix, and its mirror image; NaN if the input is not finite.
template <class T>
__device__ __forceinline__ void write(const Conv2dSecondMomentArgs& g, Index side, Index group, Index i, Index j,
                                      double value) {
    T* out = static_cast<T*>(g.out) + group * side * side;
    out[i * side + j] = out[j * side + i] = T(*g.status ? kNaN : value);
}

// Tiles of the upper triangle; with several slices into `sums` [slices, groups, side, side], else into the result.
template <class In, class S>
__global__ void __launch_bounds__(kTileThreads)
    patches_kernel(Index first_block, Conv2dSecondMomentArgs g, Plan plan, double* sums) {
    using Tile = Tile<S, 4, 4, kDepth<S>>;
    SharedMemory memory;
    const Pieces<In, Tile> shared(memory);
    PatchRow* rows_a = memory.take<PatchRow>(kSide);
    PatchRow* rows_b = memory.take<PatchRow>(kSide);
    const Index per_slice = plan.tiles * plan.tiles, per_group = per_slice * plan.slices;
    const Index block = first_block + blockIdx.x, group = block / per_group, slice = block % per_group / per_slice;
    const Index i0 = block % per_slice / plan.tiles * kSide, j0 = block % plan.tiles * kSide;
    if (i0 > j0) return;
    find_rows<In>(g, plan.side, i0, rows_a);
    find_rows<In>(g, plan.side, j0, rows_b);
    sync_block();
    const Index first_channel = group * (g.channels / g.groups);
    const Patches<In> a{g, rows_a, first_channel}, b{g, rows_b, first_channel};
    S sum[4][4] = {}, total[4][4] = {}, lost[4][4] = {};
    sum_over_rows<Product, kRun, Tile>(a, b, slice * plan.length, smaller(plan.positions, (slice + 1) * plan.length),
                                       shared, sum, [&](int) {
#pragma unroll
                                           for (int r = 0; r < 4; ++r)
#pragma unroll
                                               for (int c = 0; c < 4; ++c)
                                                   add_exactly(sum[r][c], total[r][c], lost[r][c]);
                                       });
    const int thread = int(threadIdx.x);
#pragma unroll
    for (int r = 0; r < 4; ++r)
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            const Index i = i0 + tile_row(thread) + 16 * r, j = j0 + tile_column(thread) + 16 * c;
            if (i > j || j >= plan.side) continue;
            const double value = double(total[r][c]) + double(lost[r][c]);
            if (plan.slices > 1)
                sums[((slice * g.groups + group) * plan.side + i) * plan.side + j] = value;
            else
                write<S>(g, plan.side, group, i, j, value);
        }
}

// The slices added up; zero without any.
template <class S>
__global__ void add_slices_kernel(Conv2dSecondMomentArgs g, Plan plan, const double* sums) {
    const Index matrix = plan.side * plan.side, count = g.groups * matrix;
    for (Index e = blockIdx.x * Index(blockDim.x) + threadIdx.x; e < count; e += Index(gridDim.x) * blockDim.x) {
        const Index i = e % matrix / plan.side, j = e % plan.side;
        if (i > j) continue;
        double sum = 0;
        for (Index slice = 0; slice < plan.slices; ++slice) sum += sums[slice * count + e];
        write<S>(g, plan.side, e / matrix, i, j, sum);
    }
}

template <class In>
__global__ void check_kernel(Conv2dSecondMomentArgs g) {
    const Index count = g.samples * g.channels * g.height * g.width;
    bool bad = false;
    for (Index e = blockIdx.x * Index(blockDim.x) + threadIdx.x; e < count; e += Index(gridDim.x) * blockDim.x) {
        const Index x = e % g.width, y = e / g.width % g.height, c = e / (g.width * g.height) % g.channels;
        const Index s = e / (g.width * g.height * g.channels);
        const auto value = in_type_of_sum(
            static_cast<const In*>(g.x)[s * g.x_stride[0] + c * g.x_stride[1] + y * g.x_stride[2] + x * g.x_stride[3]]);
        bad = bad || !is_finite(value);
    }
    if (bad) atomic_max(g.status, 1);
}

}  // namespace

std::size_t patches_workspace(const Conv2dSecondMomentArgs& g) {
    const Plan plan(g);
    Workspace space;
    space.take<double>(plan.sums() * g.groups * plan.side * plan.side);
    return space.used();
}

template <class In, class S>
Status moment_by_patches(const Conv2dSecondMomentArgs& g, void* workspace, void* stream) {
    const Plan plan(g);
    double* sums = Workspace(workspace).take<double>(plan.sums() * g.groups * plan.side * plan.side);
    SharedSize shared;
    Pieces<In, Tile<S, 4, 4, kDepth<S>>>::count(shared);
    shared.add(sizeof(PatchRow), kSide).add(sizeof(PatchRow), kSide);
    Status status;
    if (failed(status, launch_over(check_kernel<In>, g.samples * g.channels * g.height * g.width, 256, stream, g)) ||
        failed(status, launch_in_turn(patches_kernel<In, S>, g.groups * plan.tiles * plan.tiles * plan.slices,
                                      kTileThreads, shared.bytes(), stream, g, plan, sums)))
        return status;
    if (plan.slices != 1)
        failed(status, launch_over(add_slices_kernel<S>, g.groups * plan.side * plan.side, 256, stream, g, plan, sums));
    return status;
}

template Status moment_by_patches<float, float>(const Conv2dSecondMomentArgs&, void*, void*);
template Status moment_by_patches<double, double>(const Conv2dSecondMomentArgs&, void*, void*);
template Status moment_by_patches<Half, float>(const Conv2dSecondMomentArgs&, void*, void*);
template Status moment_by_patches<BFloat16, float>(const Conv2dSecondMomentArgs&, void*, void*);

}  // namespace mtz::cuda
