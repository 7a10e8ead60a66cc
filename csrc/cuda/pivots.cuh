// The pivots of a panel of vectors, by a block of threads in shared memory: with S + D = L diag(p) L^T,
//
//     X = diag(|p|)^-1/2 L^-1        in blocks of 16 rows and columns, those above the diagonal left out
//
// For block m, between barriers:
//
//     A  one warp: S_mm without the block before, the pivots of S_mm + D and N = X_mm
//     B  M_i = S_im N^T for the rows i below, and X_mj = N R_mj for the columns j before
//     C  S_ij -= M_i D M_j^T,  R_ij -= M_i D X_mj           R_ij begins as 0 and lies where S_ij is needed no longer
//
// Only A is one step after another; the other warps do the rest of C meanwhile.
#pragma once

#include <cmath>

#include "cuda/sherman_morrison.cuh"
#include "cuda/tiles.cuh"

namespace mtz::cuda {

constexpr int kPanel = 64;  // vectors of a panel

template <class T>
struct Pivots {
    static constexpr int kBlock = 16, kPitch = kPanel + 4, kBelow = kBlock + 4;
    T *s, *inverse, *below;  // [kPanel, kPitch] S, then what is left of it; [kPanel, kPitch] X; [kPanel, kBelow] M
    T *sign, *size, *pivot;  // [kPanel] each; size is S's diagonal
    T *columns, *rows;       // [kBlock, 4], [4, kBlock]: what lanes of A tell each other
    T* least;                // [kBlock] that pivots may be
    int* status;

    template <class Taker>
    __host__ __device__ __forceinline__ void take(Taker& space) {
        s = space.template take<T>(kPanel * kPitch);
        inverse = space.template take<T>(kPanel * kPitch);
        below = space.template take<T>(kPanel * kBelow);
        sign = space.template take<T>(kPanel);
        size = space.template take<T>(kPanel);
        pivot = space.template take<T>(kPanel);
        columns = space.template take<T>(kBlock * 4);
        rows = space.template take<T>(kBlock * 4);
        least = space.template take<T>(kBlock);
        status = space.template take<int>(1);
    }

    // X of the first `blocks` blocks, the lower triangle of S given in blocks, those on the diagonal whole; the status, the
    // same for all threads. Starts and ends with a barrier. If a pivot fails, what follows from it is never looked at.
    __device__ __forceinline__ int eliminate(int blocks, double doubt) const {
        const int thread = int(threadIdx.x), warp = thread / kWarp, warps = int(blockDim.x) / kWarp;
        sync_block();  // S is there

        if (thread == 0) *status = kUpdated;
        if (thread < blocks * kBlock) size[thread] = s[thread * (kPitch + 1)];
#pragma unroll 1
        for (int m = 0; m < blocks; ++m) {
            const int done = m * (m + 1) / 2, left = m > 0 ? blocks * (blocks + 1) / 2 - done : 0;
#pragma unroll 1
            for (int e = warp; e < left; e += warp > 0 ? warps - 1 : left) {
                const int b = done + (e == 0 ? m : e <= m ? e - 1 : e), i = b >= 6 ? 3 : b >= 3 ? 2 : 1;
                reduce(m - 1, i, b - i * (i + 1) / 2);
            }
            if (warp == 0) {
                if (m > 0) sync_warp();  // S_mm is there
                factor(m);
            }
            sync_block();  // N is there, and S and R are without the block before
#pragma unroll 1
            for (int e = warp; e < 2 * (blocks - 1); e += warps)
                multiply_by_n(m, e / 2 < m ? e / 2 : e / 2 + 1, e % 2 * 8);
            const int last = thread - int(blockDim.x) + kPanel;  // those threads have nothing else to do
            if (m == blocks - 1 && last >= 0 && last < blocks * kBlock) judge(last, doubt);
            sync_block();  // M and X of this block are there
        }
        return *status % 4;
    }

  private:
    static_assert(kPanel == 4 * kBlock);

