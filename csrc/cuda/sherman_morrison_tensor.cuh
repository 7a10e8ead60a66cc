// Many small inverses on tensor cores: the products that a block of threads takes of matrices in shared memory. With
// g = lane / 4 and t = lane % 4, a lane takes 16 steps of the inner dimension in four slots, two for each of two steps of 8:
// columns 4 t to 4 t + 3 where they lie side by side, rows t, t + 4, t + 8 and t + 12 where they lie below each other.
//
// Rows are `pitch` apart, 16 more than a multiple of 32, and every other pair of them has its 8s of columns swapped. So
// lanes that load at a time do so from all banks, along rows (16 bytes, rows g) as well as down columns (rows t).
#pragma once

#include <cmath>

#include "cuda/pivots.cuh"

namespace mtz::cuda::tensor {

struct alignas(8) Two {
    float at[2];
};

__device__ __forceinline__ void split(const Four<float>& values, Tf32 (&to)[4]) {
#pragma unroll
    for (int e = 0; e < 4; ++e) to[e] = split_tf32(values.at[e]);
}

// Rows of tiles from First on, Together at a time, over sixteens begin to end - 1; a(chunk, m, half) and b(chunk, n) are a
// lane's four slots.
template <int First, int Together, int M, int N, class A, class B>
__device__ __forceinline__ void multiply_rows(Tile (&sum)[M][N], int begin, int end, A a, B b) {
#pragma unroll 1
    for (int c = begin; c < end; ++c) {
        Tf32 right[N][4];
#pragma unroll
        for (int n = 0; n < N; ++n) split(b(c, n), right[n]);
#pragma unroll
        for (int m = First; m < M; m += Together) {
            Tf32 left[Together][2][4];
#pragma unroll
            for (int e = 0; e < 2 * Together; ++e) split(a(c, m + e / 2, e % 2), left[e / 2][e % 2]);
            multiply_add<Together>(sum + m, left, right);
        }
    }
}
// Two rows of tiles, the first of them shorter
template <int N, class A, class B>
__device__ __forceinline__ void multiply_two(Tile (&sum)[2][N], int shorter, int longer, A a, B b) {
    multiply_rows<0, 2>(sum, 0, shorter, a, b);
    multiply_rows<1, 1>(sum, shorter, longer, a, b);
}

// This lane's two columns of row g, or g + 8, of a tile
__device__ __forceinline__ Two pair_of(const Tile& tile, int half) {
    return {{tile[2 * half], tile[2 * half + 1]}};
}

// kRows x kColumns tiles are a warp's part of the update, and two warps take kColumns tiles of V. kBlocks blocks of threads
// share a multiprocessor.
struct Narrow {
    static constexpr int kMost = 64, kPitch = 80, kRows = 1, kColumns = 2, kWarps = 8, kBlocks = 2;
};
struct Wide {  // for 144: 12 halves of strips and 12 parts of the update
    static constexpr int kMost = 144, kPitch = 144, kRows = 3, kColumns = 3, kWarps = 12, kBlocks = 1;
};

__host__ __device__ __forceinline__ int side_of(Index d) {
    return int(ceil_div(d, 16) * 16);
}
// Vectors of a panel: no more than rows, as what a panel loses to rounding grows with the ratio of A^-1 before and after it.
__host__ __device__ __forceinline__ int panel_of(Index d) {
    return int(smaller(larger(d / 16, 1) * 16, kPanel));
}

// A lane's view of a matrix, a panel and its pivots. Y is in one of two places and V goes to the other; the solved V to that
// of Y, and the next Y to that of V.
template <class Shape>
struct Lane {
    static constexpr int kBlock = Pivots<float>::kBlock, kPivotPitch = Pivots<float>::kPitch, kPitch = Shape::kPitch;
    static constexpr int N = Shape::kColumns;
    static_assert(kPitch % 32 == 16 && kPitch >= Shape::kMost);
    int side, panel, g, t;
    float *matrix, *vectors;  // [side, kPitch], 2 [panel, kPitch]
    float* root;              // [kPanel] of the weights, with their signs
    Pivots<float> pivots;

