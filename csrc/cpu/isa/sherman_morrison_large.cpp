// One large inverse: two passes over it for a block of vectors (V = Y A^-1, then A^-1 += U^T V), all threads on both.
#include "cpu/isa/sherman_morrison.h"
#include "cpu/isa/threads.h"

namespace mtz::cpu::MTZ_ISA {
namespace {

constexpr Index kColumns = 256;  // of the matrix packed at a time

inline Index round_up(Index a, Index b) {
    return ceil_div(a, b) * b;
}

// Everything of one block of `count` vectors (a multiple of P), n = ceil(d / P) panels of columns.
template <class T>
struct Block {
    static constexpr Index P = kPanel<T>;
    const ShermanMorrisonArgs& g;
    T* inverse;
    Index row, n, count;
    int threads;
    T* y;       // [count / P, n P, P]   Y^T by panels of vectors
    T* vt;      // [count / P, n P, P]   V^T likewise
    T* v;       // [n, count, P]         V by panels of columns
    T* u;       // [n, count, P]
    T* packed;  // [threads, kColumns, P]
    double* s;  // [count, count]
    T* l;       // [count, count]

    // V = Y A^-1. By symmetry a panel of columns of A^-1 is packed from its rows, which are contiguous.
    void multiply() const {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
        for (Index j = 0; j < n; ++j) {
            T* panel = packed + thread_number() * kColumns * P;
            T* to = v + j * count * P;
            for (Index e = 0; e < count * P; ++e) to[e] = 0;
            for (Index k = 0; k < g.d; k += kColumns) {
                const Index columns = smaller(kColumns, g.d - k);
                pack_panel(inverse + j * P * row + k, row, 1, smaller(P, g.d - j * P), columns, panel);
                for (Index i = 0; i < count; i += P)
                    add_tile<T, Product>(y + i * n * P + k * P, panel, straight(columns, P, P), to + i * P);
            }
            for (Index i = 0; i < count; i += P) transpose_tile(to + i * P, P, vt + i * n * P + j * P * P, P);
        }
    }

    // S = V Y^T, the lower triangle mirrored.
    void small_product() const {
        const Index across = count / P;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
        for (Index e = 0; e < across * across; ++e) {
            const Index i = e / across, j = e % across;
            if (j > i) continue;
            T tile[P * P] = {};
            for (Index k = 0; k < n * P; k += kColumns)
                add_tile<T, Product>(vt + (i * n * P + k) * P, y + (j * n * P + k) * P,
                                     straight(smaller(kColumns, n * P - k), P, P), tile);
            for (Index r = 0; r < P; ++r)
                for (Index c = 0; c < P; ++c)
                    s[(i * P + r) * count + j * P + c] = s[(j * P + c) * count + i * P + r] = double(tile[r * P + c]);
        }
    }

    // V and U, and whether the diagonal stays positive: nothing has been written so far.
    int solve(const double* pivot) const {
        int worst = kUpdated;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(max : worst)
        for (Index j = 0; j < n; ++j) {
            T *vj = v + j * count * P, *uj = u + j * count * P;
            solve_panel(l, pivot, count, vj, uj);
            for (Index c = 0; c < smaller(P, g.d - j * P); ++c) {
                double diagonal = double(inverse[(j * P + c) * (row + 1)]);
                for (Index r = 0; r < count; ++r) diagonal += double(uj[r * P + c]) * double(vj[r * P + c]);
                const int status = !finite(diagonal) ? kNotFinite : diagonal > 0 ? kUpdated : kIndefinite;
                if (status > worst) worst = status;
            }
        }
        return worst;
    }

    // One tile of A^-1 += U^T V and its mirror image.
    void update_tile(Index i, Index j) const {
        T* tile = inverse + i * P * row + j * P;
        T* mirror = inverse + j * P * row + i * P;
        const Walk walk = straight(count, P, P);
        const T *ui = u + i * count * P, *vj = v + j * count * P;
        if (i != j && (j + 1) * P <= g.d) {
            add_tile<T, Product>(ui, vj, walk, tile, row);
            transpose_tile(tile, row, mirror, row);
            return;
        }
        T change[P * P] = {};
        add_tile<T, Product>(ui, vj, walk, change);
        for (Index r = 0; r < smaller(P, g.d - i * P); ++r)
            for (Index c = i == j ? r : 0; c < smaller(P, g.d - j * P); ++c)
                mirror[c * row + r] = tile[r * row + c] += change[r * P + c];
    }

