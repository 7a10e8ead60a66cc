// Many small inverses: each is copied into cache, takes all its updates there and is copied back if they all succeed.
// In between only its upper triangle of tiles is right: the lower one costs a transpose a tile and block of vectors.
#include "cpu/isa/sherman_morrison.h"

namespace mtz::cpu::MTZ_ISA {
namespace {

template <class T>
struct Layout {
    Index d, panels, row;  // row: an odd number of panels, so that a column of panels meets all sets of the cache
    explicit Layout(Index d) : d(d), panels(ceil_div(d, kPanel<T>)), row((panels | 1) * kPanel<T>) {}
    Index matrix() const { return panels * kPanel<T> * row; }
    Index vectors() const { return panels * kPanel<T> * kPanel<T>; }
};

// One block of up to P vectors: y is Y^T [panels P, P]; v, u [panels, P, P] are V and U by panels of columns.
template <class T>
int update_block(const Layout<T>& at, T* matrix, const T* y, const double* sign, T* v, T* u, T* vt) {
    constexpr Index P = kPanel<T>;
    const Index n = at.panels;
    for (Index e = 0; e < at.vectors(); ++e) vt[e] = 0;
    for (Index j = 0; j < n; ++j) {
        T *tile = vt + j * P * P, *diagonal = matrix + j * P * at.row + j * P;
        add_tile<T, Product>(matrix + j * P, y, straight(j * P, at.row, P), tile);
        add_tile_of_rows(diagonal, at.row, y + j * P * P, (n - j) * P, tile);
        transpose_tile(tile, P, v + j * P * P, P);
    }
    T product[P * P] = {};
    add_tile<T, Product>(vt, y, straight(n * P, P, P), product);
    double s[P * P], pivot[P];
    for (Index e = 0; e < P * P; ++e) s[e] = double(product[e]);
    T* l = product;
    const int status = factor_pivots(s, sign, P, rounding<T>(at.d), pivot, l);
    if (status != kUpdated) return status;
    for (Index j = 0; j < n; ++j) solve_panel(l, pivot, P, v + j * P * P, u + j * P * P);
    for (Index i = 0; i < n; ++i)
        for (Index j = i; j < n; ++j)
            add_tile<T, Product>(u + i * P * P, v + j * P * P, straight(P, P, P), matrix + i * P * at.row + j * P,
                                 at.row);
    return kUpdated;
}

}  // namespace

template <class T>
Index small_workspace(Index d) {
    const Layout<T> at(d);
    return at.matrix() + 4 * at.vectors();
}

template <class T>
int update_small(const ShermanMorrisonArgs& g, Index p, T* work) {
    constexpr Index P = kPanel<T>;
    const Layout<T> at(g.d);
    T* matrix = work;
    T* y = matrix + at.matrix();
    T *v = y + at.vectors(), *u = v + at.vectors(), *vt = u + at.vectors();
    T* inverse = static_cast<T*>(g.inverse) + p * g.inverse_batch_stride;
    for (Index i = 0; i < at.panels * P; ++i) {
        T* row = matrix + i * at.row;
        const Index filled = i < g.d ? g.d : 0;
        for (Index j = 0; j < filled; ++j) row[j] = inverse[i * g.inverse_row_stride + j];
        for (Index j = filled; j < at.row; ++j) row[j] = 0;
    }
    for (Index e = g.d * P; e < at.vectors(); ++e) y[e] = 0;

    VectorOrder order(g, p);
    for (Index done = 0; done < g.k; done += P) {
        double sign[P];
        next_vectors(g, p, order, y, sign);
        const int status = update_block(at, matrix, y, sign, v, u, vt);
        if (status != kUpdated) return status;
    }

    for (Index i = 0; i < at.panels; ++i) {
        mirror_diagonal(matrix + i * P * at.row + i * P, at.row);
        for (Index j = i + 1; j < at.panels; ++j)
            transpose_tile(matrix + i * P * at.row + j * P, at.row, matrix + j * P * at.row + i * P, at.row);
    }
    for (Index i = 0; i < g.d; ++i) {
        const double diagonal = double(matrix[i * at.row + i]);
        if (!finite(diagonal)) return kNotFinite;
        if (!(diagonal > 0)) return kIndefinite;
    }
    for (Index i = 0; i < g.d; ++i)
        for (Index j = 0; j < g.d; ++j) inverse[i * g.inverse_row_stride + j] = matrix[i * at.row + j];
    return kUpdated;
}

template Index small_workspace<float>(Index);
template Index small_workspace<double>(Index);
template int update_small<float>(const ShermanMorrisonArgs&, Index, float*);
template int update_small<double>(const ShermanMorrisonArgs&, Index, double*);

}  // namespace mtz::cpu::MTZ_ISA