    __host__ __device__ __forceinline__ Lane(Index d, int thread)
        : side(side_of(d)), panel(panel_of(d)), g(thread % kWarp / 4), t(thread % 4) {}
    template <class Taker>
    __host__ __device__ __forceinline__ void take(Taker& space) {
        matrix = space.template take<float>(std::size_t(side) * kPitch);
        vectors = space.template take<float>(std::size_t(2) * panel * kPitch);
        root = space.template take<float>(kPanel);
        pivots.take(space);
    }

    __device__ __forceinline__ static int at(int i, int j) { return i * kPitch + (j ^ (i & 2) << 2); }
    __device__ __forceinline__ float* place(int which) const { return vectors + which * panel * kPitch; }
    // Slots along row i + g, i a multiple of 4
    __device__ __forceinline__ int along(int i) const { return at(i + g, 4 * t); }
    // Slots down column j + g, j a multiple of 8: the first of them, and all
    __device__ __forceinline__ int down(int j) const { return at(t, j + g); }
    __device__ __forceinline__ static Four<float> four_down(const float* from) {
        return {{from[0], from[4 * kPitch], from[8 * kPitch], from[12 * kPitch]}};
    }
    // Tile n of a strip; one beyond the end is taken twice, and not stored
    __device__ __forceinline__ int column(int strip, int n) const {
        const int j = 8 * (strip * N + n);
        return j < side ? j : side - 8;
    }

    // What one warp takes of V: blocks `pair` and 3 - pair of the vectors, a strip of columns. X is triangular: so both
    // pairs take as long. If there is one block only, it is the second.
    struct Part {
        int rows[2], strip;
        bool both;
        __device__ __forceinline__ Part(int blocks, int pair, int strip) : strip(strip) {
            both = 3 - pair < blocks;
            rows[0] = pair;
            rows[1] = both ? 3 - pair : pair;
        }
    };
    // Stores it, rows scaled by scale(row).
    template <class F>
    __device__ __forceinline__ void store(const Part& part, const Tile (&sum)[2][N], float* to, F scale) const {
        const int swapped = (g & 2) << 2;
#pragma unroll
        for (int m = 0; m < 2; ++m) {
            if (m == 0 && !part.both) continue;
            const int i = kBlock * part.rows[m] + g;
            const float scales[2] = {scale(i), scale(i + 8)};
#pragma unroll
            for (int n = 0; n < N; ++n) {
                const int j = 8 * (part.strip * N + n);
                if (j >= side) continue;
                float* at = to + i * kPitch + 2 * t + (j ^ swapped);
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const Two values = pair_of(sum[m][n], half);
                    *reinterpret_cast<Two*>(at + half * 8 * kPitch) = {
                        {scales[half] * values.at[0], scales[half] * values.at[1]}};
                }
            }
        }
    }

    // V = Y A^-1
    __device__ __forceinline__ void make_v(const Part& part, const float* y, float* v) const {
        const int left[2] = {along(kBlock * part.rows[0]), along(kBlock * part.rows[1])}, chunks = side / 16;
        int right[N];
#pragma unroll
        for (int n = 0; n < N; ++n) right[n] = along(column(part.strip, n));
        Tile sum[2][N] = {};
        multiply_two(
            sum, part.both ? chunks : 0, chunks,
            [&](int c, int m, int half) { return load_four(y + left[m] + half * 8 * kPitch + 16 * c); },
            [&](int c, int n) { return load_four(matrix + right[n] + 16 * c); });
        store(part, sum, v, [&](int q) { return std::fabs(root[q]); });
    }

