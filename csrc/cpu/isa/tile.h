// The one inner loop of all kernels: a square tile of sums over k,
//
//     Product       tile[i, j] += sum_k a[k, i] * b[k, j]
//     Difference    tile[i, j] += sum_k (a[k, i] - b[k, j])^2
//
// a and b are panels: P neighbouring numbers (64 bytes) for every k. k runs through three nested loops, so that it can be
// a window of an image as well as a range. On Zen 4 subtractions and multiply-adds have pipes of their own and the two
// kinds of tile take the same time; elsewhere differences cost two instructions for one.
#pragma once

#include "cpu/isa/simd.h"

namespace mtz::cpu::MTZ_ISA {

// Width of a panel and side of a tile: one cache line.
template <class T>
constexpr int kPanel = 64 / int(sizeof(T));

// Rows of a tile kept in registers at a time: with AVX-512 all.
#if defined(__AVX512F__)
template <class T>
constexpr int kRegisterRows = kPanel<T>;
#elif defined(__AVX__) || defined(__ARM_NEON)
template <class T>
constexpr int kRegisterRows = 4;
#else
template <class T>
constexpr int kRegisterRows = 2;
#endif

struct Product {};
struct Difference {};

// k = 0 ... count[0] * count[1] * count[2] - 1; a step of loop l moves a by a[l] elements and b by b[l], innermost last.
struct Walk {
    Index count[3], a[3], b[3];
};

inline Walk straight(Index count, Index a_step, Index b_step) {
    return {{1, 1, count}, {0, 0, a_step}, {0, 0, b_step}};
}

template <class T, class Op>
inline void tile_rows(const T* a, const T* b, const Walk& walk, T* tile, Index tile_row) {
    constexpr int vectors = kPanel<T> / Simd<T>::kLanes;
    Vector<T> sum[kRegisterRows<T>][vectors] = {};
    const Index a_step = walk.a[2], b_step = walk.b[2];
    for (Index l0 = 0; l0 < walk.count[0]; ++l0)
        for (Index l1 = 0; l1 < walk.count[1]; ++l1) {
            const T* ak = a + l0 * walk.a[0] + l1 * walk.a[1];
            const T* bk = b + l0 * walk.b[0] + l1 * walk.b[1];
            for (Index l2 = 0; l2 < walk.count[2]; ++l2) {
                Vector<T> bv[vectors];
#pragma GCC unroll 4
                for (int v = 0; v < vectors; ++v) bv[v] = load(bk + v * Simd<T>::kLanes);
#pragma GCC unroll 16
                for (int i = 0; i < kRegisterRows<T>; ++i)
#pragma GCC unroll 4
                    for (int v = 0; v < vectors; ++v) {
                        if constexpr (std::is_same_v<Op, Difference>) {
                            const Vector<T> e = bv[v] - ak[i];
                            sum[i][v] += e * e;
                        } else {
                            sum[i][v] += bv[v] * ak[i];
                        }
                    }
                ak += a_step;
                bk += b_step;
            }
        }
#pragma GCC unroll 16
    for (int i = 0; i < kRegisterRows<T>; ++i)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) {
            T* t = tile + i * tile_row + v * Simd<T>::kLanes;
            store(t, load(t) + sum[i][v]);
        }
}

// tile is [P, P], its rows tile_row elements apart.
template <class T, class Op>
inline void add_tile(const T* a, const T* b, const Walk& walk, T* tile, Index tile_row = kPanel<T>) {
    for (int i = 0; i < kPanel<T>; i += kRegisterRows<T>)
        tile_rows<T, Op>(a + i, b, walk, tile + i * tile_row, tile_row);
}

// tile[i, j] = sum_k a[i, k] * b[k, j] for the rows i of one panel of a symmetric matrix of which the upper triangle of
// tiles is right: the first `above` elements of a row are read as a column. `column` is the top of the panel's columns,
// rows `row` elements apart; b is [count, P] and tile [P, P].
template <class T>
inline void tile_of_symmetric(const T* column, Index row, Index above, const T* b, Index count, T* tile) {
    constexpr int P = kPanel<T>, vectors = P / Simd<T>::kLanes, rows = kRegisterRows<T>;
    static_assert(rows % 2 == 0);
    for (int i0 = 0; i0 < P; i0 += rows) {
        Vector<T> sum[rows][vectors] = {};
        const auto add = [&](const T* bk, auto&& a) {
            Vector<T> bv[vectors];
#pragma GCC unroll 4
            for (int v = 0; v < vectors; ++v) bv[v] = load(bk + v * Simd<T>::kLanes);
#pragma GCC unroll 16
            for (int i = 0; i < rows; ++i)
#pragma GCC unroll 4
                for (int v = 0; v < vectors; ++v) sum[i][v] += bv[v] * a(i);
        };
        for (Index k = 0; k < above; ++k) add(b + k * P, [&](int i) { return column[k * row + i0 + i]; });
        constexpr int heads = rows % 4 == 0 ? rows / 4 : 1, each = rows / heads;  // few addresses for many rows
        const T* head[heads];
#pragma GCC unroll 4
        for (int h = 0; h < heads; ++h) head[h] = column + (above + i0 + h * each) * row;
        for (Index k = above; k < count; ++k)
            add(b + k * P, [&](int i) { return head[i / each][i % each * row + k - above]; });
#pragma GCC unroll 16
        for (int i = 0; i < rows; ++i)
#pragma GCC unroll 4
            for (int v = 0; v < vectors; ++v) store(tile + (i0 + i) * P + v * Simd<T>::kLanes, sum[i][v]);
    }
}

// to[j, i] = from[i, j], both [P, P] with rows from_row and to_row elements apart; they may be the same.
template <class T>
inline void transpose_tile(const T* from, Index from_row, T* to, Index to_row) {
    constexpr int lanes = Simd<T>::kLanes, blocks = kPanel<T> / lanes;
    Vector<T> all[blocks][blocks][lanes];
#pragma GCC unroll 4
    for (int r = 0; r < blocks; ++r)
#pragma GCC unroll 4
        for (int c = 0; c < blocks; ++c) {
#pragma GCC unroll 16
            for (int i = 0; i < lanes; ++i) all[r][c][i] = load(from + (r * lanes + i) * from_row + c * lanes);
            transpose<T>(all[r][c]);
        }
#pragma GCC unroll 4
    for (int r = 0; r < blocks; ++r)
#pragma GCC unroll 4
        for (int c = 0; c < blocks; ++c)
#pragma GCC unroll 16
            for (int i = 0; i < lanes; ++i) store(to + (c * lanes + i) * to_row + r * lanes, all[r][c][i]);
}

}  // namespace mtz::cpu::MTZ_ISA
