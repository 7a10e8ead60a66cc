// The two ways of mtz/sherman_morrison.h; which one is used depends on d alone, so that neither threads nor the batch
// show in the result.
//
// Both take the vectors in blocks: Y [K, d] scaled by sqrt|w|, V = Y A^-1, S = D + V Y^T = L diag(p) L^T, V <- L^-1 V,
// U = -diag(1/p) V, and A^-1 += U^T V, upper triangle only, mirrored tile by tile.
#pragma once

#include "cpu/isa/pivots.h"

namespace mtz::cpu::MTZ_ISA {

constexpr Index kSmall = 256;  // up to here a matrix stays in one core's second-level cache

// Many small matrices: one thread a matrix, on a copy in cache through all its updates, in blocks of P vectors. `next` is
// the matrix that this thread will probably take next, brought into cache meanwhile; g.batch and more for none.
template <class T>
Index small_workspace(Index d);  // elements, a thread
template <class T>
int update_small(const ShermanMorrisonArgs& args, Index p, Index next, T* work);

// One large matrix at a time: all threads, in place, in blocks of up to kBlock vectors.
constexpr Index kBlock = 128;
template <class T>
Index large_workspace(const ShermanMorrisonArgs& args, int threads);  // elements
template <class T>
int update_large(const ShermanMorrisonArgs& args, Index p, int threads, T* work);

// Relative error of an inner product of d terms, with a margin.
template <class T>
inline double rounding(Index d) {
    const double eps = sizeof(T) == 4 ? 1.2e-7 : 2.3e-16;
    return 16 * eps * __builtin_sqrt(double(d));
}

// The next P vectors of an update, scaled: a panel y [d, P] with y[j, i] = sqrt|w_i| x_i[j], and the signs of the weights.
// The square root keeps both factors of w x x^T in range. Vectors that are missing are zero, of positive sign.
template <class T>
inline void next_vectors(const ShermanMorrisonArgs& g, Index p, VectorOrder& order, T* y, double* sign) {
    constexpr Index P = kPanel<T>, lanes = Simd<T>::kLanes;
    const T* x = static_cast<const T*>(g.vectors.data) + p * g.vectors.batch_stride;
    const T* rows[P];
    T root[P];
    bool scaled = false;
    for (Index i = 0; i < P; ++i) {
        Index q;
        double w;
        const bool more = order.next(q, w);
        rows[i] = more ? x + q * g.vectors.row_stride : nullptr;
        root[i] = more ? T(__builtin_sqrt(w < 0 ? -w : w)) : T(0);
        sign[i] = more && w < 0 ? -1 : 1;
        scaled |= root[i] != 1;
    }
    pack_panel_of<T>([&](Index i) { return rows[i]; }, g.vectors.column_stride, g.d, y);
    if (!scaled) return;
    for (Index c = 0; c < P; c += lanes) {
        const Vector<T> factor = load(root + c);
        for (Index j = 0; j < g.d; ++j) store(y + j * P + c, load(y + j * P + c) * factor);
    }
}

// Copies the upper triangle of a tile on the diagonal into the lower one.
template <class T>
inline void mirror_diagonal(T* tile, Index row) {
    constexpr Index P = kPanel<T>;
    T mirrored[P * P];
    transpose_tile(tile, row, mirrored, P);
    for (Index i = 0; i < P; ++i)
        for (Index j = 0; j < P; ++j) tile[i * row + j] = j < i ? mirrored[i * P + j] : tile[i * row + j];
}

}  // namespace mtz::cpu::MTZ_ISA
