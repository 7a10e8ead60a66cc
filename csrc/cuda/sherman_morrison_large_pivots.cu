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

// L diag(p) L^T of S and L^-1. Step j takes row j out of all rows below it, in S, and in what began as the unit matrix:
// of the first, columns beyond j are left, and of the second only those up to j are there, so that both share a lower
// triangle. It is in registers: thread (y, x) of 16 x 16 has rows y + 16 a, columns x + 16 b, a >= b.
//
// Each step publishes what the next needs, column j + 1 of S and in front of it row j + 1 of L^-1, by turns in two places,
// so that one barrier a pivot is enough; and the diagonal element after that, from which every thread works out the
// pivot a step ahead, as a division takes long. Returns the status.
struct Pivots {
    static constexpr int R = K / 16;
    double *row, *ahead, *size, *sign, *inverses;  // [2, K], [2], [K] each; the last |p|^-1

    __device__ __forceinline__ explicit Pivots(SharedMemory& memory) {
        row = memory.take<double>(2 * K);
        ahead = memory.take<double>(2);
        size = memory.take<double>(K);
        sign = memory.take<double>(K);
        inverses = memory.take<double>(K);
    }
    static void count(SharedSize& bytes) {
        bytes.add(sizeof(double), 2 * K).add(sizeof(double), 2);
        for (int i = 0; i < 3; ++i) bytes.add(sizeof(double), K);
    }
    // Publishes for step j, which is in block m of rows and columns.
    __device__ __forceinline__ void publish(const double (&s)[R][R], int m, int x, int y, int j) const {
        double* next = row + j % 2 * K;
        const int at = j - 16 * m;
        if (x == at) {
#pragma unroll
            for (int a = m; a < R; ++a)
                if (a > m || y >= at) next[y + 16 * a] = s[a][m];
        }
        if (y == at) {
#pragma unroll
            for (int b = 0; b <= m; ++b)
                if (b < m || x < at) next[x + 16 * b] = s[m][b];
        }
        if (x == y && x == (at + 1) % 16) {
            if (at < 15)
                ahead[j % 2] = s[m][m];
            else if (m + 1 < R)
                ahead[j % 2] = s[m + 1 < R ? m + 1 : m][m + 1 < R ? m + 1 : m];
        }
    }
    __device__ __forceinline__ int eliminate(double (&s)[R][R], double doubt) const {
        const int x = int(threadIdx.x) % 16, y = int(threadIdx.x) / 16;
        publish(s, 0, x, y, 0);
        sync_block();  // the first column is there
        double pivot = row[0];
        int status = judge_pivot(sign[0], size[0], doubt, pivot);
        double inverse = 1 / pivot;
#pragma unroll
        for (int m = 0; m < R; ++m)  // columns 16 m ... of which R - m blocks of rows are left
#pragma unroll 1
            for (int j = 16 * m; j < 16 * m + 16 && status == kUpdated; ++j) {  // every thread sees the same
                if (j > 0) sync_block();  // this column is there, and the one before the last may be overwritten
                const double* now = row + j % 2 * K;
                if (threadIdx.x == 0) inverses[j] = inverse < 0 ? -inverse : inverse;
                double scaled[R], other[R];
#pragma unroll
                for (int a = m; a < R; ++a) scaled[a] = a > m || y + 16 * a > j ? now[y + 16 * a] * -inverse : 0;
#pragma unroll
                for (int b = 0; b < R; ++b) other[b] = now[x + 16 * b];
                if (j + 1 < K) {
                    pivot = multiply_add(-now[j + 1] * inverse, now[j + 1], ahead[j % 2]);
                    status = judge_pivot(sign[j + 1], size[j + 1], doubt, pivot);
                    inverse = 1 / pivot;
                }
#pragma unroll
                for (int a = m; a < R; ++a)
#pragma unroll
                    for (int b = 0; b <= a; ++b) {
                        s[a][b] = multiply_add(scaled[a], other[b], s[a][b]);
                        // of L^-1 there is nothing yet in column j
                        if (b == m && x + 16 * b == j && (a > m || y + 16 * a > j)) s[a][b] = scaled[a];
                    }
                if (j < 16 * m + 15)
                    publish(s, m, x, y, j + 1);
                else if (m + 1 < R)
                    publish(s, m + 1 < R ? m + 1 : m, x, y, j + 1);
            }
        return status;
    }
};

