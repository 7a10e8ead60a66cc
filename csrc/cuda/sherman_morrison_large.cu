// Large inverses, all of a batch at once, in place: for a block of K vectors V = Y A^-1 (tiles of K x 128, the inner dimension
// in slices), S = D + V Y^T and its pivots (one block of threads a matrix), L^-1 V, and A^-1 -= V^T D V (tiles of the upper
// triangle, mirrored through shared memory). See cuda/sherman_morrison.cuh for the formula.
//
// Of 3 K d^2 operations, two thirds are V and one third the update, both on the whole grid: V takes 12 loads of shared
// memory for 128 multiply-adds a thread, the update 8 for 64. Beside the matrix, which is read twice and written once a
// block of vectors, slices of V are written and read, 2 K d elements each. What is left is K^2 d operations for S and as
// many for L^-1 V, and K^3 / 6 for the pivots, which are one after another: K barriers in one block of threads, with S in
// registers. So it takes d of some thousands for products to be most of the time.
//
// Whether a block of vectors may be put in is known before anything is written. A later block may still fail, so with more
// than one a copy is kept, and put back where it did.
#include "cuda/rows.cuh"
#include "cuda/sherman_morrison.cuh"

namespace mtz::cuda {
namespace {

constexpr int K = 64, kThreads = 256;
constexpr Index kLeastSlice = 256;  // of the inner dimension of V
constexpr Index kEnoughBlocks = 264;

// Columns of V a thread has, which are rows of A^-1: as many as its registers take.
template <class T>
constexpr int kAcross = sizeof(T) == 4 ? 8 : 4;
template <class T>
using VTile = Tile<T, kAcross<T>, K / 16, 16>;
template <class T>
using UpdateTile = Tile<T, K / 16, K / 16, 16>;

template <class T>
struct Large {
    ShermanMorrisonArgs g;
    Index pitch, across, length, slices;  // of a row of Y; tiles of V; slices of the inner dimension
    Index* order;                         // [batch, k]
    T* y;                                 // [batch, K, pitch]
    T* partial;                           // [slices, batch, K, pitch]   of V
    T* v;                                 // [batch, K, pitch]
    double* s;                            // [batch, K, K]               lower triangle of V Y^T
    double* sign;                         // [batch, K]
    T* l;                                 // [batch, K, K]               L^T beyond the diagonal, |p|^-1/2 on it
    T *vt, *minus;                        // [batch, d, K]               the new V^T; -V^T D
    T* copy;                              // [batch, d, d]               if there are several blocks

