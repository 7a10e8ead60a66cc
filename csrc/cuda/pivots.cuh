// The pivots of a panel of vectors, by a block of threads in shared memory: with S + D = L diag(p) L^T,
//
//     X = diag(|p|)^-1/2 L^-1        in blocks of 16 rows and columns, those above the diagonal left out
//
// For block m, between barriers:
//
//     A  one warp: the pivots of S_mm + D and N = X_mm
//     B  M_i = S_im N^T for the rows i below, and X_mj = N R_mj for the columns j before
//     C  S_ij -= M_i D M_j^T,  R_ij -= M_i D X_mj           R_ij begins as 0 and lies where S_ij is needed no longer
//
// Only A is one step after another, and takes no barrier.
#pragma once

#include <cmath>

#include "cuda/sherman_morrison.cuh"

namespace mtz::cuda {

constexpr int kPanel = 64;  // vectors of a panel

template <class T>
struct Pivots {
    static constexpr int kBlock = 16, kPitch = kPanel + 4, kBelow = kBlock + 4;
    T *s, *inverse, *below;  // [kPanel, kPitch] S, then what is left of it; [kPanel, kPitch] X; [kPanel, kBelow] M D
    T *sign, *size;          // [kPanel] each; size is S's diagonal
    int* status;

    template <class Taker>
    __host__ __device__ __forceinline__ void take(Taker& space) {
        s = space.template take<T>(kPanel * kPitch);
        inverse = space.template take<T>(kPanel * kPitch);
        below = space.template take<T>(kPanel * kBelow);
        sign = space.template take<T>(kPanel);
        size = space.template take<T>(kPanel);
        status = space.template take<int>(1);
    }

    // X of the first `blocks` blocks, the lower triangle of S given in blocks, those on the diagonal whole; the status, the
    // same for all threads. Starts and ends with a barrier.
    __device__ __forceinline__ int eliminate(int blocks, double doubt) const {
        const int thread = int(threadIdx.x), threads = int(blockDim.x);
        sync_block();  // S is there

        if (thread < kBlock)  // as only this thread reads them
            for (int m = 0; m < blocks; ++m) size[m * kBlock + thread] = s[(m * kBlock + thread) * (kPitch + 1)];
#pragma unroll 1
        for (int m = 0; m < blocks; ++m) {
            if (thread < kWarp) factor(m, doubt);
            sync_block();  // N is there
            if (*status != kUpdated) return *status;
#pragma unroll 1
            for (int e = thread; e < (blocks - 1) * kFours; e += threads) {
                const int b = e / kFours, c = e % kBlock, r = e % kFours / kBlock * 4;
                b < m ? before(m, b, r, c) : after(m, b + 1, r, c);
            }
            sync_block();  // M and X of this block are there
            const int done = (m + 1) * (m + 2) / 2;
#pragma unroll 1
            for (int e = thread; e < (blocks * (blocks + 1) / 2 - done) * kFours; e += threads) {
                const int b = e / kFours + done, i = b >= 6 ? 3 : b >= 3 ? 2 : 1;
                reduce(m, i, b - i * (i + 1) / 2, e % kFours / kBlock * 4, e % kBlock);
            }
            sync_block();  // S and R are without this block
        }
        return kUpdated;
    }

  private:
    static constexpr int kFours = kBlock * kBlock / 4;  // a thread works on four rows of a column
    static_assert(kPanel == 4 * kBlock);

    __device__ __forceinline__ void load(const T* from, T (&to)[kBlock]) const {
#pragma unroll
        for (int k = 0; k < kBlock; k += 4) {
            const Four<T> four = load_four(from + k);
#pragma unroll
            for (int e = 0; e < 4; ++e) to[k + e] = four.at[e];
        }
    }
    // sum[r] = sum_k a[r, k] b[k] of four rows, `pitch` apart
    __device__ __forceinline__ void multiply(const T* a, int pitch, const T (&b)[kBlock], T (&sum)[4]) const {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            T row[kBlock];
            load(a + r * pitch, row);
            sum[r] = 0;
#pragma unroll
            for (int k = 0; k < kBlock; ++k) sum[r] = multiply_add(row[k], b[k], sum[r]);
        }
    }

