// The tiles that large inverses are updated in: which there are, and how one is added to the matrix.
#pragma once

#include "cuda/sherman_morrison_large.cuh"

namespace mtz::cuda {

// Tiles of the upper triangle: in row i those from Step i on, of `columns`. Row i is followed by row rows - 1 - i, so that
// both together are of the same number.
template <int Step>
struct Triangle {
    Index rows, columns, both;
    __host__ __device__ explicit Triangle(Index d, int tall)
        : rows(ceil_div(d, tall)), columns(ceil_div(d, K)), both(2 * columns - Step * (rows - 1)) {}
    __host__ __device__ Index count() const { return (rows + 1) / 2 * both; }
    // False for what a middle row that stands alone lacks.
    __device__ __forceinline__ bool at(Index e, Index& i, Index& j) const {
        i = e / both;
        j = e % both + Step * i;
        if (j < columns) return true;
        j -= columns;
        const bool apart = 2 * i != rows - 1;
        i = rows - 1 - i;
        j += Step * i;
        return apart;
    }
};
// Brings a tile nearer, which add_to_matrix() will read.
template <class P, class T>
__device__ __forceinline__ void prefetch_tile(const T* matrix, Index row, Index d, Index i0, Index j0) {
    constexpr int line = 128 / sizeof(T);
    for (int e = int(threadIdx.x); e < P::kRows * K / line; e += P::kThreads) {
        const Index i = i0 + e / (K / line), j = j0 + e % (K / line) * line;
        if (i < d && j < d) prefetch(matrix + i * row + j);
    }
}

// Adds a tile of the upper triangle to a matrix of d rows, `row` apart, and writes its mirror image. Words of four rows and
// columns where all are there; others, at the diagonal and at the end, one by one. What is read at all is on its way at once,
// as far as registers go.
template <bool Words, class P, class T, int Columns>
__device__ __forceinline__ void add_to_matrix(T* matrix, Index row, Index d, Index i0, Index j0,
                                              const T (&sum)[4][Columns]) {
    constexpr int parts = Columns / 4, together = Words && sizeof(T) == 4 ? parts : 1;
    const Index i = i0 + P::row();
    const auto each = [&](Index j, auto f) {
#pragma unroll
        for (int r = 0; r < 4; ++r)
#pragma unroll
            for (int e = 0; e < 4; ++e)
                if (i + r <= j + e && j + e < d) f(r, e);
    };
#pragma unroll
    for (int first = 0; first < parts; first += together) {
        bool whole[together];
        Four<T> values[together][4];
#pragma unroll
        for (int c = 0; c < together; ++c) {
            const Index j = j0 + P::column(first + c);
            const T* from = matrix + i * row + j;
            whole[c] = Words && i < j && j + 4 <= d;
            if (whole[c]) {
#pragma unroll
                for (int r = 0; r < 4; ++r) values[c][r] = load_four(from + r * row);
            } else {
                each(j, [&](int r, int e) { values[c][r].at[e] = from[r * row + e]; });
            }
        }
#pragma unroll
        for (int c = 0; c < together; ++c) {
            const Index j = j0 + P::column(first + c);
            T *to = matrix + i * row + j, *mirror = matrix + j * row + i;
#pragma unroll
            for (int r = 0; r < 4; ++r)
#pragma unroll
                for (int e = 0; e < 4; ++e) values[c][r].at[e] += sum[r][4 * (first + c) + e];
            if (whole[c]) {
#pragma unroll
                for (int r = 0; r < 4; ++r) store_global(to + r * row, values[c][r].at);
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const T turned[4] = {values[c][0].at[e], values[c][1].at[e], values[c][2].at[e],
                                         values[c][3].at[e]};
                    store_global(mirror + e * row, turned);
                }
            } else {
                each(j, [&](int r, int e) { to[r * row + e] = mirror[e * row + r] = values[c][r].at[e]; });
            }
        }
    }
}

}  // namespace mtz::cuda