    // f(r, c, sum over k of a[r, k] b(k, c)) for 16 rows and 8 N columns, by a warp
    template <int N, class B, class F>
    __device__ __forceinline__ void multiply(const T* a, int pitch, B b, F f) const {
        const int lane = int(threadIdx.x) % kWarp;
        if constexpr (sizeof(T) == 4) {
            if (kTensorCores) {
                const int g = lane / 4, t = lane % 4;
                Tf32 left[1][2][4], right[N][4];
                tensor::load_split(
                    left, right, [&](int r, int k) { return a[(g + r) * pitch + t + k]; },
                    [&](int k, int c) { return b(t + k, g + c); });
                tensor::Tile sum[1][N] = {};
                tensor::multiply_add<1, 4>(sum, left, right);
#pragma unroll
                for (int e = 0; e < 4 * N; ++e) f(g + e % 4 / 2 * 8, e / 4 * 8 + 2 * t + e % 2, sum[0][e / 4][e % 4]);
                return;
            }
        }
        const int r = lane / 8 * 4, c = lane % 8;
        T sum[4][N] = {};
#pragma unroll
        for (int k = 0; k < kBlock; k += 4) {
            T right[4][N];
#pragma unroll
            for (int e = 0; e < 4 * N; ++e) right[e / N][e % N] = b(k + e / N, c + e % N * 8);
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const Four<T> row = load_four(a + (r + e) * pitch + k);
#pragma unroll
                for (int at = 0; at < 4 * N; ++at)
                    sum[e][at % N] = multiply_add(row.at[at / N], right[at / N][at % N], sum[e][at % N]);
            }
        }
#pragma unroll
        for (int e = 0; e < 4 * N; ++e) f(r + e / N, c + e % N * 8, sum[e / N][e % N]);
    }