// A block of threads for each panel from this one on: all work out the pivots, the first keeps them, the others what
// couples their panel to this one.
template <class T>
__global__ void __launch_bounds__(kFactorThreads) factor_kernel(Index first_block, Large<T> w, int panel, int panels) {
    constexpr int R = K / 16, pitch = K + 1;
    SharedMemory memory;
    const Pivots pivots(memory);
    T* l = memory.take<T>(K * pitch);
    T* product = memory.take<T>(K * pitch);
    T* roots = memory.take<T>(K);  // |p|^-1/2
    const Index block = first_block + blockIdx.x, later = panels - panel, p = block / later, b = panel + block % later;
    const int x = int(threadIdx.x) % 16, y = int(threadIdx.x) / 16;
    if (sync_block_any(w.skipped(p))) return;  // another block may be writing it
    const double* from = w.s + (p * w.panels + panel) * w.chunks * K * K;
    for (int i = int(threadIdx.x); i < K; i += kFactorThreads) {
        pivots.sign[i] = w.sign[p * w.side + panel * K + i];
        pivots.size[i] = sum_of_chunks(w, from + i * K + i);
    }
    sync_block();  // sizes and signs are there
    double s[R][R];
#pragma unroll
    for (int i = 0; i < R; ++i)
#pragma unroll
        for (int k = 0; k <= i; ++k) {
            const int at_i = y + 16 * i, at_k = x + 16 * k;
            s[i][k] = at_k > at_i    ? 0
                      : at_k == at_i ? pivots.size[at_i] + pivots.sign[at_i]
                                     : sum_of_chunks(w, from + at_i * K + at_k);
        }
    const int status = pivots.eliminate(s, rounding<T>(w.g.d));
    if (status != kUpdated) {
        if (b == panel && threadIdx.x == 0) w.g.status[p] = status;
        return;
    }
    sync_block();  // all of the pivots are there
    if (threadIdx.x < K) roots[threadIdx.x] = square_root(T(pivots.inverses[threadIdx.x]));
    sync_block();  // the roots are there
    T* to = w.l + p * K * K;
#pragma unroll
    for (int i = 0; i < R; ++i)
#pragma unroll
        for (int k = 0; k < R; ++k) {
            const int at_i = y + 16 * i, at_k = x + 16 * k;
            const T unscaled = k > i || at_k > at_i ? T(0) : at_k == at_i ? T(1) : T(s[i][k < i ? k : i]);
            const T value = unscaled * roots[at_i];
            if (b == panel)
                to[at_i * K + at_k] = value;
            else
                l[at_i * pitch + at_k] = value;
        }
    if (b == panel) return;
    from = w.s + (p * w.panels + b) * w.chunks * K * K;
    for (int e = int(threadIdx.x); e < K * K; e += kFactorThreads)
        product[e / K * pitch + e % K] = T(sum_of_chunks(w, from + e));
    sync_block();  // L^-1 and V Y^T are there
    T sum[R][R] = {};
#pragma unroll 4
    for (int k = 0; k < K; ++k)
#pragma unroll
        for (int i = 0; i < R; ++i)
#pragma unroll
            for (int c = 0; c < R; ++c)
                sum[i][c] = multiply_add(product[k * pitch + y + 16 * i], l[(x + 16 * c) * pitch + k], sum[i][c]);
    to = w.coupling + (p * w.panels + b) * K * K;
#pragma unroll
    for (int i = 0; i < R; ++i)
#pragma unroll
        for (int c = 0; c < R; ++c) to[(y + 16 * i) * K + x + 16 * c] = sum[i][c];
}

}  // namespace

template <class T>
cudaError_t factor_panel(const Large<T>& w, int panel, int panels, void* stream) {
    SharedSize size;
    Pivots::count(size);
    size.add(sizeof(T), K * (K + 1)).add(sizeof(T), K * (K + 1)).add(sizeof(T), K);
    const Index later = panels - panel;
    const cudaError_t error = launch_over(small_product_kernel<T>, w.g.batch * later * w.chunks * (K * K / 16) * kWarp,
                                          kFactorThreads, stream, w, panel, panels);
    if (error != cudaSuccess) return error;
    return launch_in_turn(factor_kernel<T>, w.g.batch * later, kFactorThreads, size.bytes(), stream, w, panel, panels);
}

template cudaError_t factor_panel<float>(const Large<float>&, int, int, void*);
template cudaError_t factor_panel<double>(const Large<double>&, int, int, void*);

}  // namespace mtz::cuda
