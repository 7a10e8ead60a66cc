// Many small inverses: a block of threads a matrix, which stays in shared memory through all its updates and is written
// back if they all succeed. See cuda/sherman_morrison.cuh for the formula.
#include "cuda/sherman_morrison.cuh"

namespace mtz::cuda {
namespace {

constexpr int K = 16;  // vectors at a time

template <class T>
struct alignas(16) Four {
    T at[4];
};

struct Layout {
    int side, pitch;  // rows padded to a multiple of 4; a row of the matrix or of V
    __host__ __device__ explicit Layout(Index d) : side(int(ceil_div(d, 4) * 4)), pitch(side + 4) {}
};

template <class T>
std::size_t shared_bytes(Index d) {
    const Layout at(d);
    return SharedSize()
        .add(sizeof(T), std::size_t(at.side) * at.pitch)
        .add(sizeof(T), std::size_t(at.side) * K)
        .add(sizeof(T), std::size_t(K) * at.pitch)
        .add(sizeof(T), K * K)
        .add(sizeof(double), K * (K + 1))
        .add(sizeof(double), 3 * K)
        .bytes();
}

// Tile number e of the upper triangle of n x n: row r is followed by row n - 1 - r, so that both make n + 1 together.
__device__ __forceinline__ bool triangle(int e, int n, int& i, int& j) {
    const int r = e / (n + 1), c = e % (n + 1);
    if (c < n - r) {
        i = r;
        j = r + c;
        return true;
    }
    i = n - 1 - r;
    j = i + c - (n - r);
    return i > r;  // the middle row of an odd number stands alone
}

template <class T>
struct Small {
    const ShermanMorrisonArgs& g;
    Layout at;
    T *matrix, *yt, *v, *l;                   // [side, pitch], [side, K], [K, pitch], [K, K]
    double *s, *sign, *inverse_pivot, *size;  // [K, K + 1], [K] each

    __device__ explicit Small(const ShermanMorrisonArgs& args) : g(args), at(args.d) {
        SharedMemory memory;
        matrix = memory.take<T>(std::size_t(at.side) * at.pitch);
        yt = memory.take<T>(std::size_t(at.side) * K);
        v = memory.take<T>(std::size_t(K) * at.pitch);
        l = memory.take<T>(K * K);
        s = memory.take<double>(K * (K + 1));
        sign = memory.take<double>(3 * K);
        inverse_pivot = sign + K;
        size = inverse_pivot + K;
    }

    __device__ void load_vectors(const Index* order, Index p, Index first) const {
        // a thread takes one vector, neighbours neighbouring elements where the block is wide enough
        const int per = int(blockDim.x) / K, q = int(threadIdx.x) / per;
        const Scaled<T> vector(g, order, p, first + q);
        for (int j = int(threadIdx.x) % per; j < at.side; j += per) yt[j * K + q] = j < g.d ? vector.at(g, j) : T(0);
        if (int(threadIdx.x) % per == 0) sign[q] = vector.sign;
    }

    // V[q, j] = sum_i Y[q, i] A^-1[i, j], two vectors and four columns a thread
    __device__ void multiply() const {
        const int columns = at.side / 4;
        for (int e = int(threadIdx.x); e < K / 2 * columns; e += int(blockDim.x)) {
            const int q = e / columns * 2, j = e % columns * 4;
            T sum[2][4] = {};
            for (int i = 0; i < g.d; ++i) {
                const Four<T> row = *reinterpret_cast<const Four<T>*>(matrix + i * at.pitch + j);
                const T y0 = yt[i * K + q], y1 = yt[i * K + q + 1];
#pragma unroll
                for (int c = 0; c < 4; ++c) {
                    sum[0][c] = multiply_add(y0, row.at[c], sum[0][c]);
                    sum[1][c] = multiply_add(y1, row.at[c], sum[1][c]);
                }
            }
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                v[q * at.pitch + j + c] = sum[0][c];
                v[(q + 1) * at.pitch + j + c] = sum[1][c];
            }
        }
    }

    // The lower triangle of V Y^T, four lanes an element
    __device__ void small_product() const {
        constexpr int elements = K / 2 * (K + 1);
        const int lane = int(threadIdx.x) % 4, group = int(threadIdx.x) / 4;
        for (int first = 0; first < elements; first += int(blockDim.x) / 4) {
            int r = 0, q = 0;
            const bool any = first + group < elements;
            if (any) triangle(first + group, K, r, q);
            T sum = 0;
#pragma unroll 4
            for (int i = lane; i < (any ? at.side : 0); i += 4)
                sum = multiply_add(v[q * at.pitch + i], yt[i * K + r], sum);
            sum += shuffle_xor(sum, 1);
            sum += shuffle_xor(sum, 2);
            if (any && lane == 0) s[q * (K + 1) + r] = double(sum);
        }
    }

