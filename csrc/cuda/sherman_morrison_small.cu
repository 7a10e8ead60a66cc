// Many small inverses: a block of threads a matrix, which stays in shared memory through all its updates and is written
// back if they all succeed. See cuda/sherman_morrison.cuh for the formula, cuda/sherman_morrison_small.cuh for its steps.
#include "cuda/sherman_morrison_small.cuh"

namespace mtz::cuda {
namespace small {
namespace {

template <class T>
std::size_t shared_bytes(Index d) {
    CountedMemory space;
    Block<T>(side_of(d), 0).take(space);
    return space.size.bytes();
}

__device__ __forceinline__ int whole_warps(int threads) {
    return (threads + kWarp - 1) / kWarp * kWarp;
}

template <class T>
struct Small {
    const ShermanMorrisonArgs& g;
    Block<T> block;
    Layout<T> at;
    Resident<T> resident;
    int thread, threads, warp;

    __device__ __forceinline__ explicit Small(const ShermanMorrisonArgs& args)
        : g(args),
          block(side_of(args.d), int(threadIdx.x)),
          at(block.at),
          resident(args, at.side),
          thread(int(threadIdx.x)),
          threads(int(blockDim.x)) {
        SharedMemory memory;
        block.take(memory);
        warp = thread / kWarp;
    }

    // The same, its addresses and what follows from them worked out again, so that no registers hold them through a step.
    __device__ __forceinline__ Block<T> again(int step) const {
        Block<T> result(recomputed(at.side, step + 1), recomputed(thread, step + 1));
        SharedMemory memory;
        result.take(memory);
        return result;
    }
    __device__ __forceinline__ T* element(int i, int j) const { return block.matrix + i * at.pitch + j; }
    __device__ __forceinline__ bool there(int b) const { return Index(b) * K < g.k; }

    // Block b of the vectors, by the first `step` threads.
    __device__ __forceinline__ void start_vectors(Index p, const Index* order, int b, int step) const {
        T* raw = block.raw_of(b);
        resident.start_vectors(p, order, Index(b) * K, K, recomputed(thread, b), step,
                               [&](int q, int j) { return raw + q * at.side + j; });
    }

    __device__ __forceinline__ double weight(Index p, const Index* order, int b) const {
        return resident.weight(p, order, Index(b) * K, K);
    }
    __device__ __forceinline__ void keep_weight(int b, double w) const {
        if (thread >= K) return;
        block.root_of(b)[thread] = T(square_root(w < 0 ? -w : w));
        block.sign_of(b)[thread] = T(w < 0 ? -1 : 1);
    }

    // Brings the matrix and the first vectors.
    __device__ __forceinline__ const Index* start(Index p, Index* orders) const {
        resident.start_matrix(p, [&](int i, int j) { return element(i, j); });
        double mine;
        const Index* order = resident.bring_in_order(p, orders, reinterpret_cast<Index*>(block.v), mine,
                                                     [&](const Index* order) { start_vectors(p, order, 0, threads); });
        keep_weight(0, mine);
        if (thread == 0) *block.doubt = rounding<T>(g.d);
        copy_async_wait<0>();
        sync_block();  // the matrix and the vectors are there
        block.turn(0, thread, threads);
        sync_block();  // block 0 is turned
        return order;
    }

    // The status, the same for every thread. Step -1 makes V and S of block 0.
    __device__ __forceinline__ int update_all(Index p, const Index* order) const {
        const int workers = at.warps - 1, columns = whole_warps(at.side + K);
        for (int b = -1; there(b); ++b) {
            const bool next = there(b + 1), later = there(b + 2);
            if (warp == workers) {
                if (b >= 0) again(b).factor(b);
            } else {
                double w = 0;
                if (later) {
                    start_vectors(p, order, b + 2, workers * kWarp);
                    copy_async_commit();
                    w = weight(p, order, b + 2);
                }
                if (next) again(b).multiply(b + 1, warp, workers);
                if (later) keep_weight(b + 2, w);
            }
            copy_async_wait<0>();
            sync_block();  // L, U and the vectors after them are there
            if (b >= 0 && *block.status != kUpdated) return *block.status;
            if (thread >= columns) {
                if (later) again(b).turn(b + 2, recomputed(thread, b + 1) - columns, threads - columns);
            } else if (b >= 0 && thread < at.side + (next ? K : 0)) {
                again(b).solve(b, thread);
            }
            sync_block();  // V and E are solved
            if (b >= 0) {
                const int n = at.side / 8, tiles = (n + 1) / 2 * (n + 1) * 2, others = whole_warps(tiles);
                for (int e = recomputed(thread, b); e < others + (next ? at.side : 0); e += threads) {
                    if (e < tiles)
                        again(b).update(b, e);
                    else if (e >= others)
                        again(b).correct(b, (e - others) % 4 * 4, (e - others) / 4 * 4);
                }
                sync_block();  // the matrix has block b
            }
            if (!next) break;
            again(b).small_products(b + 1, later);
            sync_block();  // S of the next block is there
        }
        return resident.judge([&](int i, int j) { return element(i, j); });
    }

    __device__ __forceinline__ void write(Index p) const {
        resident.write(p, [&](int i, int j) { return element(i, j); });
    }
};

template <class T>
__global__ void __launch_bounds__(kMostWarps<T>* kWarp)
    small_kernel(Index first, ShermanMorrisonArgs g, Index* orders) {
    const Index p = first + blockIdx.x;
    const Small<T> small(g);
    const int status = small.update_all(p, small.start(p, orders));
    if (threadIdx.x == 0) g.status[p] = status;
    if (status == kUpdated) small.write(p);
}

}  // namespace
}  // namespace small

template <class T>
bool fits_shared_memory(Index d) {
    int device = 0, most = 0;
    if (d > 512 || cudaGetDevice(&device) != cudaSuccess ||
        cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess)
        return false;
    return small::shared_bytes<T>(d) <= std::size_t(most);
}

template <class T>
Status update_small(const ShermanMorrisonArgs& g, void* workspace, void* stream) {
    Index* orders = Workspace(workspace).take<Index>(g.batch * g.k);
    const int threads = small::Layout<T>(small::side_of(g.d)).warps * kWarp;
    return status_of(
        launch_in_turn(small::small_kernel<T>, g.batch, threads, small::shared_bytes<T>(g.d), stream, g, orders));
}

Index small_workspace(const ShermanMorrisonArgs& g) {
    Workspace space;
    space.take<Index>(g.batch * g.k);
    return Index(space.used());
}

template bool fits_shared_memory<float>(Index);
template bool fits_shared_memory<double>(Index);
template Status update_small<float>(const ShermanMorrisonArgs&, void*, void*);
template Status update_small<double>(const ShermanMorrisonArgs&, void*, void*);

}  // namespace mtz::cuda