    void update() const {
        constexpr Index group =
            4;  // panels of rows at a time: mirrored stores then fill whole lines of neighbouring rows
        const Index groups = ceil_div(n, group);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
        for (Index e = 0; e < groups * groups; ++e) {
            const Index i0 = e / groups * group, j0 = e % groups * group;
            if (j0 < i0) continue;
            for (Index j = j0; j < smaller(j0 + group, n); ++j)
                for (Index i = i0; i < smaller(i0 + group, j + 1); ++i) update_tile(i, j);
        }
    }
};

template <class T>
struct Sizes {
    Index n, count, vectors, small, copy;
    explicit Sizes(const ShermanMorrisonArgs& g)
        : n(ceil_div(g.d, kPanel<T>)),
          count(smaller(kBlock, round_up(g.k, kPanel<T>))),
          vectors(n * kPanel<T> * count),
          small((count * count + 2 * count) * Index(sizeof(double) / sizeof(T)) + count * count),
          copy(g.k > count ? g.d * g.d : 0) {}
};

}  // namespace

template <class T>
Index large_workspace(const ShermanMorrisonArgs& g, int threads) {
    const Sizes<T> sizes(g);
    return sizes.small + 4 * sizes.vectors + threads * kColumns * kPanel<T> + sizes.copy;
}

template <class T>
int update_large(const ShermanMorrisonArgs& g, Index p, int threads, T* work) {
    constexpr Index P = kPanel<T>;
    const Sizes<T> sizes(g);
    double* s = reinterpret_cast<double*>(work);
    double *pivot = s + sizes.count * sizes.count, *sign = pivot + sizes.count;
    T* l = reinterpret_cast<T*>(sign + sizes.count);
    T* y = work + sizes.small;
    T *vt = y + sizes.vectors, *v = vt + sizes.vectors, *u = v + sizes.vectors, *packed = u + sizes.vectors;
    T* copy = packed + threads * kColumns * P;
    T* inverse = static_cast<T*>(g.inverse) + p * g.inverse_batch_stride;
    const Index row = g.inverse_row_stride, n = sizes.n;
    const auto move = [&](T* to, Index to_row, const T* from, Index from_row) {
#pragma omp parallel for num_threads(threads) schedule(static)
        for (Index i = 0; i < g.d; ++i)
            for (Index j = 0; j < g.d; ++j) to[i * to_row + j] = from[i * from_row + j];
    };

    if (sizes.copy > 0) move(copy, g.d, inverse, row);  // a later block may fail after an earlier one was written

    VectorOrder order(g, p);
    for (Index done = 0; done < g.k;) {
        const Index count = smaller(sizes.count, round_up(g.k - done, P));
        for (Index i = 0; i < count; i += P) {
            T* panel = y + i * n * P;
            next_vectors(g, p, order, panel, sign + i);
            for (Index e = g.d * P; e < n * P * P; ++e) panel[e] = 0;
        }
        const Block<T> block{g, inverse, row, n, count, threads, y, vt, v, u, packed, s, l};
        block.multiply();
        block.small_product();
        int status = factor_pivots(s, sign, count, rounding<T>(g.d), pivot, l);
        if (status == kUpdated) status = block.solve(pivot);
        if (status != kUpdated) {
            if (done > 0) move(inverse, row, copy, g.d);
            return status;
        }
        block.update();
        done += count;
    }
    return kUpdated;
}

template Index large_workspace<float>(const ShermanMorrisonArgs&, int);
template Index large_workspace<double>(const ShermanMorrisonArgs&, int);
template int update_large<float>(const ShermanMorrisonArgs&, Index, int, float*);
template int update_large<double>(const ShermanMorrisonArgs&, Index, int, double*);

}  // namespace mtz::cpu::MTZ_ISA
