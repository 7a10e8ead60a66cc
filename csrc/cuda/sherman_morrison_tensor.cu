// Many small float32 inverses where tensor cores are fast: a block of threads a matrix, which stays in shared memory through
// all its updates and is written back if they all succeed. For each panel of vectors, between barriers:
//
//     V = Y A^-1;  S = V Y^T;  the pivots;  V <- X V;  A^-1 -= V^T D V, while the next panel comes
//
// See cuda/sherman_morrison.cuh for the formula, cuda/pivots.cuh for X, cuda/sherman_morrison_tensor.cuh for the products.
#include "cuda/sherman_morrison_resident.cuh"
#include "cuda/sherman_morrison_tensor.cuh"

namespace mtz::cuda {
namespace tensor {
namespace {

template <class Shape>
std::size_t shared_bytes(Index d) {
    CountedMemory space;
    Lane<Shape>(d, 0).take(space);
    return space.size.bytes();
}

template <class Shape>
struct Block {
    const ShermanMorrisonArgs& g;
    Lane<Shape> lane;
    Resident<float> resident;
    int warp, panel;

    __device__ __forceinline__ explicit Block(const ShermanMorrisonArgs& args)
        : g(args), lane(args.d, int(threadIdx.x)), resident(args, lane.side), panel(lane.panel) {
        SharedMemory memory;
        lane.take(memory);
        warp = resident.thread / kWarp;
    }

    __device__ __forceinline__ float* element(int i, int j) const { return lane.matrix + lane.at(i, j); }
    // How many blocks of vectors there are from number `first` on, in its panel
    __device__ __forceinline__ int blocks(Index first) const {
        return int(ceil_div(smaller(g.k - first, panel), lane.kBlock));
    }
    __device__ __forceinline__ void start_vectors(Index p, const Index* order, Index first, float* to) const {
        resident.start_vectors(p, order, first, blocks(first) * lane.kBlock, resident.thread, resident.threads,
                               [&](int q, int j) { return to + lane.at(q, j); });
    }
    __device__ __forceinline__ void keep_weight(double w) const {
        if (resident.thread >= kPanel) return;
        const float root = float(square_root(w < 0 ? -w : w));
        lane.root[resident.thread] = w < 0 ? -root : root;
    }

    // Brings the matrix and the first panel.
    __device__ __forceinline__ const Index* start(Index p, Index* orders) const {
        resident.start_matrix(p, [&](int i, int j) { return element(i, j); });
        double mine;
        const Index* order =
            resident.bring_in_order(p, orders, reinterpret_cast<Index*>(lane.place(1)), mine,
                                    [&](const Index* order) { start_vectors(p, order, 0, lane.place(0)); });
        keep_weight(mine);
        copy_async_wait<0>();
        sync_block();  // the matrix and the vectors are there
        return order;
    }

    __device__ __forceinline__ void update(int blocks, const float* v) const {
        constexpr int rows = 16 * Shape::kRows, columns = 8 * Shape::kColumns, ratio = rows / columns;
        static_assert(rows % columns == 0);
        const int across = int(ceil_div(lane.side, columns));
        int i = 0, j = warp;
        for (;;) {  // rows of parts get shorter by `ratio`
            while (j >= across && i * rows < lane.side) ++i, j += ratio * i - across;
            if (i * rows >= lane.side) return;
            lane.update(blocks, i * rows, j * columns, v);
            j += Shape::kWarps;
        }
    }

    // The status, the same for every thread.
    __device__ __forceinline__ int update_all(Index p, const Index* order) const {
        const double doubt = rounding<float>(g.d);
        const int strips = int(ceil_div(lane.side, 8 * Shape::kColumns));
        int y = 0;  // the place of Y
#pragma unroll 1
        for (Index first = 0; first < g.k; first += panel, y ^= 1) {
            const int there = blocks(first);
            const bool next = first + panel < g.k;
            const int parts = there > 1 ? 2 * strips : strips;  // of V
            float *in = lane.place(y), *out = lane.place(y ^ 1);
            if (resident.thread < kPanel) lane.pivots.sign[resident.thread] = lane.root[resident.thread] < 0 ? -1 : 1;
#pragma unroll 1
            for (int e = warp; e < parts; e += Shape::kWarps) lane.make_v({there, e / strips, e % strips}, in, out);
            sync_block();  // V is there
#pragma unroll 1
            for (int e = warp; e < there * (there + 1) / 2; e += Shape::kWarps) lane.make_s(e, in, out);
            const double w = next ? resident.weight(p, order, first + panel, panel) : 0;
            const int status = lane.pivots.eliminate(there, doubt);
            if (status != kUpdated) return status;
            keep_weight(w);
#pragma unroll 1
            for (int e = warp; e < parts; e += Shape::kWarps) lane.solve({there, e / strips, e % strips}, out, in);
            sync_block();  // V is solved
            if (next) start_vectors(p, order, first + panel, out);
            copy_async_commit();
            update(there, in);
            copy_async_wait<0>();
            sync_block();  // the matrix has this panel, and the next one is there
        }
        return resident.judge([&](int i, int j) { return element(i, j); });
    }

    __device__ __forceinline__ void write(Index p) const {
        resident.write(p, [&](int i, int j) { return element(i, j); });
    }
};

template <class Shape>
__global__ void __launch_bounds__(Shape::kWarps* kWarp, Shape::kBlocks)
    tensor_kernel(Index first, ShermanMorrisonArgs g, Index* orders) {
    const Index p = first + blockIdx.x;
    const Block<Shape> block(g);
    const int status = block.update_all(p, block.start(p, orders));
    if (threadIdx.x == 0) g.status[p] = status;
    if (status == kUpdated) block.write(p);
}

template <class Shape>
Status update(const ShermanMorrisonArgs& g, void* workspace, void* stream) {
    Index* orders = Workspace(workspace).take<Index>(g.batch * g.k);
    return status_of(launch_in_turn(tensor_kernel<Shape>, g.batch, Shape::kWarps * kWarp, shared_bytes<Shape>(g.d),
                                    stream, g, orders));
}

}  // namespace
}  // namespace tensor

bool fits_tensor_cores(Index d) {
    using namespace tensor;
    int device = 0, most = 0;
    if (d > Wide::kMost || !has_fast_tensor_cores() || cudaGetDevice(&device) != cudaSuccess ||
        cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess)
        return false;
    return (d <= Narrow::kMost ? shared_bytes<Narrow>(d) : shared_bytes<Wide>(d)) <= std::size_t(most);
}

Status update_tensor(const ShermanMorrisonArgs& g, void* workspace, void* stream) {
    using namespace tensor;
    return g.d <= Narrow::kMost ? update<Narrow>(g, workspace, stream) : update<Wide>(g, workspace, stream);
}

}  // namespace mtz::cuda
