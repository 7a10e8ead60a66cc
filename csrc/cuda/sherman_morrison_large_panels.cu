// One panel of a round of large inverses, its V given: S = V Y^T with itself and with the panels behind it, shared out among
// many warps and chunks of columns; then V <- X V and what that takes out of V in later panels,
//
//     V_b <- V_b - S_b^T X^T D (X V)
//
// in blocks of kTile columns, each of which works out the pivots for itself: that is less than to wait for another launch.
#include "cuda/sherman_morrison_large.cuh"

namespace mtz::cuda {
namespace {

constexpr int kPanelThreads = 256, kTile = 32;

// s[p, b, chunk, q, r] = sum over a chunk of j of V[q, j] Y[r, j], q of this panel and r of panel b, a warp for 4 x 4 of
// them; rows end in zeros
template <class T>
__global__ void __launch_bounds__(kPanelThreads, 1) small_product_kernel(Large<T> w, int panel, int panels) {
    constexpr int side = K / 4, wide = Word<T>::kCount;
    wait_for_launch();
    const int lane = int(threadIdx.x) % kWarp, later = panels - panel;
    const Index warp = first_item() / kWarp, warps = item_step() / kWarp;
    for (Index e = warp; e < w.g.batch * later * w.chunks * side * side; e += warps) {
        const int r = int(e % side) * 4, q = int(e / side % side) * 4;
        const Index place = e / (side * side), chunk = place % w.chunks, b = panel + place / w.chunks % later;
        const Index p = place / w.chunks / later;
        if ((b == panel && r / Pivots<T>::kBlock > q / Pivots<T>::kBlock) || w.skipped(p))
            continue;  // for a whole warp
        const T* v = w.v + (p * w.side + panel * K + q) * w.pitch;
        const T* y = w.y + (p * w.side + b * K + r) * w.pitch;
        const Index last = smaller(w.pitch, (chunk + 1) * w.chunk);
        T sum[4][4] = {};
#pragma unroll(sizeof(T) == 4 ? 4 : 2)
        for (Index j = chunk * w.chunk + lane * wide; j < last; j += kWarp * wide) {
            Word<T> at_y[4];
#pragma unroll
            for (int c = 0; c < 4; ++c) at_y[c] = *reinterpret_cast<const Word<T>*>(y + c * w.pitch + j);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const Word<T> x = *reinterpret_cast<const Word<T>*>(v + i * w.pitch + j);
#pragma unroll
                for (int c = 0; c < 4; ++c)
#pragma unroll
                    for (int f = 0; f < wide; ++f) sum[i][c] = multiply_add(x.at[f], at_y[c].at[f], sum[i][c]);
            }
        }
        T* to = w.s + ((p * w.panels + b) * w.chunks + chunk) * K * K + q * K + r;
        // sums of all lanes: in each step a lane keeps half of its sums, and its partner the others
#pragma unroll
        for (int step = 0; step < 4; ++step) {
            const int half = 8 >> step;
            const bool upper = lane & 2 * half;
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                if (i >= half) continue;
                T &low = sum[i / 4][i % 4], &high = sum[(i + half) / 4][(i + half) % 4];
                const T sent = upper ? low : high, kept = upper ? high : low;
                low = kept + shuffle_xor(sent, 2 * half);
            }
        }
        const T total = sum[0][0] + shuffle_xor(sum[0][0], 1);
        if (lane % 2 == 0) to[lane / 8 * K + lane / 2 % 4] = total;
    }
}

// The panel's columns j0 ... in shared memory. A thread has four rows and two columns of a product.
template <class T>
struct Columns {
    const Large<T>& w;
    Pivots<T> pivots;
    T* tile;  // [K, kTile] V, then D X V, then X^T D X V
    Index p, j0;
    int row, column;

    __device__ __forceinline__ Columns(const Large<T>& work, SharedMemory& memory, Index p, Index j0)
        : w(work), p(p), j0(j0), row(int(threadIdx.x) / 16 * 4), column(int(threadIdx.x) % 16 * 2) {
        pivots.take(memory);
        tile = memory.take<T>(K * kTile);
    }
    static std::size_t bytes() {
        CountedMemory memory;
        Pivots<T>().take(memory);
        memory.take<T>(K * kTile);
        return memory.size.bytes();
    }

    __device__ __forceinline__ void start_v(int panel) const {
        constexpr int wide = Word<T>::kCount, across = kTile / wide;
        const T* from = w.v + (p * w.side + panel * K) * w.pitch + j0;
        for (int e = int(threadIdx.x); e < K * across; e += kPanelThreads) {
            const int q = e / across, j = e % across * wide;
            const bool any = j0 + j < w.pitch;
            copy_async<16>(tile + q * kTile + j, from + (any ? q * w.pitch + j : 0), any ? 16 : 0);
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
    // sum = a^T tile, a [K, K] with a pitch; rows of the tile from `first` on
    __device__ __forceinline__ void multiply_turned(const T* a, int first, T (&sum)[4][2]) const {
#pragma unroll 4
        for (int k = first; k < K; ++k) {
            const Four<T> x = load_four(a + k * Pivots<T>::kPitch + row);
            const T *y = tile + k * kTile + column, y0 = y[0], y1 = y[1];
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
#pragma unroll 2
        for (int k = 0; k < last; k += 4) {
            Four<T> x[4];
#pragma unroll
            for (int r = 0; r < 4; ++r) x[r] = load_four(pivots.inverse + (row + r) * Pivots<T>::kPitch + k);
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const T *y = tile + (k + e) * kTile + column, y0 = y[0], y1 = y[1];
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
            const T sign = with_sign ? pivots.sign[row + r] : T(1);
#pragma unroll
            for (int c = 0; c < 2; ++c) tile[(row + r) * kTile + column + c] = sign * sum[r][c];
        }
    }
    // -D V and V^T for the update
    __device__ __forceinline__ void write(int panel, const T (&sum)[4][2]) const {
        T* minus = w.minus + (p * w.side + panel * K + row) * w.pitch + j0 + column;
        T* turned = w.vt + (p * w.g.d + j0 + column) * w.side + panel * K + row;
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            if (j0 + column + c >= w.pitch) return;
#pragma unroll
            for (int r = 0; r < 4; ++r) minus[r * w.pitch + c] = -pivots.sign[row + r] * sum[r][c];
            if (j0 + column + c >= w.g.d) continue;
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
            const T v = tile[q * kTile + threadIdx.x];
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
                if (j0 + column + c < w.pitch) v[r * w.pitch + c] -= sum[r][c];
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
    const Index warps = w.g.batch * (panels - panel) * w.chunks * (K * K / 16);
    const cudaError_t error =
        launch_over(small_product_kernel<T>, warps * kWarp, kPanelThreads, queue, w, panel, panels);
    if (error != cudaSuccess) return error;
    return launch_in_turn(solve_kernel<T>, w.g.batch * ceil_div(w.g.d, kTile), kPanelThreads, Columns<T>::bytes(),
                          queue, w, panel, panels);
}

template cudaError_t solve_panel<float>(const Large<float>&, int, int, Queue);
template cudaError_t solve_panel<double>(const Large<double>&, int, int, Queue);

}  // namespace mtz::cuda
