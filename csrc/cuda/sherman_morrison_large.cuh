// What the kernels for large inverses share: their workspace, and the product that nearly all of the time goes into.
//
// A panel is K vectors. Up to kPanels of them make a round, which goes over the matrix twice: once for V = Y A^-1, once for
// the update. Of vectors that are many beside d, a round takes out nearly all of the matrix at once, and what is left has its
// rounding; so it is also of no more than d / MTZ_ROUND_SHARE vectors, or one panel.
#pragma once

#include "cuda/rows.cuh"
#include "cuda/sherman_morrison.cuh"

#ifndef MTZ_ROUND_SHARE
#define MTZ_ROUND_SHARE 8
#endif

namespace mtz::cuda {

constexpr int K = 64, kPanels = 4;
constexpr int kThreads = 128;           // of a block that works on a product
constexpr Index kLeastSlice = 128;      // of the inner dimension of V
constexpr Index kMostBlocks = 4 * 132;  // that are worth while: four a processor of a large device
constexpr Index kMostChunks = 8;        // of the inner dimension of V Y^T
constexpr int kChunkStep = 128;

// Blocks a processor, which limits registers: code for some spills at 128, and most of those have shared memory for two.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ < 900 || __CUDA_ARCH__ >= 1200)
constexpr int kResident = 3;
#else
constexpr int kResident = 4;
#endif

template <class T>
struct alignas(16) Four {
    T at[4];
};

// Sums over k of a[k, i] b[j, k] for 16 RA x K pairs (i, j), in pieces of kDepth: a lies in shared memory as it does in the
// matrix, k after k, and b row after row. A thread has 4 x 4 sums side by side, so that it reads and writes 16 bytes of a
// result both along i and along j: rows 64 h + 4 y ..., columns 32 h + 4 x .... For four steps of 8 x 8 sums in float32 it
// loads 8 words each of a and b: 16 for 256 multiply-adds.
//
// Rows of b are kept in the order in which a thread takes them, x + 8 c: those of a warp are then next to each other, and
// all in other banks, as the pitch is an odd number of words.
template <class T, int RA>
struct Panel {
    static constexpr int kRows = 16 * RA, kDepth = 16, kStages = 3, kColumns = K / 8;  // columns of a thread
    static constexpr int kWide = Word<T>::kCount, kPitch = kDepth + kWide;
    static constexpr int kSizeA = kDepth * kRows, kSizeB = K * kPitch;
    static_assert(RA % 4 == 0 && kPitch / kWide % 2 == 1);
    T *a, *b;

    __device__ __forceinline__ explicit Panel(SharedMemory& memory) {
        a = memory.take<T>(kStages * kSizeA);
        b = memory.take<T>(kStages * kSizeB);
    }
    static std::size_t bytes() {
        return SharedSize().add(sizeof(T), kStages * kSizeA).add(sizeof(T), kStages * kSizeB).bytes();
    }
    // The first of four rows in `h`, and of four columns.
    __device__ static __forceinline__ int row(int h) {
        const int thread = int(threadIdx.x);
        return 64 * h + 4 * (thread / kWarp * 4 + thread % kWarp / 16 * 2 + thread % 2);
    }
    __device__ static __forceinline__ int column(int h) { return 32 * h + 4 * (int(threadIdx.x) % kWarp / 2 % 8); }

