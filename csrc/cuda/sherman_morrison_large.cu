// Large inverses, all of a batch at once, in place: for a block of K vectors V = Y A^-1 (tiles, the inner dimension in
// slices), S = D + V Y^T and its pivots (one block of threads a matrix), L^-1 V, and A^-1 -= V^T D V (tiles of the upper
// triangle, mirrored through shared memory). See cuda/sherman_morrison.cuh for the formula.
//
// Whether a block of vectors may be put in is known before anything is written. A later block may still fail, so with more
// than one a copy is kept, and put back where it did.
#include "cuda/rows.cuh"
#include "cuda/sherman_morrison.cuh"

namespace mtz::cuda {
namespace {

constexpr int K = 64, kThreads = 256;
constexpr int kSlice = 256;  // inner dimension of a product

template <class T>
struct Large {
    ShermanMorrisonArgs g;
    Index pitch, slices;
    Index* order;   // [batch, k]
    T* y;           // [batch, K, pitch]
    T* partial;     // [slices, batch, K, pitch]   of V
    T* v;           // [batch, K, pitch]
    double* s;      // [batch, K, K]               lower triangle of V Y^T
    double* sign;   // [batch, K]
    T* l;           // [batch, K, K]               L below the diagonal, |p|^-1/2 on it
    T *vt, *minus;  // [batch, d, K]               the new V^T; -V^T D
    T* copy;        // [batch, d, d]               if there are several blocks