    // V <- diag(|p|)^-1/2 L^-1 V, a column a thread
    __device__ void solve() const {
        for (int e = int(threadIdx.x); e < K * K; e += int(blockDim.x)) {
            const int q = e / K, r = e % K;
            const double p = inverse_pivot[q];
            l[e] = r < q ? T(s[q * (K + 1) + r] * inverse_pivot[r]) : r == q ? T(square_root(p < 0 ? -p : p)) : T(0);
        }
        sync_block();
        for (int j = int(threadIdx.x); j < at.side; j += int(blockDim.x)) {
            T column[K];
#pragma unroll
            for (int q = 0; q < K; ++q) {
                column[q] = v[q * at.pitch + j];
#pragma unroll
                for (int r = 0; r < q; ++r) column[q] = multiply_add(-l[q * K + r], column[r], column[q]);
            }
#pragma unroll
            for (int q = 0; q < K; ++q) v[q * at.pitch + j] = column[q] * l[q * K + q];
        }
    }

    // A^-1 -= V^T D V: tiles of 4 x 4 of the upper triangle, and their mirror images
    __device__ void update() const {
        const int n = at.side / 4, tiles = (n + 1) / 2 * (n + 1);
        for (int e = int(threadIdx.x); e < tiles; e += int(blockDim.x)) {
            int i, j;
            if (!triangle(e, n, i, j)) continue;
            i *= 4;
            j *= 4;
            Four<T> rows[4];
#pragma unroll
            for (int r = 0; r < 4; ++r) rows[r] = *reinterpret_cast<const Four<T>*>(matrix + (i + r) * at.pitch + j);
#pragma unroll 4
            for (int q = 0; q < K; ++q) {
                const Four<T> a = *reinterpret_cast<const Four<T>*>(v + q * at.pitch + i);
                const Four<T> b = *reinterpret_cast<const Four<T>*>(v + q * at.pitch + j);
                const T minus = T(-sign[q]);
#pragma unroll
                for (int r = 0; r < 4; ++r)
#pragma unroll
                    for (int c = 0; c < 4; ++c) rows[r].at[c] = multiply_add(minus * a.at[r], b.at[c], rows[r].at[c]);
            }
#pragma unroll
            for (int r = 0; r < 4; ++r) *reinterpret_cast<Four<T>*>(matrix + (i + r) * at.pitch + j) = rows[r];
            if (i == j) continue;
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                const Four<T> column = {{rows[0].at[c], rows[1].at[c], rows[2].at[c], rows[3].at[c]}};
                *reinterpret_cast<Four<T>*>(matrix + (j + c) * at.pitch + i) = column;
            }
        }
    }

    // The status, the same for every thread.
    __device__ int update_all(const Index* order, Index p) const {
        for (Index first = 0; first < g.k; first += K) {
            load_vectors(order, p, first);
            sync_block();
            multiply();
            sync_block();
            small_product();
            const int status = factor_pivots<K>(s, sign, rounding<T>(g.d), inverse_pivot, size);
            if (status != kUpdated) return status;
            solve();
            sync_block();
            update();
            sync_block();
        }
        int worst = kUpdated;
        for (int i = int(threadIdx.x); i < g.d; i += int(blockDim.x)) {
            const int status = judge_diagonal(double(matrix[i * at.pitch + i]));
            if (status > worst) worst = status;
        }
        if (sync_block_any(worst == kNotFinite)) return kNotFinite;
        return sync_block_any(worst == kIndefinite) ? kIndefinite : kUpdated;
    }
};

template <class T>
__global__ void __launch_bounds__(256, 2) small_kernel(ShermanMorrisonArgs g, const Index* order) {
    const Small<T> small(g);
    const Layout at = small.at;
    for (Index p = blockIdx.x; p < g.batch; p += gridDim.x) {
        T* inverse = static_cast<T*>(g.inverse) + p * g.inverse_batch_stride;
        sync_block();  // the matrix before this one has been written back
        for (int e = int(threadIdx.x); e < at.side * at.pitch; e += int(blockDim.x)) {
            const int i = e / at.pitch, j = e % at.pitch;
            small.matrix[e] = i < g.d && j < g.d ? inverse[i * g.inverse_row_stride + j] : T(0);
        }
        const int status = small.update_all(order, p);
        if (threadIdx.x == 0) g.status[p] = status;
        if (status != kUpdated) continue;
        for (int e = int(threadIdx.x); e < at.side * at.pitch; e += int(blockDim.x)) {
            const int i = e / at.pitch, j = e % at.pitch;
            if (i < g.d && j < g.d) inverse[i * g.inverse_row_stride + j] = small.matrix[e];
        }
    }
}

}  // namespace

template <class T>
bool fits_shared_memory(Index d) {
    int device = 0, most = 0;
    if (d > 512 || cudaGetDevice(&device) != cudaSuccess ||
        cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess)
        return false;
    return shared_bytes<T>(d) <= std::size_t(most);
}

template <class T>
Status update_small(const ShermanMorrisonArgs& g, void* workspace, void* stream) {
    Index* order = Workspace(workspace).take<Index>(g.batch * g.k);
    Status status;
    if (failed(status, find_vector_order(g, order, stream))) return status;
    const int threads = g.d <= 32 ? 64 : g.d <= 96 ? 128 : 256;
    failed(status, launch(small_kernel<T>, g.batch, threads, shared_bytes<T>(g.d), stream, false, g, order));
    return status;
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
