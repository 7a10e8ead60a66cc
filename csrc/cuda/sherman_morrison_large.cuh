// What the kernels for large inverses share: their workspace, and the product that nearly all of the time goes into where
// tensor cores are not fast, and of float64.
//
// A panel is K vectors. Up to kPanels of them make a round, which goes over the matrix twice: once for V = Y A^-1, once for
// the update. Of vectors that are many beside d, a round takes out nearly all of the matrix at once, and what is left has its
// rounding; so it is also of no more than d / MTZ_ROUND_SHARE vectors, or one panel.
#pragma once

#include "cuda/pivots.cuh"
#include "cuda/rows.cuh"

#ifndef MTZ_ROUND_SHARE
#define MTZ_ROUND_SHARE 8
#endif

namespace mtz::cuda {

constexpr int K = kPanel, kPanels = 4;
constexpr int kThreads = 128;           // of most blocks
constexpr Index kLeastSlice = 128;      // of the inner dimension of V
constexpr Index kSliceStep = 32;        // at the depth of pieces
constexpr Index kMostBlocks = 2 * 132;  // that are worth while: two a processor of a large device
constexpr Index kMostChunks = 4;        // of the inner dimension of V Y^T
constexpr int kChunkStep = 128;

constexpr int kTensorRows = 128;  // of a tile of V on tensor cores (cuda/sherman_morrison_large_tensor.cu)

// Sums over k of a[k, i] b[j, k] for kRows x K pairs (i, j), in pieces of kDepth: a lies in shared memory as it does in the
// matrix, k after k, and b row after row. A thread has 4 x 4 sums side by side, and once more, so that it reads and writes
// 16 bytes of a result both along i and along j: rows row() ..., columns column(0) ... and column(1) ....
//
// Rows of b are kept in the order in which a thread takes them, x + 8 c: those of a warp are then next to each
// other, and all in other banks, as the pitch is an odd number of words.
template <class T, int Threads>
struct Panel {
    static constexpr int kThreads = Threads, kRows = Threads / 2, kDepth = 16, kStages = 3;
    static constexpr int kColumns = K / 8, kWide = Word<T>::kCount, kPitch = kDepth + kWide;  // columns of a thread
    static constexpr int kSizeA = kDepth * kRows, kSizeB = K * kPitch;
    static_assert(kPitch / kWide % 2 == 1);
    T *a, *b;

    __device__ __forceinline__ explicit Panel(SharedMemory& memory) {
        a = memory.take<T>(kStages * kSizeA);
        b = memory.take<T>(kStages * kSizeB);
    }
    static std::size_t bytes() {
        return SharedSize().add(sizeof(T), kStages * kSizeA).add(sizeof(T), kStages * kSizeB).bytes();
    }
    // The first of four rows, and of four columns.
    __device__ static __forceinline__ int row() {
        const int warp = int(threadIdx.x) / kWarp, lane = int(threadIdx.x) % kWarp;
        return 4 * (warp * 4 + lane / 16 * 2 + lane % 2);
    }
    __device__ static __forceinline__ int column(int h) { return 32 * h + 4 * (int(threadIdx.x) % kWarp / 2 % 8); }
    // Where row j of b is kept.
    __device__ static __forceinline__ unsigned place_b(unsigned j) {
        return (j / 4 % 8 + 8 * (j % 4 + j / 32 * 4)) * kPitch;
    }

    __device__ __forceinline__ void add(int stage, T (&sum)[4][kColumns]) const {
        using W = Word<T>;
        const Four<T>* rows = reinterpret_cast<const Four<T>*>(a + stage * kSizeA) + row() / 4;
        const W* columns = reinterpret_cast<const W*>(b + stage * kSizeB) + column(0) / 4 * (kPitch / kWide);
#pragma unroll
        for (int k = 0; k < kDepth / kWide; ++k) {
            W y[kColumns];
#pragma unroll
            for (int c = 0; c < kColumns; ++c) y[c] = columns[c * 8 * (kPitch / kWide) + k];
#pragma unroll
            for (int e = 0; e < kWide; ++e) {
                const Four<T> x = rows[(k * kWide + e) * (kRows / 4)];
#pragma unroll
                for (int r = 0; r < 4; ++r)
#pragma unroll
                    for (int c = 0; c < kColumns; ++c) sum[r][c] = multiply_add(x.at[r], y[c].at[e], sum[r][c]);
            }
        }
    }
};

// Rows of a, [.., columns]; Words: each begins at a multiple of 16 bytes.
template <class T, bool Words>
struct Across {
    const T* data;
    Index row_stride;
    int columns;

    template <class P>
    __device__ __forceinline__ void start(int k, int count, T* to) const {
        constexpr int wide = Words ? P::kWide : 1, across = P::kRows / wide, down = P::kThreads / across;
        const unsigned thread = recomputed(int(threadIdx.x), k), y = thread / across, column = thread % across * wide;
        const int left = columns - int(column), valid = left < 0 ? 0 : left < wide ? left : wide;
        const T* from = data + (valid ? (unsigned(k) + y) * row_stride + column : 0);
#pragma unroll(Words ? 8 : 1)
        for (int e = 0; e < P::kDepth / down; ++e)
            copy_async<wide* int(sizeof(T))>(to + (y + e * down) * P::kRows + column, from + e * down * row_stride,
                                             int(y) < count - k - e * down ? valid * int(sizeof(T)) : 0);
    }
};

// Rows of b, [rows, ..], of whole words; rows behind the last one are the last one again: nobody looks at their sums.
template <class T>
struct Along {
    const T* data;
    Index row_stride;
    int rows;