    Large(const ShermanMorrisonArgs& args, Workspace& space) : g(args) {
        pitch = ceil_div(g.d, 4) * 4;
        slices = ceil_div(g.d, kSlice);
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

using Tile4 = Tile<float, 4, 16>;
static_assert(Tile4::kSide == K, "a tile is a block of vectors high");

// partial[slice, p, q, j] = sum over a slice of i of Y[q, i] A^-1[j, i]
template <class T>
__global__ void __launch_bounds__(kTileThreads) multiply_kernel(Large<T> w) {
    SharedMemory memory;
    const Pieces<T, T, Tile<T, 4, 16>> shared(memory);
    const ShermanMorrisonArgs& g = w.g;
    const Index tiles = ceil_div(g.d, K);
    for (Index block = blockIdx.x; block < g.batch * tiles * w.slices; block += gridDim.x) {
        const Index p = block / (tiles * w.slices), slice = block / tiles % w.slices, j0 = block % tiles * K;
        if (w.skipped(p)) continue;
        const Rows<T> y{w.y + p * K * w.pitch, w.pitch, 1, K};
        const Rows<T> matrix{w.inverse(p) + j0 * g.inverse_row_stride, g.inverse_row_stride, 1,
                             int(smaller(K, g.d - j0))};
        T* to = w.partial + (slice * g.batch + p) * K * w.pitch + j0;
        sync_block();
        sum_over_rows<Product, kSlice, T, T, 4, 16>(y, matrix, slice * kSlice, smaller(g.d, (slice + 1) * kSlice),
                                                    shared, [&](const T(&sum)[4][4], int) {
#pragma unroll
                                                        for (int r = 0; r < 4; ++r)
#pragma unroll
                                                            for (int c = 0; c < 4; ++c) {
                                                                const int q = Tile4::down(int(threadIdx.x)) + 16 * r,
                                                                          j = Tile4::across(int(threadIdx.x)) + 16 * c;
                                                                if (j0 + j < g.d) to[q * w.pitch + j] = sum[r][c];
                                                            }
                                                    });
    }
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

// s[p, q, r] = sum_j V[q, j] Y[r, j], a warp for 4 x 4 of them
template <class T>
__global__ void __launch_bounds__(kThreads) small_product_kernel(Large<T> w) {
    constexpr int side = K / 4;
    const int lane = int(threadIdx.x) % kWarp;
    const Index warp = first_item() / kWarp, warps = item_step() / kWarp;
    for (Index e = warp; e < w.g.batch * side * side; e += warps) {
        const Index p = e / (side * side);
        const int q = int(e / side % side) * 4, r = int(e % side) * 4;
        if (r > q || w.skipped(p)) continue;  // the same for the whole warp
        const T *v = w.v + (p * K + q) * w.pitch, *y = w.y + (p * K + r) * w.pitch;
        T sum[4][4] = {};
        for (Index j = lane; j < w.g.d; j += kWarp) {
            T b[4];
#pragma unroll
            for (int c = 0; c < 4; ++c) b[c] = y[c * w.pitch + j];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const T a = v[i * w.pitch + j];
#pragma unroll
                for (int c = 0; c < 4; ++c) sum[i][c] = multiply_add(a, b[c], sum[i][c]);
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

template <class T>
__global__ void __launch_bounds__(kThreads) factor_kernel(Large<T> w) {
    SharedMemory memory;
    double* s = memory.take<double>(K * (K + 1));
    double* sign = memory.take<double>(3 * K);
    double *inverse_pivot = sign + K, *size = inverse_pivot + K;
    for (Index p = blockIdx.x; p < w.g.batch; p += gridDim.x) {
        if (w.skipped(p)) continue;
        sync_block();
        for (int e = int(threadIdx.x); e < K * K; e += kThreads)
            if (e % K <= e / K) s[e / K * (K + 1) + e % K] = w.s[p * K * K + e];
        for (int q = int(threadIdx.x); q < K; q += kThreads) sign[q] = w.sign[p * K + q];
        const int status = factor_pivots<K>(s, sign, rounding<T>(w.g.d), inverse_pivot, size);
        if (status != kUpdated) {
            sync_block();  // nobody may see the new status at the top of this loop's body
            if (threadIdx.x == 0) w.g.status[p] = status;
            continue;
        }
        for (int e = int(threadIdx.x); e < K * K; e += kThreads) {
            const int q = e / K, r = e % K;
            const double pivot = inverse_pivot[q];
            w.l[p * K * K + e] = r < q    ? T(s[q * (K + 1) + r] * inverse_pivot[r])
                                 : r == q ? T(square_root(pivot < 0 ? -pivot : pivot))
                                          : T(0);
        }
    }
}

// V <- diag(|p|)^-1/2 L^-1 V, a column a thread, and what the diagonal will be.
template <class T>
__global__ void __launch_bounds__(K) solve_kernel(Large<T> w) {
    SharedMemory memory;
    T* l = memory.take<T>(K * K);
    T* minus_sign = memory.take<T>(K);
    const ShermanMorrisonArgs& g = w.g;
    const Index parts = ceil_div(g.d, K);
    for (Index block = blockIdx.x; block < g.batch * parts; block += gridDim.x) {
        const Index p = block / parts, j = block % parts * K + threadIdx.x;
        sync_block();
        for (int e = int(threadIdx.x); e < K * K; e += K) l[e] = w.l[p * K * K + e];
        minus_sign[threadIdx.x] = T(-w.sign[p * K + threadIdx.x]);
        sync_block();
        if (j >= g.d || w.skipped(p)) continue;
        T column[K];
        T diagonal = w.inverse(p)[j * g.inverse_row_stride + j];
#pragma unroll
        for (int q = 0; q < K; ++q) {
            column[q] = w.v[(p * K + q) * w.pitch + j];
#pragma unroll
            for (int r = 0; r < q; ++r) column[q] = multiply_add(-l[q * K + r], column[r], column[q]);
        }
#pragma unroll
        for (int q = 0; q < K; ++q) {
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
__global__ void __launch_bounds__(kTileThreads) update_kernel(Large<T> w) {
    SharedMemory memory;
    const Pieces<T, T, Tile<T, 4, 16>> shared(memory);
    T* stage = memory.take<T>(K * (K + 1));
    const ShermanMorrisonArgs& g = w.g;
    const Index tiles = ceil_div(g.d, K), row = g.inverse_row_stride;
    for (Index block = blockIdx.x; block < g.batch * tiles * tiles; block += gridDim.x) {
        const Index p = block / (tiles * tiles), i0 = block / tiles % tiles * K, j0 = block % tiles * K;
        if (i0 > j0 || w.skipped(p)) continue;
        const Rows<T> a{w.minus + (p * g.d + i0) * K, K, 1, int(smaller(K, g.d - i0))};
        const Rows<T> b{w.vt + (p * g.d + j0) * K, K, 1, int(smaller(K, g.d - j0))};
        T *tile = w.inverse(p) + i0 * row + j0, *mirror = w.inverse(p) + j0 * row + i0;
        sync_block();
        sum_over_rows<Product, K, T, T, 4, 16>(a, b, 0, K, shared, [&](const T(&sum)[4][4], int) {
#pragma unroll
            for (int r = 0; r < 4; ++r)
#pragma unroll
                for (int c = 0; c < 4; ++c) {
                    const int i = Tile4::down(int(threadIdx.x)) + 16 * r, j = Tile4::across(int(threadIdx.x)) + 16 * c;
                    if (i < a.count && j < b.count && i0 + i <= j0 + j)
                        stage[i * (K + 1) + j] = tile[i * row + j] += sum[r][c];
                }
        });
        sync_block();
        for (int e = int(threadIdx.x); e < K * K; e += kTileThreads) {
            const int j = e / K, i = e % K;
            if (i < a.count && j < b.count && i0 + i < j0 + j) mirror[j * row + i] = stage[i * (K + 1) + j];
        }
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
    SharedSize sized;
    Pieces<T, T, Tile<T, 4, 16>>::count(sized);
    const std::size_t pieces = sized.bytes();
    const std::size_t factor = SharedSize().add(sizeof(double), K * (K + 1)).add(sizeof(double), 3 * K).bytes();
    const std::size_t solve = SharedSize().add(sizeof(T), K * K).add(sizeof(T), K).bytes();
    const std::size_t update = sized.add(sizeof(T), K * (K + 1)).bytes();
    Status status;
    if (failed(status, find_vector_order(g, w.order, stream))) return status;
    if (w.copy && failed(status, launch_over(copy_kernel<T>, g.batch * g.d * g.d, 256, stream, w, false)))
        return status;
    for (Index first = 0; first < g.k; first += K) {
        if (failed(status, launch_over(scale_kernel<T>, g.batch * K * w.pitch, 256, stream, w, first)) ||
            failed(status,
                   launch(multiply_kernel<T>, g.batch * tiles * w.slices, kTileThreads, pieces, stream, false, w)) ||
            failed(status, launch_over(add_slices_kernel<T>, g.batch * K * w.pitch, 256, stream, w)) ||
            failed(status,
                   launch_over(small_product_kernel<T>, g.batch * (K / 4) * (K / 4) * kWarp, kThreads, stream, w)) ||
            failed(status, launch(factor_kernel<T>, g.batch, kThreads, factor, stream, false, w)) ||
            failed(status, launch(solve_kernel<T>, g.batch * tiles, K, solve, stream, false, w)) ||
            failed(status, launch(update_kernel<T>, g.batch * tiles * tiles, kTileThreads, update, stream, false, w)))
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
