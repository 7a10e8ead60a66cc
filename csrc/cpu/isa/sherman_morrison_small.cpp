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

// Memory that will be read next, asked for a little at a time: more at once would hold up the loads of the arithmetic.
class Ahead {
  public:
    Ahead() = default;
    template <class T>
    Ahead(const T* from, Index count, Index calls)
        : at_(reinterpret_cast<const char*>(from)),
          left_(ceil_div(count * Index(sizeof(T)), kLine)),
          step_(ceil_div(left_, calls)) {}
    void ask() {
        for (Index e = smaller(step_, left_); e-- > 0; --left_, at_ += kLine) __builtin_prefetch(at_);
    }

  private:
    static constexpr Index kLine = 64;
    const char* at_ = nullptr;
    Index left_ = 0, step_ = 0;
};

// All of matrix p, in `calls` parts; nothing where its rows lie apart or there is none.
template <class T>
Ahead ahead_of_matrix(const ShermanMorrisonArgs& g, Index p, Index calls) {
    if (p >= g.batch || g.inverse_row_stride != g.d) return {};
    return {static_cast<const T*>(g.inverse) + p * g.inverse_batch_stride, g.d * g.d, calls};
}

// The block of vectors of matrix p that begins with `first`, likewise.
template <class T>
Ahead ahead_of_vectors(const ShermanMorrisonArgs& g, Index p, Index first, Index calls) {
    if (p >= g.batch || g.vectors.row_stride != g.d || g.vectors.column_stride != 1) return {};
    const T* x = static_cast<const T*>(g.vectors.data) + p * g.vectors.batch_stride;
    return {x + first * g.d, smaller(kPanel<T>, g.k - first) * g.d, calls};
}

// One block of up to P vectors: y is Y^T [panels P, P]; v, u [panels, P, P] are V and U by panels of columns. `one` and
// `other` are asked for meanwhile, once a tile of the matrix.
template <class T>
int update_block(const Layout<T>& at, T* matrix, const T* y, const double* sign, T* v, T* u, T* vt, Ahead& one,
                 Ahead& other) {
    constexpr Index P = kPanel<T>;
    const Index n = at.panels;
    for (Index j = 0; j < n; ++j) {
        T* tile = vt + j * P * P;
        tile_of_symmetric(matrix + j * P, at.row, j * P, y, n * P, tile);
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
    for (Index i = n; i-- > 0;)  // from the tiles that V has read last
        for (Index j = i; j < n; ++j) {
            one.ask();
            other.ask();
            add_tile<T, Product>(u + i * P * P, v + j * P * P, straight(P, P, P), matrix + i * P * at.row + j * P,
                                 at.row);
        }
    return kUpdated;
}

}  // namespace

template <class T>
Index small_workspace(Index d) {
    const Layout<T> at(d);
    return at.matrix() + 4 * at.vectors();
}

template <class T>
int update_small(const ShermanMorrisonArgs& g, Index p, Index next, T* work) {
    constexpr Index P = kPanel<T>;
    const Layout<T> at(g.d);
    T* matrix = work;
    T* y = matrix + at.matrix();
    T *v = y + at.vectors(), *u = v + at.vectors(), *vt = u + at.vectors();
    T* inverse = static_cast<T*>(g.inverse) + p * g.inverse_batch_stride;
    for (Index i = 0; i < g.d; ++i) {
        T* row = matrix + i * at.row;
        for (Index j = i / P * P; j < g.d; ++j) row[j] = inverse[i * g.inverse_row_stride + j];
        for (Index j = g.d; j < at.row; ++j) row[j] = 0;
    }
    for (Index e = g.d * at.row; e < at.matrix(); ++e) matrix[e] = 0;
    for (Index e = g.d * P; e < at.vectors(); ++e) y[e] = 0;

    const Index tiles = at.panels * (at.panels + 1) / 2;
    Ahead matrix_ahead = ahead_of_matrix<T>(g, next, ceil_div(g.k, P) * tiles);
    VectorOrder order(g, p);
    for (Index done = 0; done < g.k; done += P) {
        double sign[P];
        next_vectors(g, p, order, y, sign);
        Ahead vectors_ahead =
            done + P < g.k ? ahead_of_vectors<T>(g, p, done + P, tiles) : ahead_of_vectors<T>(g, next, 0, tiles);
        const int status = update_block(at, matrix, y, sign, v, u, vt, matrix_ahead, vectors_ahead);
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
template int update_small<float>(const ShermanMorrisonArgs&, Index, Index, float*);
template int update_small<double>(const ShermanMorrisonArgs&, Index, Index, double*);

}  // namespace mtz::cpu::MTZ_ISA
