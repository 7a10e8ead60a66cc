// One panel of a round of large inverses, its V given: S = V Y^T with itself and with the panels behind it
// (cuda/sherman_morrison_large_product.cuh), then V <- X V and what that takes out of V in later panels,
//
//     V_b <- V_b - S_b^T X^T D (X V)
//
// in blocks of kTile columns, each of which works out the pivots for itself: that is less than to wait for another launch.
#include "cuda/sherman_morrison_large_product.cuh"

namespace mtz::cuda {
namespace {

constexpr int kTile = 32;

// The panel's columns j0 ... in shared memory. A thread has eight elements of a product, sum[r][c] in row row + down(r) and
// column column + along(r) + c: on tensor cores of 16 x 16 a warp, elsewhere four rows and two columns.
template <class T>
struct Columns {
    static constexpr bool kMayTensor = sizeof(T) == 4;
    static constexpr int kTilePitch = kMayTensor ? kTile + 8 : kTile;  // rows of a tile are 8 banks apart
    const Large<T>& w;
    Pivots<T> pivots;
    T* tile;  // [K, kTilePitch] V, then D X V, then X^T D X V
    Index p, j0;
    int row, column;

    __device__ __forceinline__ Columns(const Large<T>& work, SharedMemory& memory, Index p, Index j0)
        : w(work), p(p), j0(j0), row(int(threadIdx.x) / 16 * 4), column(int(threadIdx.x) % 16 * 2) {
        pivots.take(memory);
        tile = memory.take<T>(K * kTilePitch);
        if (!kMayTensor || !kTensorCores) return;
        const int warp = int(threadIdx.x) / kWarp, lane = int(threadIdx.x) % kWarp;
        row = warp / 2 * 16 + lane / 4;
        column = warp % 2 * 16 + lane % 4 * 2;
    }
    __device__ static __forceinline__ int down(int r) { return kMayTensor && kTensorCores ? r % 2 * 8 : r; }
    __device__ static __forceinline__ int along(int r) { return kMayTensor && kTensorCores ? r / 2 * 8 : 0; }
    static std::size_t bytes() {
        CountedMemory memory;
        Pivots<T>().take(memory);
        memory.take<T>(K * kTilePitch);
        return memory.size.bytes();
    }

