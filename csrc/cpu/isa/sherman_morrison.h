// The two ways of mtz/sherman_morrison.h; which one is used depends on d alone, so that neither threads nor the batch
// show in the result.
//
// Both take the vectors in blocks: Y [K, d] scaled by sqrt|w|, V = Y A^-1, S = D + V Y^T = L diag(p) L^T, V <- L^-1 V,
// U = -diag(1/p) V, and A^-1 += U^T V, upper triangle only, mirrored tile by tile.
#pragma once

#include "cpu/isa/pivots.h"

namespace mtz::cpu::MTZ_ISA {

constexpr Index kSmall = 256;  // up to here a matrix stays in one core's second-level cache

// Many small matrices: one thread a matrix, on a copy in cache through all its updates, in blocks of P vectors.
template <class T>
Index small_workspace(Index d);  // elements, a thread
template <class T>
int update_small(const ShermanMorrisonArgs& args, Index p, T* work);

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

// y[j] = sqrt|w| x[j], for one vector; the sign of w. The square root keeps both factors of w y y^T in range.
template <class T, class Store>
inline double scaled_vector(const ShermanMorrisonArgs& g, Index p, Index q, double w, Store&& put) {
    const T* x = static_cast<const T*>(g.vectors.data) + p * g.vectors.batch_stride + q * g.vectors.row_stride;
    const T root = T(__builtin_sqrt(w < 0 ? -w : w));
    for (Index j = 0; j < g.d; ++j) put(j, root * x[j * g.vectors.column_stride]);
    return w < 0 ? -1 : 1;
}

// Copies the upper triangle of a tile on the diagonal into the lower one.
template <class T>
inline void mirror_diagonal(T* tile, Index row) {
    for (Index i = 1; i < kPanel<T>; ++i)
        for (Index j = 0; j < i; ++j) tile[i * row + j] = tile[j * row + i];
}

}  // namespace mtz::cpu::MTZ_ISA
