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

__device__ __forceinline__ bool in_words(const void* data, Index stride, Index other, int count) {
    return reinterpret_cast<std::uintptr_t>(data) % 16 == 0 && stride % count == 0 && other % count == 0;
}

__device__ __forceinline__ int whole_warps(int threads) {
    return (threads + kWarp - 1) / kWarp * kWarp;
}

template <class T>
struct Small {
    static constexpr int kWide = 16 / sizeof(T);
    struct alignas(16) Word {
        T at[kWide];
    };

    const ShermanMorrisonArgs& g;
    Block<T> block;
    Layout<T> at;
    int thread, threads, warp;
    bool words, vector_words;  // rows may be copied by 16 bytes

    __device__ __forceinline__ explicit Small(const ShermanMorrisonArgs& args)
        : g(args),
          block(side_of(args.d), int(threadIdx.x)),
          at(block.at),
          thread(int(threadIdx.x)),
          threads(int(blockDim.x)) {
        SharedMemory memory;
        block.take(memory);
        warp = thread / kWarp;
        words = in_words(g.inverse, g.inverse_batch_stride, g.inverse_row_stride, kWide);
        vector_words = g.vectors.column_stride == 1 &&
                       in_words(g.vectors.data, g.vectors.batch_stride, g.vectors.row_stride, kWide);
    }

    // The same, its addresses and what follows from them worked out again, so that no registers hold them through a step.
    __device__ __forceinline__ Block<T> again(int step) const {
        Block<T> result(recomputed(at.side, step + 1), recomputed(thread, step + 1));
        SharedMemory memory;
        result.take(memory);
        return result;
    }
    __device__ __forceinline__ T* inverse(Index p) const {
        return static_cast<T*>(g.inverse) + p * g.inverse_batch_stride;
    }
    __device__ __forceinline__ bool there(int b) const { return Index(b) * K < g.k; }

    // Starts copying a matrix of `count` rows of d elements into one of `rows`, [rows, side]; what is beyond becomes zero.
    template <int Count, class Row>
    __device__ __forceinline__ void start_copy(int me, T* to, int pitch, int rows, Index stride, int step,
                                               Row row) const {
        for_each(rows, at.side / Count, me, step, [&](int i, int j) {
            const T* from = row(i);
            const Index left = from ? g.d - Index(j) * Count : 0;
            const int valid = int(left < 0 ? 0 : smaller(left, Count)) * int(sizeof(T));
            copy_async<Count* int(sizeof(T))>(to + i * pitch + j * Count,
                                              valid ? from + Index(j) * Count * stride : inverse(0), valid);
        });
    }

    __device__ __forceinline__ void start_matrix(Index p) const {
        const T* from = inverse(p);
        const auto row = [&](int i) { return i < g.d ? from + i * g.inverse_row_stride : nullptr; };
        if (words)
            start_copy<kWide>(thread, block.matrix, at.pitch, at.side, 1, threads, row);
        else
            start_copy<1>(thread, block.matrix, at.pitch, at.side, 1, threads, row);
    }

    // Block b of the vectors, by the first `step` threads.
    __device__ __forceinline__ void start_vectors(Index p, const Index* order, int b, int step) const {
        const Index first = Index(b) * K;
        const auto start = [&](int q) {
            return p * g.vectors.batch_stride + (order ? order[first + q] : first + q) * g.vectors.row_stride;
        };
        T* to = block.raw_of(b);
        const int me = recomputed(thread, b);
        if (g.vector_scalar != g.scalar) {
            for_each(K, at.side, me, step, [&](int q, int j) {
                const bool any = first + q < g.k && j < g.d;
                to[q * at.side + j] = any ? load_vector_element<T>(g, start(q) + j * g.vectors.column_stride) : T(0);
            });
            return;
        }
        const T* from = static_cast<const T*>(g.vectors.data);
        const auto row = [&](int q) { return first + q < g.k ? from + start(q) : nullptr; };
        if (vector_words)
            start_copy<kWide>(me, to, at.side, K, 1, step, row);
        else
            start_copy<1>(me, to, at.side, K, g.vectors.column_stride, step, row);
    }

    __device__ __forceinline__ double weight(Index p, const Index* order, int b) const {
        const Index q = Index(b) * K + thread;
        if (thread >= K || q >= g.k) return 0;
        return g.weight[p * g.weight_batch_stride + (order ? order[q] : q) * g.weight_stride];
    }
    __device__ __forceinline__ void keep_weight(int b, double w) const {
        if (thread >= K) return;
        block.root_of(b)[thread] = T(square_root(w < 0 ? -w : w));
        block.sign_of(b)[thread] = T(w < 0 ? -1 : 1);
    }

    // Brings the matrix and the first vectors. Their order is as they came unless a weight is negative or NaN, which is
    // found out while they are on their way.
    __device__ __forceinline__ const Index* start(Index p, Index* orders) const {
        start_matrix(p);
        const double* weights = g.weight + p * g.weight_batch_stride;
        bool other = false;
#pragma unroll 1
        for (Index q = thread; q < g.k; q += threads) other = other || !(weights[q * g.weight_stride] >= 0);
        const Index* order = nullptr;
        for (;;) {
            start_vectors(p, order, 0, threads);
            copy_async_commit();
            if (order || !sync_block_any(other)) break;
            order = orders + p * g.k;
            order_vectors(weights, g.weight_stride, g.k, orders + p * g.k, reinterpret_cast<Index*>(block.v));
            copy_async_wait<0>();
            sync_block();  // the order is there
        }
        keep_weight(0, weight(p, order, 0));
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
        int worst = kUpdated;
        for (int i = thread; i < g.d; i += threads) {
            const int status = judge_diagonal(double(block.matrix[i * at.pitch + i]));
            if (status > worst) worst = status;
        }
        if (sync_block_any(worst == kNotFinite)) return kNotFinite;
        return sync_block_any(worst == kIndefinite) ? kIndefinite : kUpdated;
    }

    __device__ __forceinline__ void write(Index p) const {
        T* to = inverse(p);
        const int d = int(g.d);
        if (words && d % kWide == 0)
            for_each(d, d / kWide, thread, threads, [&](int i, int j) {
                *reinterpret_cast<Word*>(to + i * g.inverse_row_stride + j * kWide) =
                    *reinterpret_cast<const Word*>(block.matrix + i * at.pitch + j * kWide);
            });
        else
            for_each(d, d, thread, threads,
                     [&](int i, int j) { to[i * g.inverse_row_stride + j] = block.matrix[i * at.pitch + j]; });
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
