// Many small inverses: what one block of threads does to a matrix in shared memory. For block b of K vectors, with V_b, S_b
// and E_b = V_b Y_b+1^T there and the matrix still without it, between barriers:
//
//     A  one warp: L diag(p) L^T of S_b.  The others: U = Y_b+1 A^-1, while block b + 2 comes into shared memory
//     B  V_b, E_b <- diag(|p|)^-1/2 L^-1 (V_b, E_b); the vectors of block b + 2 are turned for A
//     C  A^-1 -= V_b^T D V_b;  V_b+1 = U - E_b^T D V_b, since U was taken without V_b
//     D  S_b+1, E_b+1
//
// So the pivots, which are one after another in one warp, are worked out beside the largest product, and nothing waits for
// them unless they take longer. The matrix is read by 16-byte words, one for 10 to 12 multiply-adds.
//
// The pitch of the matrix is an odd number of 16-byte words: the same words of rows next to each other lie in other banks.
#pragma once

#include "cuda/sherman_morrison_resident.cuh"

namespace mtz::cuda::small {

constexpr int K = 16;       // vectors at a time
constexpr int kSplits = 8;  // of the inner dimension, among lanes
constexpr int kKept = 4;    // blocks whose weights are kept

template <class T>
constexpr int kMostWarps = sizeof(T) == 4 ? 19 : 12;  // what registers allow

template <class T>
__device__ __forceinline__ void swap_if(bool condition, T& a, T& b) {
    const T first = condition ? b : a, second = condition ? a : b;
    a = first;
    b = second;
}

template <class T>
struct Layout {
    int side, pitch;  // d padded to a multiple of 8; a row of the matrix
    int row, four;    // a row of V, which E follows; four vectors, turned
    int warps;        // the last of them takes the pivots
    __host__ __device__ explicit Layout(int padded)
        : side(padded),
          pitch(side + 4),
          row(side + K),
          four(4 * side + 8),
          warps(int(smaller(side / 8 + 1, kMostWarps<T>))) {}
};

__host__ __device__ __forceinline__ int side_of(Index d) {
    return int(ceil_div(d, 8) * 8);
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

// Sums of N values over lanes, one of which is `mask` away: each step halves the values a lane keeps, until Left are left.
// A lane with the bit of `mask` keeps the upper half.
template <int N, int Left, class T>
__device__ __forceinline__ void add_lanes(T* values, int lane, int mask) {
    if constexpr (N > Left) {
        const bool upper = (lane & mask) != 0;
#pragma unroll
        for (int e = 0; e < N / 2; ++e) {
            const T kept = upper ? values[e + N / 2] : values[e], sent = upper ? values[e] : values[e + N / 2];
            values[e] = kept + shuffle_xor(sent, mask);
        }
        add_lanes<N / 2, Left>(values, lane, mask / 2);
    }
}

template <class T>
struct Block {
    Layout<T> at;
    int thread;
    T *matrix, *raw, *yt, *v,
        *minus;              // [side, pitch], 2 [K, side], [4, four] = [4][side, 4], 2 [K, row], [K, row] = -D V
    T *s, *l, *root, *sign;  // [K, K + 1], [K, K] columns of L, [4, K] each
    double* doubt;
    int* status;

    template <class Taker>
    __host__ __device__ __forceinline__ void take(Taker& space) {
        const std::size_t side = std::size_t(at.side);
        matrix = space.template take<T>(side * at.pitch);
        raw = space.template take<T>(2 * K * side);
        yt = space.template take<T>(std::size_t(4) * at.four);
        v = space.template take<T>(std::size_t(2) * K * at.row);
        minus = space.template take<T>(std::size_t(K) * at.row);
        s = space.template take<T>(K * (K + 1));
        l = space.template take<T>(K * K);
        root = space.template take<T>(kKept * K);
        sign = space.template take<T>(kKept * K);
        doubt = space.template take<double>(1);
        status = space.template take<int>(1);
    }
    __host__ __device__ __forceinline__ Block(int side, int thread) : at(side), thread(thread) {}

    __device__ __forceinline__ T* v_of(int b) const { return v + b % 2 * K * at.row; }
    __device__ __forceinline__ T* raw_of(int b) const { return raw + b % 2 * K * at.side; }
    __device__ __forceinline__ T* root_of(int b) const { return root + b % kKept * K; }
    __device__ __forceinline__ T* sign_of(int b) const { return sign + b % kKept * K; }

    // Four vectors, scaled, side by side
    __device__ __forceinline__ void turn(int b, int first, int step) const {
        int c = 0, j = first;
#pragma unroll 1
        for (;; j += step) {
            while (j >= at.side) j -= at.side, ++c;
            if (c >= K / 4) return;
            const T *from = raw_of(b) + 4 * c * at.side + j, *roots = root_of(b) + 4 * c;
            T values[4];
#pragma unroll
            for (int q = 0; q < 4; ++q) values[q] = roots[q] * from[q * at.side];
            store_four(yt + c * at.four + 4 * j, values);
        }
    }

    // V[q, j] = sum_i Y[q, i] A^-1[i, j]: 8 vectors and 4 columns a thread, 16 columns and all vectors a warp, whose lanes
    // share the rows i. The two groups of columns are such that lanes that load at a time do so from all banks.
    __device__ __forceinline__ void multiply(int b, int warp, int warps) const {
        const int lane = thread % kWarp, half = lane % 2, split = lane / 4;
        T* to = v_of(b);
        for (int w = warp; w < at.side / 8; w += warps) {
            const int second = lane / 2 % 2, octets = at.side / 32;
            const int j = 4 * (w < 4 * octets ? w / 4 * 8 + w % 4 + 4 * second : 2 * w + second);
            const T *row = matrix + split * at.pitch + j, *y = yt + 2 * half * at.four + 4 * split;
            T sum[32] = {};
#pragma unroll 2
            for (int i = 0; i < at.side; i += kSplits) {
                const Four<T> x = load_four(row + i * at.pitch);
                const Four<T> y0 = load_four(y + 4 * i), y1 = load_four(y + at.four + 4 * i);
#pragma unroll
                for (int q = 0; q < 4; ++q)
#pragma unroll
                    for (int c = 0; c < 4; ++c) {
                        sum[4 * q + c] = multiply_add(y0.at[q], x.at[c], sum[4 * q + c]);
                        sum[16 + 4 * q + c] = multiply_add(y1.at[q], x.at[c], sum[16 + 4 * q + c]);
                    }
            }
            add_lanes<32, 4>(sum, lane, 16);
            const int q = 8 * half + (lane & 16 ? 4 : 0) + (lane & 8 ? 2 : 0) + (lane & 4 ? 1 : 0);
            store_four(to + q * at.row + j, sum);
        }
    }

    // The lower triangle of S_b, and E_b if there is a block after it: 4 x 4 of them for 8 lanes, which share the columns
    __device__ __forceinline__ void small_products(int b, bool next) const {
        constexpr int n = K / 4, lower = n * (n + 1) / 2;
        const int lane = thread % 8, groups = int(blockDim.x) / 8;
        const T* left = v_of(b);
        for (int first = 0; first < lower + (next ? n * n : 0); first += groups) {
            const int e = first + thread / 8;
            const bool ahead = e >= lower, any = e < lower + (next ? n * n : 0);
            int q = 0, r = 0;
            if (ahead)
                q = (e - lower) / n % n, r = (e - lower) % n;
            else
                triangle(e, n, r, q);
            const T *x = left + 4 * q * at.row, *y = raw_of(b + ahead) + 4 * r * at.side;
            T sum[16] = {};
#pragma unroll 1
            for (int i = 4 * lane; i < (any ? at.side : 0); i += 32) {
                Four<T> vs[4];
#pragma unroll
                for (int a = 0; a < 4; ++a) vs[a] = load_four(x + a * at.row + i);
#pragma unroll
                for (int c = 0; c < 4; ++c) {
                    const Four<T> ys = load_four(y + c * at.side + i);
#pragma unroll
                    for (int a = 0; a < 4; ++a)
#pragma unroll
                        for (int k = 0; k < 4; ++k)
                            sum[4 * a + c] = multiply_add(vs[a].at[k], ys.at[k], sum[4 * a + c]);
                }
            }
            add_lanes<16, 2>(sum, lane, 4);
            if (!any) continue;
            const int a = lane / 2, c = lane % 2 * 2;
            const T* roots = root_of(b + ahead) + 4 * r + c;
            T* to = ahead ? v_of(b) + (4 * q + a) * at.row + at.side : s + (4 * q + a) * (K + 1);
#pragma unroll
            for (int k = 0; k < 2; ++k) to[4 * r + c + k] = sum[k] * roots[k];
        }
    }

    // L diag(p) L^T of S_b + D by a warp, a row a lane, which has the whole of its row: column j of the others is row j of
    // lane j. Writes L with |p|^-1/2 as its diagonal, and the status: that of the first pivot that fails.
    __device__ __forceinline__ void factor(int b) const {
        const int lane = thread % kWarp, i = lane % K;
        const T mine = sign_of(b)[i], size = s[i * (K + 1) + i];
        T row[K], pivot = 0;
#pragma unroll
        for (int k = 0; k < K; ++k) row[k] = (k < i ? s[i * (K + 1) + k] : s[k * (K + 1) + i]) + (k == i ? mine : T(0));
#pragma unroll
        for (int j = 0; j < K; ++j) {
            if (i == j) pivot = row[j];
            const T p = shuffle_from(mine > 0 && row[j] < 1 ? T(1) : row[j], j), below = row[j] * reciprocal(p);
#pragma unroll
            for (int k = j + 1; k < K; ++k) row[k] = multiply_add(-below, shuffle_from(row[k], j), row[k]);
            if (lane < K && i != j) l[j * K + i] = i > j ? below : T(0);
        }
        double p = double(pivot);
        const int judged = judge_pivot(double(mine), double(size), *doubt, p);
        if (lane < K) l[i * K + i] = T(1) / square_root(T(p < 0 ? -p : p));
        int worst = judged == kUpdated ? K * 4 : i * 4 + judged;
#pragma unroll
        for (int mask = kWarp / 2; mask > 0; mask /= 2) {
            const int other = shuffle_xor(worst, mask);
            if (other < worst) worst = other;
        }
        if (lane == 0) *status = worst == K * 4 ? int(kUpdated) : worst % 4;
    }

    // A column of V_b and E_b
    __device__ __forceinline__ void solve(int b, int j) const {
        const T *from = v_of(b) + j, *signs = sign_of(b);
        T column[K];
#pragma unroll
        for (int q = 0; q < K; ++q) column[q] = from[q * at.row];
#pragma unroll
        for (int r = 0; r < K; ++r) {
            T below[K];
#pragma unroll
            for (int q = r / 4 * 4; q < K; q += 4) *reinterpret_cast<Four<T>*>(below + q) = load_four(l + r * K + q);
#pragma unroll
            for (int q = r + 1; q < K; ++q) column[q] = multiply_add(-below[q], column[r], column[q]);
            column[r] *= below[r];
        }
        T* to = v_of(b) + recomputed(j, b);
#pragma unroll
        for (int q = 0; q < K; ++q) to[q * at.row] = column[q];
        to = minus + recomputed(j, b);
#pragma unroll
        for (int q = 0; q < K; ++q) to[q * at.row] = -signs[q] * column[q];
    }

    // A^-1 -= V^T D V: tiles of 8 rows and 4 columns of the upper triangle, and their mirror images beyond the diagonal
    __device__ __forceinline__ void update(int b, int e) const {
        int i, j;
        if (!triangle(e / 2, at.side / 8, i, j)) return;
        const T *a = minus + 8 * i, *x = v_of(b) + 8 * j + e % 2 * 4;
        T* tile = matrix + 8 * i * at.pitch + 8 * j + e % 2 * 4;
        T sum[8][4];
#pragma unroll
        for (int r = 0; r < 8; ++r) *reinterpret_cast<Four<T>*>(sum[r]) = load_four(tile + r * at.pitch);
#pragma unroll 2
        for (int q = 0; q < K; ++q) {
            const Four<T> low = load_four(a + q * at.row), high = load_four(a + q * at.row + 4);
            const Four<T> right = load_four(x + q * at.row);
#pragma unroll
            for (int r = 0; r < 4; ++r)
#pragma unroll
                for (int c = 0; c < 4; ++c) {
                    sum[r][c] = multiply_add(low.at[r], right.at[c], sum[r][c]);
                    sum[4 + r][c] = multiply_add(high.at[r], right.at[c], sum[4 + r][c]);
                }
        }
#pragma unroll
        for (int r = 0; r < 8; ++r) store_four(tile + r * at.pitch, sum[r]);
        if (i == j) return;
        // Lanes next to each other are 4 rows of the mirror image apart, in one of two banks: so they store different
        // parts of it at a time.
        const int turn_r = j % 2 * 4, turn_c = j / 2 % 2 * 2;
#pragma unroll
        for (int r = 0; r < 8; ++r)
#pragma unroll
            for (int c = 0; c < 2; ++c) swap_if(turn_c != 0, sum[r][c], sum[r][c + 2]);
#pragma unroll
        for (int r = 0; r < 4; ++r)
#pragma unroll
            for (int c = 0; c < 4; ++c) swap_if(turn_r != 0, sum[r][c], sum[r + 4][c]);
        T* mirror = matrix + (8 * j + e % 2 * 4) * at.pitch + 8 * i;
#pragma unroll
        for (int c = 0; c < 4; ++c)
#pragma unroll
            for (int r = 0; r < 8; r += 4) {
                const T column[4] = {sum[r][c], sum[r + 1][c], sum[r + 2][c], sum[r + 3][c]};
                store_four(mirror + (c ^ turn_c) * at.pitch + (r ^ turn_r), column);
            }
    }

    // V_b+1 = U - E_b^T D V_b, 4 x 4 of it
    __device__ __forceinline__ void correct(int b, int q, int j) const {
        const T *e = v_of(b) + at.side + q, *x = minus + j;
        T *to = v_of(b + 1) + q * at.row + j, sum[4][4];
#pragma unroll
        for (int k = 0; k < 4; ++k) *reinterpret_cast<Four<T>*>(sum[k]) = load_four(to + k * at.row);
#pragma unroll 4
        for (int r = 0; r < K; ++r) {
            const Four<T> left = load_four(e + r * at.row), right = load_four(x + r * at.row);
#pragma unroll
            for (int k = 0; k < 4; ++k)
#pragma unroll
                for (int c = 0; c < 4; ++c) sum[k][c] = multiply_add(left.at[k], right.at[c], sum[k][c]);
        }
#pragma unroll
        for (int k = 0; k < 4; ++k) store_four(to + k * at.row, sum[k]);
    }
};

}  // namespace mtz::cuda::small
