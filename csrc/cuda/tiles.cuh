// Products of float32 on tensor cores, by a warp in registers.
#pragma once

#include "cuda/intrinsics.cuh"

namespace mtz::cuda::tensor {

// 16 x 8 of a product
using Tile = float[4];

// sum += a b over sixteen steps: a's rows g and g + 8, b's columns g of each tile. Only these are summed by the hardware, in
// small terms first, as it truncates its sums; where there are few tiles, in two parts that do not wait for each other. Of
// four terms one is that of both small parts, which float32 would keep in part.
template <int M, int Terms = 3, int N>
__device__ __forceinline__ void multiply_add(Tile (*sum)[N], const Tf32 (&a)[M][2][4], const Tf32 (&b)[N][4]) {
    constexpr int parts = M * N <= 2 ? 2 : 1;
    Tile part[parts][M][N] = {};
#pragma unroll
    for (int term = Terms; term > 0; --term) {
        constexpr auto low = &Tf32::low, high = &Tf32::high;
        const auto of_a = term > 2 ? low : high, of_b = term % 2 ? high : low;
#pragma unroll
        for (int e = 0; e < 4; e += 2)
#pragma unroll
            for (int m = 0; m < M; ++m)
#pragma unroll
                for (int n = 0; n < N; ++n)
                    multiply_add_tf32(part[e / 2 % parts][m][n], a[m][0][e].*of_a, a[m][1][e].*of_a,
                                      a[m][0][e + 1].*of_a, a[m][1][e + 1].*of_a, b[n][e].*of_b, b[n][e + 1].*of_b);
    }
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                if constexpr (parts == 2) part[0][m][n][e] += part[1][m][n][e];
                sum[m][n][e] += part[0][m][n][e];
            }
}

// A lane's slots of sixteen steps, in its two rows of a and its columns of N tiles of b: a(row, step) and b(step, column),
// counted from the first ones of the lane.
template <int N, class A, class B>
__device__ __forceinline__ void load_split(Tf32 (&left)[1][2][4], Tf32 (&right)[N][4], A a, B b) {
#pragma unroll
    for (int e = 0; e < 8; ++e) left[0][e / 4][e % 4] = split_tf32(a(e / 4 * 8, e % 4 * 4));
#pragma unroll
    for (int e = 0; e < 4 * N; ++e) right[e / 4][e % 4] = split_tf32(b(e % 4 * 4, e / 4 * 8));
}

}  // namespace mtz::cuda::tensor