    __device__ __forceinline__ void start_v(int panel) const {
        constexpr int wide = Word<T>::kCount, across = kTile / wide;
        const T* from = w.v + (p * w.side + panel * K) * w.pitch + j0;
        for (int e = int(threadIdx.x); e < K * across; e += kPanelThreads) {
            const int q = e / across, j = e % across * wide;
            const bool any = j0 + j < w.pitch;
            copy_async<16>(tile + q * kTilePitch + j, from + (any ? q * w.pitch + j : 0), any ? 16 : 0);
        }
        copy_async_commit();
    }
    // S of this panel with panel b; of the lower triangle only, where that is all there is
    __device__ __forceinline__ void load_s(Index b, bool lower) const {
        static_assert(K * K / 4 % kPanelThreads == 0);
        const int q = int(threadIdx.x) / (K / 4), r = int(threadIdx.x) % (K / 4) * 4, chunks = int(w.chunks);
        const T* from = w.s + (p * w.panels + b) * w.chunks * K * K + 4 * threadIdx.x;
        T* to = pivots.s + q * Pivots<T>::kPitch + r;
        constexpr int down = kPanelThreads / (K / 4);
#pragma unroll
        for (int e = 0; e < K / down; ++e) {
            if (lower && r / Pivots<T>::kBlock > (q + e * down) / Pivots<T>::kBlock) continue;
            Four<T> sum = load_four(from + e * down * K);
#pragma unroll(kMostChunks - 1)
            for (int chunk = 1; chunk < chunks; ++chunk) {
                const Four<T> more = load_four(from + chunk * K * K + e * down * K);
#pragma unroll
                for (int f = 0; f < 4; ++f) sum.at[f] += more.at[f];
            }
            store_four(to + e * down * Pivots<T>::kPitch, sum.at);
        }
    }
    // sum = a tile by a warp on tensor cores, of rows first ... last - 1 of the tile; a(k) are eight elements: of rows row and
    // row + 8, columns k, k + 4, k + 8 and k + 12
    template <class A>
    __device__ __forceinline__ void multiply_tensor(int first, int last, A a, float (&sum)[4][2]) const {
        const int g = int(threadIdx.x) % kWarp / 4, t = int(threadIdx.x) % 4;
        const float* from = tile + column - 2 * t + g;
        tensor::Tile product[1][2] = {};
#pragma unroll 1
        for (int k = first + t; k < last; k += 16) {
            Tf32 left[1][2][4], right[2][4];
            tensor::load_split(
                left, right, [&](int r, int at) { return a(r, k + at); },
                [&](int at, int c) { return from[(k + at) * kTilePitch + c]; });
            tensor::multiply_add<1>(product, left, right);
        }
#pragma unroll
        for (int e = 0; e < 8; ++e) sum[e / 2][e % 2] = product[0][e / 4][e % 4];
    }
    // sum = a^T tile, a [K, K] with a pitch; rows of the tile from `first` on
    __device__ __forceinline__ void multiply_turned(const T* a, int first, T (&sum)[4][2]) const {
        if constexpr (kMayTensor) {
            const auto turned = [&](int below, int k) { return a[k * Pivots<T>::kPitch + row + below]; };
            if (kTensorCores) return multiply_tensor(first, K, turned, sum);
        }
#pragma unroll 4
        for (int k = first; k < K; ++k) {
            const Four<T> x = load_four(a + k * Pivots<T>::kPitch + row);
            const T *y = tile + k * kTilePitch + column, y0 = y[0], y1 = y[1];
#pragma unroll
            for (int r = 0; r < 4; ++r) {
                sum[r][0] = multiply_add(x.at[r], y0, sum[r][0]);
                sum[r][1] = multiply_add(x.at[r], y1, sum[r][1]);
            }
        }
    }
    // sum = X tile
    __device__ __forceinline__ void multiply(T (&sum)[4][2]) const {
        const int last = (row / Pivots<T>::kBlock + 1) * Pivots<T>::kBlock;
        if constexpr (kMayTensor) {
            const T* x = pivots.inverse + row * Pivots<T>::kPitch;
            const auto straight = [&](int below, int k) { return x[below * Pivots<T>::kPitch + k]; };
            if (kTensorCores) return multiply_tensor(0, last, straight, sum);
        }
#pragma unroll 2
        for (int k = 0; k < last; k += 4) {
            Four<T> x[4];
#pragma unroll
            for (int r = 0; r < 4; ++r) x[r] = load_four(pivots.inverse + (row + r) * Pivots<T>::kPitch + k);
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const T *y = tile + (k + e) * kTilePitch + column, y0 = y[0], y1 = y[1];
#pragma unroll
                for (int r = 0; r < 4; ++r) {
                    sum[r][0] = multiply_add(x[r].at[e], y0, sum[r][0]);
                    sum[r][1] = multiply_add(x[r].at[e], y1, sum[r][1]);
                }
            }
        }
    }
    __device__ __forceinline__ void keep(const T (&sum)[4][2], bool with_sign) const {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            const T sign = with_sign ? pivots.sign[row + down(r)] : T(1);
#pragma unroll
            for (int c = 0; c < 2; ++c) tile[(row + down(r)) * kTilePitch + column + along(r) + c] = sign * sum[r][c];
        }
    }
    // -D V and V^T for the update
    __device__ __forceinline__ void write(int panel, const T (&sum)[4][2]) const {
        T* minus = w.minus + (p * w.side + panel * K + row) * w.pitch + j0 + column;
        T* turned = w.vt + (p * w.g.d + j0 + column) * w.side + panel * K + row;
#pragma unroll
        for (int r = 0; r < 4; ++r)
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                const int j = along(r) + c;
                if (j0 + column + j < w.pitch) minus[down(r) * w.pitch + j] = -pivots.sign[row + down(r)] * sum[r][c];
                if (kMayTensor && kTensorCores && j0 + column + j < w.g.d) turned[j * w.side + down(r)] = sum[r][c];
            }
        if (kMayTensor && kTensorCores) return;
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            if (j0 + column + c >= w.g.d) return;
            const T four[4] = {sum[0][c], sum[1][c], sum[2][c], sum[3][c]};
            store_global(turned + c * w.side, four);
        }
    }
    // What the diagonal will be, a column a thread; the status of the last panel's
    __device__ __forceinline__ int diagonal(int panel, bool last) const {
        const Index j = j0 + threadIdx.x;
        if (int(threadIdx.x) >= kTile || j >= w.g.d) return kUpdated;
        T x = panel == 0 ? w.inverse(p)[j * w.g.inverse_row_stride + j] : w.diagonal[p * w.g.d + j];
#pragma unroll 8
        for (int q = 0; q < K; ++q) {
            const T v = tile[q * kTilePitch + threadIdx.x];
            x = multiply_add(-pivots.sign[q] * v, v, x);
        }
        w.diagonal[p * w.g.d + j] = x;
        return last ? judge_diagonal(double(x)) : int(kUpdated);
    }
    __device__ __forceinline__ void take_out_of(Index b, const T (&sum)[4][2]) const {
        T* v = w.v + (p * w.side + b * K + row) * w.pitch + j0 + column;
#pragma unroll
        for (int r = 0; r < 4; ++r)
#pragma unroll
            for (int c = 0; c < 2; ++c)
                if (j0 + column + along(r) + c < w.pitch) v[down(r) * w.pitch + along(r) + c] -= sum[r][c];
    }
};

