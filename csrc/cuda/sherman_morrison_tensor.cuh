// Many small inverses on tensor cores: the products that a block of threads takes of matrices in shared memory. With
// g = lane / 4 and t = lane % 4, a lane takes 16 steps of the inner dimension in four slots, two for each of two steps of 8:
// columns 4 t to 4 t + 3 where they lie side by side, rows t, t + 4, t + 8 and t + 12 where they lie below each other.
//
// Rows are `pitch` apart, 16 more than a multiple of 32, and every other pair of them has its 8s of columns swapped. So
// lanes that load at a time do so from all banks, along rows (16 bytes, rows g) as well as down columns (rows t).
#pragma once

#include <cstring>

#include "cuda/pivots.cuh"

namespace mtz::cuda::tensor {

// As split_tf32 for values below 1e34 and NaN beyond, but on units that are idle: with 13 more bits than a float32 has for
// it, 8193 x loses as many of x.
__device__ __forceinline__ Tf32 split(float x) {
    const float high = multiply_add(x, -8192.0f, multiply_add(x, 8192.0f, x)), low = x - high;
    Tf32 result;
    std::memcpy(&result.high, &high, 4);
    std::memcpy(&result.low, &low, 4);
    return result;
}

struct alignas(8) Two {
    float at[2];
};

// 16 x 8 of a product
using Tile = float[4];

// Sixteen steps: a's rows g and g + 8, b's columns g of each tile. Only these are summed by the hardware, small terms first,
// as it truncates its sums.
template <int N>
__device__ __forceinline__ void multiply_add(Tile (&sum)[N], const Tf32 (&a)[2][4], const Tf32 (&b)[N][4]) {
    Tile part[N] = {};
#pragma unroll
    for (int e = 0; e < 4; e += 2)
#pragma unroll
        for (int n = 0; n < N; ++n)
            multiply_add_tf32(part[n], a[0][e].low, a[1][e].low, a[0][e + 1].low, a[1][e + 1].low, b[n][e].high,
                              b[n][e + 1].high);
#pragma unroll
    for (int e = 0; e < 4; e += 2)
#pragma unroll
        for (int n = 0; n < N; ++n)
            multiply_add_tf32(part[n], a[0][e].high, a[1][e].high, a[0][e + 1].high, a[1][e + 1].high, b[n][e].low,
                              b[n][e + 1].low);
#pragma unroll
    for (int e = 0; e < 4; e += 2)
#pragma unroll
        for (int n = 0; n < N; ++n)
            multiply_add_tf32(part[n], a[0][e].high, a[1][e].high, a[0][e + 1].high, a[1][e + 1].high, b[n][e].high,
                              b[n][e + 1].high);
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[n][e] += part[n][e];
}

// M x N tiles, row of tiles m over the first ends[m] of `chunks` sixteens; a(chunk, m, half, values) and
// b(chunk, n, values) bring a lane's four slots.
template <int M, int N, class A, class B>
__device__ __forceinline__ void multiply(Tile (&sum)[M][N], int chunks, const int (&ends)[M], A a, B b) {
#pragma unroll 1
    for (int c = 0; c < chunks; ++c) {
        Tf32 right[N][4];
#pragma unroll
        for (int n = 0; n < N; ++n) {
            const Four<float> values = b(c, n);
#pragma unroll
            for (int e = 0; e < 4; ++e) right[n][e] = split(values.at[e]);
        }
#pragma unroll
        for (int m = 0; m < M; ++m) {
            if (c >= ends[m]) continue;  // the same for the whole warp
            Tf32 left[2][4];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const Four<float> values = a(c, m, half);
#pragma unroll
                for (int e = 0; e < 4; ++e) left[half][e] = split(values.at[e]);
            }
            multiply_add(sum[m], left, right);
        }
    }
}

// f(m, n, half, values) of this lane's two columns of rows g and g + 8 of each tile
template <int M, int N, class F>
__device__ __forceinline__ void for_each_pair(const Tile (&sum)[M][N], F f) {
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
            for (int half = 0; half < 2; ++half)
                f(m, n, half, Two{{sum[m][n][2 * half], sum[m][n][2 * half + 1]}});
}