    Large(const ShermanMorrisonArgs& args, Workspace& space) : g(args) {
        pitch = ceil_div(g.d, 4) * 4;
        across = ceil_div(g.d, VTile<T>::kRows);
        const Index wanted = ceil_div(kEnoughBlocks, larger(1, g.batch * across));
        length = ceil_div(ceil_div(g.d, smaller(wanted, ceil_div(g.d, kLeastSlice))), kLeastSlice) * kLeastSlice;
        slices = ceil_div(g.d, length);
        order = space.take<Index>(g.batch * g.k);
        y = space.take<T>(g.batch * K * pitch);
        partial = space.take<T>(slices * g.batch * K * pitch);
        v = space.take<T>(g.batch * K * pitch);
        s = space.take<double>(g.batch * K * K);
        sign = space.take<double>(g.batch * K);
        l = space.take<T>(g.batch * K * K);
        vt = space.take<T>(g.batch * g.d * K);
        minus = space.take<T>(g.batch * g.d * K);
        copy = g.k > K ? space.take<T>(g.batch * g.d * g.d) : nullptr;
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

// Keeps a copy, or puts it back where a matrix failed.
template <class T>
__global__ void copy_kernel(Large<T> w, bool back) {
    const Index d = w.g.d;
    for (Index e = first_item(); e < w.g.batch * d * d; e += item_step()) {
        const Index p = e / (d * d), i = e / d % d, j = e % d;
        T* element = w.inverse(p) + i * w.g.inverse_row_stride + j;
        if (!back)
            w.copy[e] = *element;
        else if (w.skipped(p))
            *element = w.copy[e];
    }
}

template <class T>
__global__ void scale_kernel(Large<T> w, Index first) {
    for (Index e = first_item(); e < w.g.batch * K * w.pitch; e += item_step()) {
        const Index p = e / (K * w.pitch), q = e / w.pitch % K, j = e % w.pitch;
        const Scaled<T> vector(w.g, w.order, p, first + q);
        w.y[e] = j < w.g.d ? vector.at(w.g, j) : T(0);
        if (j == 0) w.sign[p * K + q] = vector.sign;
    }
}

// partial[slice, p, q, j] = sum over a slice of i of Y[q, i] A^-1[j, i]
template <class T, template <class> class Source>
__global__ void __launch_bounds__(kTileThreads, 2) multiply_kernel(Index first_block, Large<T> w) {
    constexpr int RA = kAcross<T>, RB = K / 16;
    SharedMemory memory;
    const Pieces<T, VTile<T>> shared(memory);
    const ShermanMorrisonArgs& g = w.g;
    const Index block = first_block + blockIdx.x, p = block / (w.across * w.slices),
                slice = block / w.across % w.slices;
    const Index j0 = block % w.across * VTile<T>::kRows;
    if (w.skipped(p)) return;
    const Source<T> matrix{w.inverse(p) + j0 * g.inverse_row_stride, g.inverse_row_stride, 1,
                           int(smaller(VTile<T>::kRows, g.d - j0))};
    const WordRows<T> y{w.y + p * K * w.pitch, w.pitch, 1, K};
    T* to = w.partial + (slice * g.batch + p) * K * w.pitch + j0;
    T sum[RA][RB] = {};
    sum_over_rows<Product, kNoRuns, VTile<T>>(
        matrix, y, slice * w.length, smaller(g.d, (slice + 1) * w.length), shared, sum, [&](int k) {
            const int thread = recomputed(int(threadIdx.x), k);
#pragma unroll
            for (int r = 0; r < RA; ++r)
#pragma unroll
                for (int c = 0; c < RB; ++c) {
                    const int j = tile_row(thread) + 16 * r, q = tile_column(thread) + 16 * c;
                    if (j < matrix.count) to[q * w.pitch + j] = sum[r][c];
                }
        });
}

template <class T>
__global__ void add_slices_kernel(Large<T> w) {
    const Index size = w.g.batch * K * w.pitch;
    for (Index e = first_item(); e < size; e += item_step()) {
        T sum = 0;
        if (e % w.pitch < w.g.d)
            for (Index slice = 0; slice < w.slices; ++slice) sum += w.partial[slice * size + e];
        w.v[e] = sum;
    }
}

// s[p, q, r] = sum_j V[q, j] Y[r, j], a warp for 4 x 4 of them; rows end in zeros
template <class T>
__global__ void __launch_bounds__(kThreads) small_product_kernel(Large<T> w) {
    constexpr int side = K / 4, wide = Word<T>::kCount;
    const int lane = int(threadIdx.x) % kWarp;
    const Index warp = first_item() / kWarp, warps = item_step() / kWarp;
    for (Index e = warp; e < w.g.batch * side * side; e += warps) {
        const Index p = e / (side * side);
        const int q = int(e / side % side) * 4, r = int(e % side) * 4;
        if (r > q || w.skipped(p)) continue;  // the same for the whole warp
        const T *v = w.v + (p * K + q) * w.pitch, *y = w.y + (p * K + r) * w.pitch;
        T sum[4][4] = {};
        for (Index j = lane * wide; j < w.pitch; j += kWarp * wide) {
            Word<T> b[4];
#pragma unroll
            for (int c = 0; c < 4; ++c) b[c] = *reinterpret_cast<const Word<T>*>(y + c * w.pitch + j);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const Word<T> a = *reinterpret_cast<const Word<T>*>(v + i * w.pitch + j);
#pragma unroll
                for (int c = 0; c < 4; ++c)
#pragma unroll
                    for (int f = 0; f < wide; ++f) sum[i][c] = multiply_add(a.at[f], b[c].at[f], sum[i][c]);
            }
        }
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                double total = double(sum[i][c]);
#pragma unroll
                for (int mask = kWarp / 2; mask > 0; mask /= 2) total += shuffle_xor(total, mask);
                if (lane == 0) w.s[(p * K + q + i) * K + r + c] = total;
            }
    }
}

// L diag(p) L^T of S = D + V Y^T, the lower triangle in registers: thread (y, x) of 16 x 16 has rows y + 16 a, columns
// x + 16 b, a >= b. Each step publishes the next column, by turns in two places, so that one barrier a pivot is enough.
template <class T>
__global__ void __launch_bounds__(kThreads) factor_kernel(Large<T> w) {
    constexpr int R = K / 16;
    SharedMemory memory;
    double* column = memory.take<double>(2 * K);
    const int x = int(threadIdx.x) % 16, y = int(threadIdx.x) / 16;
    const double doubt = rounding<T>(w.g.d);
    for (Index p = blockIdx.x; p < w.g.batch; p += gridDim.x) {
        if (w.skipped(p)) continue;
        const double* from = w.s + p * K * K;
        T* to = w.l + p * K * K;
        double s[R][R];
#pragma unroll
        for (int a = 0; a < R; ++a)
#pragma unroll
            for (int b = 0; b <= a; ++b) {
                const int i = y + 16 * a, k = x + 16 * b;
                s[a][b] = k < i ? from[i * K + k] : k == i ? from[i * K + k] + w.sign[p * K + i] : 0;
            }
        sync_block();  // the last column of the matrix before this one has been read
        if (x == 0) {
#pragma unroll
            for (int a = 0; a < R; ++a) column[y + 16 * a] = s[a][0];
        }
        int status = kUpdated;
#pragma unroll
        for (int m = 0; m < R; ++m)  // columns 16 m ... of which R - m blocks of rows are left
            for (int j = 16 * m; j < 16 * m + 16 && status == kUpdated; ++j) {
                sync_block();  // this column is there, and the one before the last may be overwritten
                const double *now = column + j % 2 * K, sign = w.sign[p * K + j];
                double pivot = now[j];
                status = judge_pivot(sign, from[j * K + j], doubt, pivot);
                if (status != kUpdated) break;  // every thread sees the same
                const double inverse = 1 / pivot;
                double* next = column + (j + 1) % 2 * K;
#pragma unroll
                for (int a = m; a < R; ++a) {
                    const double scaled = now[y + 16 * a] * inverse;
                    if (x == j % 16) {
                        // L below the diagonal, |p|^-1/2 on it
                        const int i = y + 16 * a;
                        if (i >= j)
                            to[j * K + i] = i > j ? T(scaled) : T(square_root(inverse < 0 ? -inverse : inverse));
                    }
#pragma unroll
                    for (int b = m; b <= a; ++b) {
                        const int k = x + 16 * b;
                        s[a][b] = multiply_add(-scaled, now[k], s[a][b]);
                        if (k == j + 1) next[y + 16 * a] = s[a][b];
                    }
                }
            }
        if (status != kUpdated) {
            sync_block();  // nobody may see the new status at the top of this loop's body
            if (threadIdx.x == 0) w.g.status[p] = status;
        }
    }
}

// V <- diag(|p|)^-1/2 L^-1 V, a column a thread, and what the diagonal will be. As soon as a row is known it is taken out
// of all others, which do not wait for each other.
template <class T>
__global__ void __launch_bounds__(K) solve_kernel(Large<T> w) {
    SharedMemory memory;
    T* l = memory.take<T>(K * K);  // L^T
    T* minus_sign = memory.take<T>(K);
    const ShermanMorrisonArgs& g = w.g;
    const Index parts = ceil_div(g.d, K);
    for (Index block = blockIdx.x; block < g.batch * parts; block += gridDim.x) {
        const Index p = block / parts, j = block % parts * K + threadIdx.x;
        sync_block();
        for (int e = int(threadIdx.x); e < K * K; e += K)
            if (e % K >= e / K) l[e] = w.l[p * K * K + e];
        minus_sign[threadIdx.x] = T(-w.sign[p * K + threadIdx.x]);
        sync_block();
        if (j >= g.d || w.skipped(p)) continue;
        T column[K];
        T diagonal = w.inverse(p)[j * g.inverse_row_stride + j];
#pragma unroll
        for (int q = 0; q < K; ++q) column[q] = w.v[(p * K + q) * w.pitch + j];
#pragma unroll K
        for (int q = 0; q < K; ++q) {
#pragma unroll K
            for (int r = q + 1; r < K; ++r) column[r] = multiply_add(-l[q * K + r], column[q], column[r]);
            const T x = column[q] * l[q * K + q], y = x * minus_sign[q];
            w.vt[(p * g.d + j) * K + q] = x;
            w.minus[(p * g.d + j) * K + q] = y;
            diagonal = multiply_add(x, y, diagonal);
        }
        const int status = judge_diagonal(double(diagonal));
        if (status != kUpdated) atomic_max(g.status + p, status);
    }
}

// Tiles i0 <= j0 of A^-1 -= V^T D V, and their mirror images.
template <class T>
__global__ void __launch_bounds__(kTileThreads, 2) update_kernel(Index first_block, Large<T> w) {
    SharedMemory memory;
    const Pieces<T, UpdateTile<T>> shared(memory);
    T* stage = memory.take<T>(K * (K + 1));
    const ShermanMorrisonArgs& g = w.g;
    const Index tiles = ceil_div(g.d, K), row = g.inverse_row_stride, block = first_block + blockIdx.x;
    const Index p = block / (tiles * tiles), i0 = block / tiles % tiles * K, j0 = block % tiles * K;
    if (i0 > j0 || w.skipped(p)) return;
    const WordRows<T> a{w.minus + (p * g.d + i0) * K, K, 1, int(smaller(K, g.d - i0))};
    const WordRows<T> b{w.vt + (p * g.d + j0) * K, K, 1, int(smaller(K, g.d - j0))};
    T *tile = w.inverse(p) + i0 * row + j0, *mirror = w.inverse(p) + j0 * row + i0;
    T sum[K / 16][K / 16] = {};
    sum_over_rows<Product, K, UpdateTile<T>>(a, b, 0, K, shared, sum, [&](int) {
#pragma unroll
        for (int r = 0; r < K / 16; ++r)
#pragma unroll
            for (int c = 0; c < K / 16; ++c)
                stage[(tile_row(int(threadIdx.x)) + 16 * r) * (K + 1) + tile_column(int(threadIdx.x)) + 16 * c] =
                    sum[r][c];
    });
    sync_block();
#pragma unroll 4
    for (int e = int(threadIdx.x); e < K * K; e += kTileThreads) {
        const int i = e / K, j = e % K;
        if (i < a.count && j < b.count && i0 + i <= j0 + j)
            stage[i * (K + 1) + j] = tile[i * row + j] += stage[i * (K + 1) + j];
    }
    sync_block();
    for (int e = int(threadIdx.x); e < K * K; e += kTileThreads) {
        const int j = e / K, i = e % K;
        if (i < a.count && j < b.count && i0 + i < j0 + j) mirror[j * row + i] = stage[i * (K + 1) + j];
    }
}

}  // namespace

template <class T>
std::size_t large_workspace(const ShermanMorrisonArgs& g) {
    Workspace space;
    const Large<T> w(g, space);
    return space.used();
}

template <class T>
Status update_large(const ShermanMorrisonArgs& g, void* workspace, void* stream) {
    Workspace space(workspace);
    const Large<T> w(g, space);
    const Index tiles = ceil_div(g.d, K);
    SharedSize multiply, update;
    Pieces<T, VTile<T>>::count(multiply);
    Pieces<T, UpdateTile<T>>::count(update);
    update.add(sizeof(T), K * (K + 1));
    const std::size_t factor = SharedSize().add(sizeof(double), 2 * K).bytes();
    const std::size_t solve = SharedSize().add(sizeof(T), K * K).add(sizeof(T), K).bytes();
    const bool words = in_words<T>({g.inverse, g.inverse_batch_stride, g.inverse_row_stride, 1});
    const auto multiply_kernel_here = words ? multiply_kernel<T, WordRows> : multiply_kernel<T, Rows>;
    Status status;
    if (failed(status, find_vector_order(g, w.order, stream))) return status;
    if (w.copy && failed(status, launch_over(copy_kernel<T>, g.batch * g.d * g.d, 256, stream, w, false)))
        return status;
    for (Index first = 0; first < g.k; first += K) {
        if (failed(status, launch_over(scale_kernel<T>, g.batch * K * w.pitch, 256, stream, w, first)) ||
            failed(status, launch_in_turn(multiply_kernel_here, g.batch * w.across * w.slices, kTileThreads,
                                          multiply.bytes(), stream, w)) ||
            failed(status, launch_over(add_slices_kernel<T>, g.batch * K * w.pitch, 256, stream, w)) ||
            failed(status,
                   launch_over(small_product_kernel<T>, g.batch * (K / 4) * (K / 4) * kWarp, kThreads, stream, w)) ||
            failed(status, launch(factor_kernel<T>, g.batch, kThreads, factor, stream, false, w)) ||
            failed(status, launch(solve_kernel<T>, g.batch * tiles, K, solve, stream, false, w)) ||
            failed(status,
                   launch_in_turn(update_kernel<T>, g.batch * tiles * tiles, kTileThreads, update.bytes(), stream, w)))
            return status;
    }
    if (w.copy) failed(status, launch_over(copy_kernel<T>, g.batch * g.d * g.d, 256, stream, w, true));
    return status;
}

template std::size_t large_workspace<float>(const ShermanMorrisonArgs&);
template std::size_t large_workspace<double>(const ShermanMorrisonArgs&);
template Status update_large<float>(const ShermanMorrisonArgs&, void*, void*);
template Status update_large<double>(const ShermanMorrisonArgs&, void*, void*);

}  // namespace mtz::cuda