template <class T>
__global__ void __launch_bounds__(kPanelThreads, 1) solve_kernel(Index first_block, Large<T> w, int panel, int panels) {
    wait_for_launch();
    const Index block = first_block + blockIdx.x, tiles = ceil_div(w.g.d, kTile), p = block / tiles;
    if (sync_block_any(w.skipped(p))) return;  // another block may be writing it
    SharedMemory memory;
    const Columns<T> columns(w, memory, p, block % tiles * kTile);
    columns.start_v(panel);
    for (int i = int(threadIdx.x); i < K; i += kPanelThreads)
        columns.pivots.sign[i] = T(w.sign[p * w.side + panel * K + i]);
    columns.load_s(panel, true);
    int status = columns.pivots.eliminate(K / Pivots<T>::kBlock, rounding<T>(w.g.d));
    copy_async_wait<0>();
    if (status != kUpdated) {
        if (threadIdx.x == 0) w.g.status[p] = status;
        return;
    }
    sync_block();  // V is there
    T sum[4][2] = {};
    columns.multiply(sum);
    columns.write(panel, sum);
    sync_block();  // nobody needs the old V any more
    columns.keep(sum, true);
    sync_block();  // D V is there
    status = columns.diagonal(panel, panel == panels - 1);
    if (status != kUpdated) atomic_max(w.g.status + p, status);
    if (panel == panels - 1) return;
    T both[4][2] = {};
    columns.multiply_turned(columns.pivots.inverse, columns.row / Pivots<T>::kBlock * Pivots<T>::kBlock, both);
    sync_block();  // nobody needs D V any more
    columns.keep(both, false);
    for (Index b = panel + 1; b < panels; ++b) {
        sync_block();  // nobody needs S of another panel any more
        columns.load_s(b, false);
        sync_block();  // S and X^T D V are there
        T more[4][2] = {};
        columns.multiply_turned(columns.pivots.s, 0, more);
        columns.take_out_of(b, more);
    }
}

}  // namespace

template <class T>
cudaError_t solve_panel(const Large<T>& w, int panel, int panels, Queue queue) {
    // as many blocks for 16 x 8 each as for eight warps that have 4 x 4
    const Index blocks = w.g.batch * (panels - panel) * w.chunks * (K * K / kProduct);
    const std::size_t sums = sizeof(T) == 4 ? SharedSize().add(4, kPanelThreads / kWarp * kProduct).bytes() : 0;
    const cudaError_t error = launch(small_product_kernel<T>, blocks, kPanelThreads, sums, queue, w, panel, panels);
    if (error != cudaSuccess) return error;
    return launch_in_turn(solve_kernel<T>, w.g.batch * ceil_div(w.g.d, kTile), kPanelThreads, Columns<T>::bytes(),
                          queue, w, panel, panels);
}

template cudaError_t solve_panel<float>(const Large<float>&, int, int, Queue);
template cudaError_t solve_panel<double>(const Large<double>&, int, int, Queue);

}  // namespace mtz::cuda