__host__ __device__ __forceinline__ int side_of(Index d) {
    return int(ceil_div(d, 16) * 16);
}

// A lane's view of a matrix, rows of vectors and pivots. A panel's vectors Y are in one of two places, V goes to the other;
// the solved V to that of Y, and the next Y to that of V.
struct Lane {
    static constexpr int kBlock = Pivots<float>::kBlock, kPitch = Pivots<float>::kPitch;
    int side, pitch, g, t;
    float *matrix, *vectors;  // [side, pitch], 2 [kPanel, pitch]
    float* root;              // [kPanel] of the weights, with their signs
    Pivots<float> pivots;

    __host__ __device__ __forceinline__ Lane(int side, int thread)
        : side(side), pitch(side + (side % 32 ? 0 : 16)), g(thread % kWarp / 4), t(thread % 4) {}
    template <class Taker>
    __host__ __device__ __forceinline__ void take(Taker& space) {
        matrix = space.template take<float>(std::size_t(side) * pitch);
        vectors = space.template take<float>(std::size_t(2) * kPanel * pitch);
        root = space.template take<float>(kPanel);
        pivots.take(space);
    }

    __device__ __forceinline__ int at(int i, int j) const { return i * pitch + (j ^ (i & 2) << 2); }
    __device__ __forceinline__ float* place(int which) const { return vectors + which * kPanel * pitch; }
    // Rows of 16 bytes: slots of row i + g, i a multiple of 4
    __device__ __forceinline__ int along(int i) const { return at(i + g, 4 * t); }
    // Columns: the first slot of column j + g
    __device__ __forceinline__ int down(int j) const { return at(t, j + g); }
    __device__ __forceinline__ Four<float> four_rows(const float* from) const {
        return {{from[0], from[4 * pitch], from[8 * pitch], from[12 * pitch]}};
    }

    // V = Y A^-1: blocks `pair` and 3 - pair of the vectors, N * 8 columns
    template <int N>
    __device__ __forceinline__ void make_v(int blocks, int pair, int strip, const float* y, float* v) const {
        if (pair >= blocks) return;
        const int rows[2] = {pair, 3 - pair}, chunks = side / 16, ends[2] = {chunks, rows[1] < blocks ? chunks : 0};
        const int left[2] = {along(kBlock * rows[0]), along(kBlock * rows[1])};
        int right[N];
#pragma unroll
        for (int n = 0; n < N; ++n) right[n] = along(int(smaller(8 * (strip * N + n), side - 8)));
        Tile sum[2][N] = {};
        multiply(
            sum, chunks, ends,
            [&](int c, int m, int half) { return load_four(y + left[m] + half * 8 * pitch + 16 * c); },
            [&](int c, int n) { return load_four(matrix + right[n] + 16 * c); });
        for_each_pair(sum, [&](int m, int n, int half, Two values) {
            const int q = kBlock * rows[m] + 8 * half + g, j = 8 * (strip * N + n) + 2 * t;
            if (ends[m] == 0 || j >= side) return;
            const float r = root[q], scale = r < 0 ? -r : r;
            *reinterpret_cast<Two*>(v + at(q, j)) = {{scale * values.at[0], scale * values.at[1]}};
        });
    }

    // Block e of the lower triangle of S = V Y^T
    __device__ __forceinline__ void make_s(int e, const float* y, const float* v) const {
        const int i = e >= 6 ? 3 : e >= 3 ? 2 : e >= 1 ? 1 : 0, j = e - i * (i + 1) / 2, chunks = side / 16;
        const int left = along(kBlock * i), right = along(kBlock * j), ends[1] = {chunks};
        Tile sum[1][2] = {};
        multiply(
            sum, chunks, ends, [&](int c, int, int half) { return load_four(v + left + half * 8 * pitch + 16 * c); },
            [&](int c, int n) { return load_four(y + right + n * 8 * pitch + 16 * c); });
        for_each_pair(sum, [&](int, int n, int half, Two values) {
            const int q = kBlock * i + 8 * half + g, r = kBlock * j + 8 * n + 2 * t;
            const float first = root[r], second = root[r + 1];
            *reinterpret_cast<Two*>(pivots.s + q * kPitch + r) = {{(first < 0 ? -first : first) * values.at[0],
                                                                   (second < 0 ? -second : second) * values.at[1]}};
        });
    }