    template <class P>
    __device__ __forceinline__ void start(int k, int count, T* to) const {
        constexpr int across = P::kDepth / P::kWide, down = P::kThreads / across;
        const unsigned thread = recomputed(int(threadIdx.x), k), x = thread % across * P::kWide;
        const int valid = int(x) < count - k ? 16 : 0;
#pragma unroll
        for (int e = 0; e < K / down; ++e) {
            const unsigned at = thread / across + e * down, row = at < unsigned(rows) ? at : unsigned(rows) - 1;
            copy_async<16>(to + P::place_b(at) + x, data + row * row_stride + (unsigned(k) + x), valid);
        }
    }
};

// sum += the first `count` rows of a by as many columns of b, two pieces on their way while one is worked on. Elements of b
// up to the next whole word are read, and must be finite.
template <class T, int Threads, bool Words>
__device__ __forceinline__ void add_product(const Across<T, Words>& a, const Along<T>& b, int count,
                                            const Panel<T, Threads>& shared, T (&sum)[4][K / 8]) {
    using P = Panel<T, Threads>;
    const auto start = [&](int k, int stage) {
        if (k < count) {
            a.template start<P>(k, count, shared.a + stage * P::kSizeA);
            b.template start<P>(k, count, shared.b + stage * P::kSizeB);
        }
        copy_async_commit();
    };
    start(0, 0);
    start(P::kDepth, 1);
#pragma unroll 1
    for (int k = 0; k < count; k += P::kDepth) {
        copy_async_wait<1>();
        sync_block();  // this piece is there, and all threads are done with the one before
        const unsigned piece = unsigned(k) / P::kDepth;
        start(k + 2 * P::kDepth, (piece + 2) % P::kStages);
        shared.add(piece % P::kStages, sum);
    }
}

template <class T>
struct Large {
    using Tall = Panel<T, sizeof(T) == 4 ? 256 : 128>;
    static constexpr int kResident = sizeof(T) == 4 ? 2 : 3;  // blocks a processor, which limits registers

    ShermanMorrisonArgs g;
    bool tensor;                   // products are taken on tensor cores
    Index panels, side, pitch;     // of a round; vectors of a round; of a row of Y
    Index across, length, slices;  // tiles of V; slices of the inner dimension
    Index chunk, chunks;           // of the inner dimension of V Y^T
    Index* order;                  // [batch, k], if there are several rounds
    T* y;                          // [batch, side, pitch]
    T* v;                          // [batch, side, pitch]
    T* partial;                    // [slices, batch, side, pitch]  of V; v itself if there is one
    T* s;                          // [batch, panels, chunks, K, K] of V Y^T
    double* sign;                  // [batch, side]
    T *minus, *vt;                 // [batch, side, pitch], [batch, d, side]   -D V and V^T, V the new one
    T* diagonal;                   // [batch, d]                    of the result
    T* copy;                       // [batch, d, d], if there are several rounds

    Large(const ShermanMorrisonArgs& args, Workspace& space)
        : g(args), tensor(sizeof(T) == 4 && has_fast_tensor_cores()) {
        panels = smaller(larger(1, smaller(kPanels, g.d / (MTZ_ROUND_SHARE * K))), ceil_div(g.k, K));
        side = panels * K;
        pitch = ceil_div(g.d, 4) * 4;
        across = ceil_div(g.d, tensor ? kTensorRows : Tall::kRows);
        const Index wanted = larger(1, kMostBlocks / larger(1, g.batch * across * panels));
        length = larger(kLeastSlice, ceil_div(ceil_div(g.d, wanted), kSliceStep) * kSliceStep);
        slices = ceil_div(g.d, length);
        chunk = ceil_div(ceil_div(g.d, kMostChunks), kChunkStep) * kChunkStep;
        chunks = ceil_div(g.d, chunk);
        const bool several = g.k > side;
        order = several ? space.take<Index>(g.batch * g.k) : nullptr;
        y = space.take<T>(g.batch * side * pitch);
        v = space.take<T>(g.batch * side * pitch);
        partial = slices > 1 ? space.take<T>(slices * g.batch * side * pitch) : v;
        s = space.take<T>(g.batch * panels * chunks * K * K);
        sign = space.take<double>(g.batch * side);
        minus = space.take<T>(g.batch * side * pitch);
        vt = space.take<T>((g.batch * g.d + K) * side);
        diagonal = space.take<T>(g.batch * g.d);
        copy = several ? space.take<T>(g.batch * g.d * g.d) : nullptr;
    }
    __device__ __forceinline__ T* inverse(Index p) const {
        return static_cast<T*>(g.inverse) + p * g.inverse_batch_stride;
    }
    __device__ __forceinline__ bool skipped(Index p) const { return g.status[p] != kUpdated; }
};

__device__ __forceinline__ Index first_item() {
    return blockIdx.x * Index(blockDim.x) + threadIdx.x;
}
__device__ __forceinline__ Index item_step() {
    return Index(gridDim.x) * blockDim.x;
}

// Four elements to global memory, of words.
template <class T>
__device__ __forceinline__ void store_global(T* to, const T (&values)[4]) {
    if constexpr (sizeof(T) == 4)
        store_words(to, values[0], values[1], values[2], values[3]);
    else
        store_four(to, values);
}

// The two products of a round on tensor cores.
cudaError_t multiply_on_tensor_cores(const Large<float>& w, int panels, bool words, Queue queue);
cudaError_t update_on_tensor_cores(const Large<float>& w, int panels, bool words, Queue queue);

// S = V Y^T of panel number `panel` of `panels`, its pivots, the new V, and V of later panels without it.
template <class T>
cudaError_t solve_panel(const Large<T>& w, int panel, int panels, Queue queue);

}  // namespace mtz::cuda