    // Block e of the lower triangle of S = V Y^T
    __device__ __forceinline__ void make_s(int e, const float* y, const float* v) const {
        const int i = e >= 6 ? 3 : e >= 3 ? 2 : e >= 1 ? 1 : 0, j = e - i * (i + 1) / 2;
        const int left = along(kBlock * i), right = along(kBlock * j);
        Tile sum[1][2] = {};
        multiply_rows<0, 1>(
            sum, 0, side / 16, [&](int c, int, int half) { return load_four(v + left + half * 8 * kPitch + 16 * c); },
            [&](int c, int n) { return load_four(y + right + n * 8 * kPitch + 16 * c); });
        float* to = pivots.s + (kBlock * i + g) * kPivotPitch + kBlock * j + 2 * t;
#pragma unroll
        for (int n = 0; n < 2; ++n) {
            const float *of = root + kBlock * j + 8 * n + 2 * t, first = std::fabs(of[0]), second = std::fabs(of[1]);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const Two values = pair_of(sum[0][n], half);
                *reinterpret_cast<Two*>(to + half * 8 * kPivotPitch +
                                        8 * n) = {{first * values.at[0], second * values.at[1]}};
            }
        }
    }

    // X V
    __device__ __forceinline__ void solve(const Part& part, const float* v, float* to) const {
        int right[N];
#pragma unroll
        for (int n = 0; n < N; ++n) right[n] = down(column(part.strip, n));
        const float* x = pivots.inverse + g * kPivotPitch + t;
        Tile sum[2][N] = {};
        multiply_two(
            sum, part.both ? part.rows[0] + 1 : 0, part.rows[1] + 1,
            [&](int c, int m, int half) {
                const float* from = x + (kBlock * part.rows[m] + 8 * half) * kPivotPitch + 16 * c;
                return Four<float>{{from[0], from[4], from[8], from[12]}};
            },
            [&](int c, int n) { return four_down(v + right[n] + 16 * c * kPitch); });
        store(part, sum, to, [](int) { return 1.0f; });
    }

    // A^-1 -= V^T D V: tiles from row i0 and column j0 on
    __device__ __forceinline__ void update(int blocks, int i0, int j0, const float* v) const {
        constexpr int M = Shape::kRows;
        int left[M], right[N];
#pragma unroll
        for (int m = 0; m < M; ++m) left[m] = down(i0 + 16 * m < side ? i0 + 16 * m : side - 16);
#pragma unroll
        for (int n = 0; n < N; ++n) right[n] = down(j0 + 8 * n < side ? j0 + 8 * n : side - 8);
        const int eight = (t & 2) ? -8 : 8;  // columns on, which may have been swapped
        Tile sum[M][N] = {};
        multiply_rows<0, 1>(
            sum, 0, blocks,
            [&](int c, int m, int half) { return four_down(v + left[m] + half * eight + 16 * c * kPitch); },
            [&](int c, int n) {
                Four<float> values = four_down(v + right[n] + 16 * c * kPitch);
                const float* sign = pivots.sign + 16 * c + t;
#pragma unroll
                for (int e = 0; e < 4; ++e) values.at[e] *= -sign[4 * e];
                return values;
            });
        add_to_matrix(sum, i0, j0);
    }

  private:
    // Adds what is not below the diagonal, and stores its mirror image: columns in two orders, or lanes would store to the
    // same banks. Of an 8 x 8 part on the diagonal, lanes have two elements to add, one or none.
    __device__ __forceinline__ void add_to_matrix(const Tile (&sum)[Shape::kRows][N], int i0, int j0) const {
        const bool turned = t >= 2, both = g <= 2 * t, one = g == 2 * t + 1;
        const int first = 2 * t + turned, second = 2 * t + !turned, along = (g & 2) << 2, down = (t & 1) << 3;
        float *row = matrix + (i0 + g) * kPitch + 2 * t, *mirror = matrix + (j0 + first) * kPitch + i0 + g;
        const int other = (second - first) * kPitch;
#pragma unroll
        for (int m = 0; m < Shape::kRows; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half)
#pragma unroll
                for (int n = 0; n < N; ++n) {
                    const int i = 16 * m + 8 * half, j = 8 * n, above = (j0 + j) - (i0 + i);
                    if (above < 0 || i0 + i >= side || j0 + j >= side) continue;
                    const bool all = above > 0;
                    Two* to = reinterpret_cast<Two*>(row + i * kPitch + (j0 + j ^ along));
                    Two values = pair_of(sum[m][n], half);
                    if (all || both) {
                        const Two old = *to;
                        values = {{values.at[0] + old.at[0], values.at[1] + old.at[1]}};
                        *to = values;
                    } else if (one) {
                        to->at[1] = values.at[1] += to->at[1];
                    }
                    float* turned_to = mirror + j * kPitch + 16 * m + (8 * half ^ down);
                    if (all || g < first) *turned_to = turned ? values.at[1] : values.at[0];
                    if (all || g < second) turned_to[other] = turned ? values.at[0] : values.at[1];
                }
    }
};

}  // namespace mtz::cuda::tensor