    // X V: the same part of it that make_v makes, which takes as long for both pairs of blocks since X is triangular
    template <int N>
    __device__ __forceinline__ void solve(int blocks, int pair, int strip, const float* v, float* to) const {
        if (pair >= blocks) return;
        const int rows[2] = {pair, 3 - pair}, ends[2] = {rows[0] + 1, rows[1] < blocks ? rows[1] + 1 : 0};
        int right[N];
#pragma unroll
        for (int n = 0; n < N; ++n) right[n] = down(int(smaller(8 * (strip * N + n), side - 8)));
        const float* x = pivots.inverse + g * kPitch + t;
        Tile sum[2][N] = {};
        multiply(
            sum, ends[1] ? ends[1] : ends[0], ends,
            [&](int c, int m, int half) {
                const float* from = x + (kBlock * rows[m] + 8 * half) * kPitch + 16 * c;
                return Four<float>{{from[0], from[4], from[8], from[12]}};
            },
            [&](int c, int n) { return four_rows(v + right[n] + 16 * c * pitch); });
        for_each_pair(sum, [&](int m, int n, int half, Two values) {
            const int q = kBlock * rows[m] + 8 * half + g, j = 8 * (strip * N + n) + 2 * t;
            if (ends[m] != 0 && j < side) *reinterpret_cast<Two*>(to + at(q, j)) = values;
        });
    }

    // A^-1 -= V^T D V: M x N tiles from row i0 and column j0 on, what of them is not below the diagonal, and its mirror
    // image. Lanes store this in two orders, or two of them would store to one bank.
    template <int M, int N>
    __device__ __forceinline__ void update(int blocks, int i0, int j0, const float* v) const {
        int left[M], right[N], ends[M];
#pragma unroll
        for (int m = 0; m < M; ++m) {
            left[m] = down(int(smaller(i0 + 16 * m, side - 16)));
            ends[m] = blocks;
        }
#pragma unroll
        for (int n = 0; n < N; ++n) right[n] = down(int(smaller(j0 + 8 * n, side - 8)));
        const int half_on = (t & 2) ? -8 : 8;  // columns 8 on, which may have been swapped
        Tile sum[M][N] = {};
        multiply(
            sum, blocks, ends,
            [&](int c, int m, int half) { return four_rows(v + left[m] + half * half_on + 16 * c * pitch); },
            [&](int c, int n) {
                Four<float> values = four_rows(v + right[n] + 16 * c * pitch);
                const float* sign = pivots.sign + 16 * c + t;
#pragma unroll
                for (int e = 0; e < 4; ++e) values.at[e] *= -sign[4 * e];
                return values;
            });
        const bool turned = t >= 2;
        for_each_pair(sum, [&](int m, int n, int half, Two values) {
            const int i = i0 + 16 * m + 8 * half + g, j = j0 + 8 * n + 2 * t;
            if (i > j + 1 || i >= side || j >= side) return;
            Two* to = reinterpret_cast<Two*>(matrix + at(i, j));
            const Two old = *to;
            values.at[0] += old.at[0];
            values.at[1] += old.at[1];
            if (i <= j)
                *to = values;
            else
                to->at[1] = values.at[1];
            const int first = turned ? j + 1 : j, second = turned ? j : j + 1;
            if (i < first) matrix[at(first, i)] = turned ? values.at[1] : values.at[0];
            if (i < second) matrix[at(second, i)] = turned ? values.at[0] : values.at[1];
        });
    }
};

}  // namespace mtz::cuda::tensor
