// The small matrices of large inverses: S = V Y^T of a panel with itself and with the panels behind it, shared out among
// many warps and chunks of columns, and the pivots of the first, which one block of threads works out.
#include "cuda/sherman_morrison_large.cuh"

namespace mtz::cuda {
namespace {

constexpr int kFactorThreads = 256;

// s[p, b, chunk, q, r] = sum over a chunk of j of V[q, j] Y[r, j], q of this panel and r of panel b, a warp for 4 x 4 of
// them; rows end in zeros
template <class T>
__global__ void __launch_bounds__(kFactorThreads) small_product_kernel(Large<T> w, int panel, int panels) {
    constexpr int side = K / 4, wide = Word<T>::kCount;
    const int lane = int(threadIdx.x) % kWarp, later = panels - panel;
    const Index warp = first_item() / kWarp, warps = item_step() / kWarp;
    for (Index e = warp; e < w.g.batch * later * w.chunks * side * side; e += warps) {
        const int r = int(e % side) * 4, q = int(e / side % side) * 4;
        const Index place = e / (side * side), chunk = place % w.chunks, b = panel + place / w.chunks % later;
        const Index p = place / w.chunks / later;
        if ((b == panel && r > q) || w.skipped(p)) continue;  // the same for the whole warp
        const T* v = w.v + (p * w.side + panel * K + q) * w.pitch;
        const T* y = w.y + (p * w.side + b * K + r) * w.pitch;
        const Index last = smaller(w.pitch, (chunk + 1) * w.chunk);
        T sum[4][4] = {};
#pragma unroll(sizeof(T) == 4 ? 2 : 1)
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
        double* to = w.s + ((p * w.panels + b) * w.chunks + chunk) * K * K + q * K + r;
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                double total = double(sum[i][c]);
#pragma unroll
                for (int mask = kWarp / 2; mask > 0; mask /= 2) total += shuffle_xor(total, mask);
                if (lane == 0) to[i * K + c] = total;
            }
    }
}

template <class T>
__device__ __forceinline__ double sum_of_chunks(const Large<T>& w, const double* from) {
    double sum = 0;
#pragma unroll 4
    for (Index chunk = 0; chunk < w.chunks; ++chunk) sum += from[chunk * K * K];
    return sum;
}

// A block of threads for each panel from this one on: all work out the pivots, the first keeps them, the others what
// couples their panel to this one.
template <class T>
__global__ void __launch_bounds__(kFactorThreads) factor_kernel(Index first_block, Large<T> w, int panel, int panels) {
    using P = Pivots<T>;
    constexpr int R = K / 16;
    SharedMemory memory;
    P pivots;
    pivots.take(memory);
    const Index block = first_block + blockIdx.x, later = panels - panel, p = block / later, b = panel + block % later;
    const int thread = int(threadIdx.x), x = thread % 16, y = thread / 16;
    if (sync_block_any(w.skipped(p))) return;  // another block may be writing it
    const double* from = w.s + (p * w.panels + panel) * w.chunks * K * K;
    for (int i = thread; i < K; i += kFactorThreads) pivots.sign[i] = T(w.sign[p * w.side + panel * K + i]);
    for (int e = thread; e < K * K; e += kFactorThreads) {
        const int i = e / K, k = e % K;
        if (k / P::kBlock <= i / P::kBlock)
            pivots.s[i * P::kPitch + k] = T(sum_of_chunks(w, from + (k > i ? k * K + i : e)));
    }
    const int status = pivots.eliminate(K / P::kBlock, rounding<T>(w.g.d));
    if (status != kUpdated) {
        if (b == panel && thread == 0) w.g.status[p] = status;
        return;
    }
    if (b == panel) {
        for (int e = thread; e < K * K; e += kFactorThreads)
            w.l[p * K * K + e] = pivots.inverse[e / K * P::kPitch + e % K];
        return;
    }
    from = w.s + (p * w.panels + b) * w.chunks * K * K;
    for (int e = thread; e < K * K; e += kFactorThreads)
        pivots.s[e / K * P::kPitch + e % K] = T(sum_of_chunks(w, from + e));
    sync_block();  // V Y^T is there
    T sum[R][R] = {};
#pragma unroll 4
    for (int k = 0; k < K; ++k)
#pragma unroll
        for (int i = 0; i < R; ++i)
#pragma unroll
            for (int c = 0; c < R; ++c)
                sum[i][c] = multiply_add(pivots.s[k * P::kPitch + y + 16 * i],
                                         pivots.inverse[(x + 16 * c) * P::kPitch + k], sum[i][c]);
    T* to = w.coupling + (p * w.panels + b) * K * K;
#pragma unroll
    for (int i = 0; i < R; ++i)
#pragma unroll
        for (int c = 0; c < R; ++c) to[(y + 16 * i) * K + x + 16 * c] = sum[i][c];
}

}  // namespace

template <class T>
cudaError_t factor_panel(const Large<T>& w, int panel, int panels, void* stream) {
    CountedMemory memory;
    Pivots<T>().take(memory);
    const Index later = panels - panel;
    const cudaError_t error = launch_over(small_product_kernel<T>, w.g.batch * later * w.chunks * (K * K / 16) * kWarp,
                                          kFactorThreads, stream, w, panel, panels);
    if (error != cudaSuccess) return error;
    return launch_in_turn(factor_kernel<T>, w.g.batch * later, kFactorThreads, memory.size.bytes(), stream, w, panel,
                          panels);
}

template cudaError_t factor_panel<float>(const Large<float>&, int, int, void*);
template cudaError_t factor_panel<double>(const Large<double>&, int, int, void*);

}  // namespace mtz::cuda