    // A: a row and eight columns of it a lane, four pivots at a time. The rows of these come as they are before any of them
    // is taken out: of u = L^-1 rows, with L of the four pivots, m u is (m L^-1) rows. All lanes work out L for themselves.
    // Where a column of S is done, that of N takes its place. Lanes turn their columns by four, so that steps are alike.
    // Where a pivot is below 1 but may not be, by rounding, 1 stands for it.
    __device__ __forceinline__ void factor(int m) const {
        const int lane = int(threadIdx.x), i = lane % kBlock, half = lane / kBlock, at = m * kBlock + i;
        const int place = at * kPitch + m * kBlock + 8 * half;
        const T mine = sign[at];
        Four<T> first = load_four(s + place), second = load_four(s + place + 4), four[4], column, row[4][2], lowest;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            first.at[k] += i == 8 * half + k ? mine : T(0);
            second.at[k] += i == 8 * half + k + 4 ? mine : T(0);
        }
        const auto tell_columns = [&](int group) {
            if (half == group / 2) store_four(columns + 4 * i, first.at);
            sync_warp();  // columns are there, and all lanes have the rows before
#pragma unroll
            for (int q = 0; q < 4; ++q) four[q] = load_four(columns + 16 * (group % 4) + 4 * q);
            column = load_four(columns + 4 * i);
            lowest = load_four(least + 4 * (group % 4));
        };
        const auto tell_rows = [&](int group) {
            if (i / 4 == group) {
                store_four(rows + i % 4 * kBlock + 8 * half, first.at);
                store_four(rows + i % 4 * kBlock + 8 * half + 4, second.at);
            }
            sync_warp();  // rows are there, and all lanes have the columns
#pragma unroll
            for (int q = 0; q < 8; ++q) row[q / 2][q % 2] = load_four(rows + q / 2 * kBlock + 8 * half + q % 2 * 4);
        };
        if (half == 0) least[i] = mine > 0 ? T(1) : -T(HUGE_VALF);
        tell_columns(0);
        T own = 0;
#pragma unroll 1
        for (int group = 0; group < 4; ++group) {
            const int before = i - 4 * group;  // rows of the group
            T below[4][4], c[4];
#pragma unroll
            for (int q = 0; q < 4; ++q) {
                const T p = four[q].at[q];
                if (before == q) own = p;
                const T over = reciprocal(larger_of(p, lowest.at[q]));
#pragma unroll
                for (int k = q + 1; k < 4; ++k) {
                    below[k][q] = four[k].at[q] * over;
#pragma unroll
                    for (int e = q + 1; e < 4; ++e)
                        four[k].at[e] = multiply_add(-below[k][q], four[q].at[e], four[k].at[e]);
                }
                c[q] = before > q ? column.at[q] * -over : T(0);
#pragma unroll
                for (int e = q + 1; e < 4; ++e) column.at[e] = multiply_add(c[q], four[q].at[e], column.at[e]);
                if (q == 0) tell_rows(group);  // which are needed last
            }
#pragma unroll
            for (int q = 2; q >= 0; --q)
#pragma unroll
                for (int k = 3; k > q; --k) c[q] = multiply_add(-c[k], below[k][q], c[q]);
            Four<T> done = first;
            first = second;
#pragma unroll
            for (int q = 3; q >= 0; --q)
#pragma unroll
                for (int k = 0; k < 4; ++k) first.at[k] = multiply_add(c[q], row[q][1].at[k], first.at[k]);
            tell_columns(group + 1);
#pragma unroll
            for (int q = 3; q >= 0; --q)
#pragma unroll
                for (int k = 0; k < 4; ++k) done.at[k] = multiply_add(c[q], row[q][0].at[k], done.at[k]);
#pragma unroll
            for (int k = 0; k < 4; ++k) second.at[k] = half != group / 2 ? done.at[k] : before == k ? T(1) : c[k];
        }
        const T p = mine > 0 ? larger_of(own, T(1)) : -own, root = inverse_root(p);
#pragma unroll
        for (int k = 0; k < 4; ++k) first.at[k] *= root, second.at[k] *= root;
        store_four(inverse + place, first.at);
        store_four(inverse + place + 4, second.at);
        if (half == 0) pivot[at] = own;
    }

    // Status is that of the first pivot that fails: nothing after it means anything.
    __device__ __forceinline__ void judge(int at, double doubt) const {
        double p = double(pivot[at]);
        const int judged = judge_pivot(double(sign[at]), double(size[at]), doubt, p);
        if (judged != kUpdated) atomic_max(status, (kPanel - at) * 4 + judged);
    }

    // B: eight columns of M of a block below, or of X of one before
    __device__ __forceinline__ void multiply_by_n(int m, int block, int column) const {
        const T *n = inverse + m * kBlock * (kPitch + 1), *a = n,
                *b = s + m * kBlock * kPitch + block * kBlock + column;
        T* to = inverse + m * kBlock * kPitch + block * kBlock + column;
        int down = kPitch, along = 1, pitch = kPitch;
        if (block > m) {
            a = s + block * kBlock * kPitch + m * kBlock, b = n + column * kPitch;
            to = below + block * kBlock * kBelow + column;
            down = 1, along = kPitch, pitch = kBelow;
        }
        multiply<1>(
            a, kPitch, [&](int k, int c) { return b[k * down + c * along]; },
            [&](int r, int c, T sum) { to[r * pitch + c] = sum; });
    }

    // C: block (i, j)
    __device__ __forceinline__ void reduce(int m, int i, int j) const {
        const T *d = sign + m * kBlock,
                *b = j > m ? below + j * kBlock * kBelow : inverse + m * kBlock * kPitch + j * kBlock;
        const int down = j > m ? 1 : kPitch, along = j > m ? kBelow : 1;
        T* to = s + i * kBlock * kPitch + j * kBlock;
        multiply<2>(
            below + i * kBlock * kBelow, kBelow, [&](int k, int c) { return -d[k] * b[k * down + c * along]; },
            [&](int r, int c, T sum) { to[r * kPitch + c] = (j == m ? T(0) : to[r * kPitch + c]) + sum; });
    }
};

}  // namespace mtz::cuda