    __device__ __forceinline__ void add(int stage, T (&sum)[RA][kColumns]) const {
        using W = Word<T>;
        const Four<T>* rows = reinterpret_cast<const Four<T>*>(a + stage * kSizeA) + row(0) / 4;
        const W* columns = reinterpret_cast<const W*>(b + stage * kSizeB) + column(0) / 4 * (kPitch / kWide);
#pragma unroll
        for (int k = 0; k < kDepth / kWide; ++k) {
            W y[kColumns];
#pragma unroll
            for (int c = 0; c < kColumns; ++c) y[c] = columns[c * 8 * (kPitch / kWide) + k];
#pragma unroll
            for (int e = 0; e < kWide; ++e)
#pragma unroll
                for (int h = 0; h < RA / 4; ++h) {
                    const Four<T> x = rows[(k * kWide + e) * (kRows / 4) + 16 * h];
#pragma unroll
                    for (int r = 0; r < 4; ++r)
#pragma unroll
                        for (int c = 0; c < kColumns; ++c)
                            sum[4 * h + r][c] = multiply_add(x.at[r], y[c].at[e], sum[4 * h + r][c]);
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
        constexpr int wide = Words ? P::kWide : 1, across = P::kRows / wide, down = kThreads / across;
        const int thread = recomputed(int(threadIdx.x), k), i = k + thread / across, column = thread % across * wide;
        const int left = columns - column, valid = left < 0 ? 0 : left < wide ? left : wide;
        const T* from = data + (valid ? i * row_stride + column : 0);
        to += thread * wide;
#pragma unroll(Words ? 8 : 1)
        for (int e = 0; e < P::kDepth / down; ++e)
            copy_async<wide* int(sizeof(T))>(to + e * kThreads * wide, from + e * down * row_stride,
                                             i + e * down < count ? valid * int(sizeof(T)) : 0);
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
        constexpr int across = P::kDepth / P::kWide, down = kThreads / across;
        const int thread = recomputed(int(threadIdx.x), k), j = thread / across,
                  column = k + thread % across * P::kWide;
        const int valid = column < count ? 16 : 0;
        to += thread % across * P::kWide;
#pragma unroll
        for (int e = 0; e < K / down; ++e) {
            const int at = j + e * down, row = at < rows ? at : rows - 1;
            copy_async<16>(to + (at / 4 % 8 + 8 * (at % 4 + at / 32 * 4)) * P::kPitch, data + row * row_stride + column,
                           valid);
        }
    }
};

// sum += the first `count` rows of a by as many columns of b, two pieces on their way while one is worked on. Elements of b
// up to the next whole word are read, and must be finite.
template <class T, int RA, bool Words>
__device__ __forceinline__ void add_product(const Across<T, Words>& a, const Along<T>& b, int count,
                                            const Panel<T, RA>& shared, T (&sum)[RA][K / 8]) {
    using P = Panel<T, RA>;
    const auto start = [&](int k, int stage) {
        if (k < count) {
            a.template start<P>(k, count, shared.a + stage * P::kSizeA);
            b.template start<P>(k, count, shared.b + stage * P::kSizeB);
        }
        copy_async_commit();
    };
    start(0, 0);
    start(P::kDepth, 1);
    int stage = 0;
#pragma unroll 1
    for (int k = 0; k < count; k += P::kDepth) {
        copy_async_wait<1>();
        sync_block();  // this piece is there, and all threads are done with the one before
        start(k + 2 * P::kDepth, stage == 0 ? 2 : stage - 1);
        shared.add(stage, sum);
        stage = stage == 2 ? 0 : stage + 1;
    }
}

template <class T>
struct Large {
    static constexpr int kRows = sizeof(T) == 4 ? 8 : 4;  // of a thread: as many as its registers take
    using Tall = Panel<T, kRows>;
    using Short = Panel<T, 4>;

    ShermanMorrisonArgs g;
    Index panels, side, pitch;     // of a round; vectors of a round; of a row of Y
    Index across, length, slices;  // tiles of V; slices of the inner dimension
    Index chunk, chunks;           // of the inner dimension of V Y^T
    Index* order;                  // [batch, k], if there are several rounds
    T* y;                          // [batch, side, pitch]
    T* v;                          // [batch, side, pitch]
    T* partial;                    // [slices, batch, side, pitch]  of V; v itself if there is one
    double* s;                     // [batch, panels, chunks, K, K] of V Y^T
    double* sign;                  // [batch, side]
    T* l;                          // [batch, K, K]                 diag(|p|)^-1/2 L^-1 of a panel
    T* coupling;                   // [batch, panels, K, K]         Y (L^-1 V)^T of later panels with it
    T *minus, *vt;                 // [batch, side, pitch], [batch, d, side]   -D V and V^T, V the new one
    T* diagonal;                   // [batch, d]                    of the result
    T* copy;                       // [batch, d, d], if there are several rounds

    Large(const ShermanMorrisonArgs& args, Workspace& space) : g(args) {
        panels = smaller(larger(1, smaller(kPanels, g.d / (MTZ_ROUND_SHARE * K))), ceil_div(g.k, K));
        side = panels * K;
        pitch = ceil_div(g.d, 4) * 4;
        across = ceil_div(g.d, Tall::kRows);
        const Index wanted = larger(1, kMostBlocks / larger(1, g.batch * across * panels));
        length = ceil_div(ceil_div(g.d, wanted), kLeastSlice) * kLeastSlice;
        slices = ceil_div(g.d, length);
        chunk = ceil_div(ceil_div(g.d, kMostChunks), kChunkStep) * kChunkStep;
        chunks = ceil_div(g.d, chunk);
        const bool several = g.k > side;
        order = several ? space.take<Index>(g.batch * g.k) : nullptr;
        y = space.take<T>(g.batch * side * pitch);
        v = space.take<T>(g.batch * side * pitch);
        partial = slices > 1 ? space.take<T>(slices * g.batch * side * pitch) : v;
        s = space.take<double>(g.batch * panels * chunks * K * K);
        sign = space.take<double>(g.batch * side);
        l = space.take<T>(g.batch * K * K);
        coupling = space.take<T>(g.batch * panels * K * K);
        minus = space.take<T>(g.batch * side * pitch);
        vt = space.take<T>(g.batch * g.d * side);
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

// S = D + V Y^T of panel number `panel` of `panels`, its pivots and L^-1, and what couples later panels to it.
template <class T>
cudaError_t factor_panel(const Large<T>& w, int panel, int panels, void* stream);

}  // namespace mtz::cuda