    // A: a row a lane, both halves of the warp the same. Step j takes row j out of the rows after it, and turns all rows by
    // one: what is left of S comes first, and N behind it, so that steps are alike and their loop is not unrolled, which
    // would let the compiler put shuffles one after another. Where a pivot is below 1 but may not be, by rounding, 1 stands
    // for it. Status is that of the first pivot that fails.
    __device__ __forceinline__ void factor(int m, double doubt) const {
        const int lane = int(threadIdx.x), i = lane % kBlock, at = m * kBlock + i;
        const T mine = sign[at], least = mine > 0 ? T(1) : -T(HUGE_VALF);
        T row[kBlock], pivot = 0;
        load(s + at * kPitch + m * kBlock, row);
#pragma unroll
        for (int k = 0; k < kBlock; ++k) row[k] += k == i ? mine : T(0);
#pragma unroll 1
        for (int j = 0; j < kBlock; ++j) {
            if (i == j) pivot = row[0];
            const T p = shuffle_from(larger_of(row[0], least), j);
            T other[kBlock];
#pragma unroll
            for (int k = 1; k < kBlock; ++k) other[k] = shuffle_from(row[k], j);
            const T factor = i > j ? row[0] * -reciprocal(p) : T(0);
#pragma unroll
            for (int k = 1; k < kBlock; ++k) row[k - 1] = multiply_add(factor, other[k], row[k]);
            row[kBlock - 1] = i == j ? T(1) : factor;
        }
        double p = double(pivot);
        const int judged = lane < kBlock ? judge_pivot(double(mine), double(size[at]), doubt, p) : int(kUpdated);
        const T root = inverse_root(T(p < 0 ? -p : p));
        if (lane < kBlock) {
#pragma unroll
            for (int k = 0; k < kBlock; k += 4) {
                T scaled[4];
#pragma unroll
                for (int e = 0; e < 4; ++e) scaled[e] = root * row[k + e];
                store_four(inverse + at * kPitch + m * kBlock + k, scaled);
            }
        }
        int worst = judged == kUpdated ? kBlock * 4 : i * 4 + judged;
#pragma unroll
        for (int mask = kBlock / 2; mask > 0; mask /= 2) {
            const int other = shuffle_xor(worst, mask);
            if (other < worst) worst = other;
        }
        if (lane == 0) *status = worst == kBlock * 4 ? int(kUpdated) : worst % 4;
    }

    // B: M D of block i
    __device__ __forceinline__ void after(int m, int i, int r, int c) const {
        T n[kBlock], sum[4];
        load(inverse + (m * kBlock + c) * kPitch + m * kBlock, n);
        multiply(s + (i * kBlock + r) * kPitch + m * kBlock, kPitch, n, sum);
        const T d = sign[m * kBlock + c];
#pragma unroll
        for (int e = 0; e < 4; ++e) below[(i * kBlock + r + e) * kBelow + c] = d * sum[e];
    }
    // and X of block j
    __device__ __forceinline__ void before(int m, int j, int r, int c) const {
        T column[kBlock], sum[4];
#pragma unroll
        for (int k = 0; k < kBlock; ++k) column[k] = s[(m * kBlock + k) * kPitch + j * kBlock + c];
        multiply(inverse + (m * kBlock + r) * kPitch + m * kBlock, kPitch, column, sum);
#pragma unroll
        for (int e = 0; e < 4; ++e) inverse[(m * kBlock + r + e) * kPitch + j * kBlock + c] = sum[e];
    }
    // C: block (i, j)
    __device__ __forceinline__ void reduce(int m, int i, int j, int r, int c) const {
        T other[kBlock], sum[4];
        if (j > m) {
            load(below + (j * kBlock + c) * kBelow, other);
#pragma unroll
            for (int k = 0; k < kBlock; ++k) other[k] *= sign[m * kBlock + k];
        } else {
#pragma unroll
            for (int k = 0; k < kBlock; ++k) other[k] = inverse[(m * kBlock + k) * kPitch + j * kBlock + c];
        }
        multiply(below + (i * kBlock + r) * kBelow, kBelow, other, sum);
        T* to = s + (i * kBlock + r) * kPitch + j * kBlock + c;
#pragma unroll
        for (int e = 0; e < 4; ++e) to[e * kPitch] = (j == m ? T(0) : to[e * kPitch]) - sum[e];
    }
};

}  // namespace mtz::cuda
