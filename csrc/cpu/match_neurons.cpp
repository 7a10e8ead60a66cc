#include "cpu/match_neurons.h"

#include <algorithm>

#include "cpu/dispatch.h"
#include "cpu/isa/kernels.h"

namespace mtz::cpu {
namespace {

using Index = std::int64_t;

std::size_t round_up(std::size_t bytes) {
    return (bytes + 63) / 64 * 64;
}

// Pairs of all min(n, m) rows, and a contiguous copy of the costs if their columns are not.
std::size_t pairs_bytes(const MatchNeuronsArgs& g) {
    return round_up(std::size_t(2 * std::min(g.n, g.m)) * sizeof(Index));
}

// Rows all of which are matched, or columns, which are the rows of the transposed matrix.
bool is_full(const MatchNeuronsArgs& g) {
    return g.method == MatchMethod::optimal && g.count == std::min(g.n, g.m);
}

bool is_transposed(const MatchNeuronsArgs& g) {
    return is_full(g) && g.n > g.m;
}

std::size_t copy_bytes(const MatchNeuronsArgs& g) {
    const Index stride = is_transposed(g) ? g.distances.row_stride : g.distances.column_stride;
    return stride == 1 ? 0 : round_up(std::size_t(g.n * g.m) * scalar_size(g.scalar));
}

// `threads` that work on one matrix.
std::size_t slot_bytes(const MatchNeuronsArgs& g, int threads) {
    const std::size_t method = g.method == MatchMethod::greedy ? greedy_workspace(g, threads)
                               : is_full(g)                    ? full_workspace(std::min(g.n, g.m), std::max(g.n, g.m))
                                                               : optimal_workspace(g.n, g.m);
    return pairs_bytes(g) + copy_bytes(g) + round_up(method);
}

// With a matrix for every thread the matrices are shared out, otherwise the rows of one.
bool share_matrices(const MatchNeuronsArgs& g, int threads) {
    return g.batch >= threads || g.method == MatchMethod::optimal;
}

// NaN if x cannot be used. For sums of costs and potentials float64 needs some room above them.
template <class T>
T unusable(T x, bool finite) {
    if (!finite) return x;
    const double large = sizeof(T) == 8 ? double(x) * 1e9 : double(x);
    return T(large - large);
}

// Flat index i * m + j of the first cost that cannot be used, -1 if there is none. `costs` has them all, perhaps transposed.
template <class T>
Index first_unusable(const MatchNeuronsArgs& g, const T* data, const Costs<T>& costs, bool finite) {
    bool bad = false;
    for (Index i = 0; i < costs.n; ++i)
        for (Index j = 0; j < costs.m; ++j) {
            const T x = unusable(costs.at(i, j), finite);
            bad |= x != x;
        }
    for (Index e = 0; bad; ++e) {
        const T x = unusable(data[e / g.m * g.distances.row_stride + e % g.m * g.distances.column_stride], finite);
        if (x != x) return e;
    }
    return -1;
}

template <class T>
void match_one(const MatchNeuronsArgs& g, Index p, char* slot, int threads) {
    Index* found = reinterpret_cast<Index*>(slot);
    T* copy = reinterpret_cast<T*>(slot + pairs_bytes(g));
    char* work = slot + pairs_bytes(g) + copy_bytes(g);
    const T* data = static_cast<const T*>(g.distances.data) + p * g.distances.batch_stride;
    Index n = g.n, m = g.m, row = g.distances.row_stride, column = g.distances.column_stride;
    if (is_transposed(g)) {
        std::swap(n, m);
        std::swap(row, column);
    }
    Costs<T> costs{data, n, m, row};
    if (column != 1) {
        for (Index i = 0; i < n; ++i)
            for (Index j = 0; j < m; ++j) copy[i * m + j] = data[i * row + j * column];
        costs = {copy, n, m, m};
    }

    Index* pairs = g.pairs + p * g.count * 2;
    g.status[p] = first_unusable(g, data, costs, g.method == MatchMethod::optimal);
    if (g.status[p] >= 0) {
        std::fill(pairs, pairs + 2 * g.count, -1);
        return;
    }
    Index size = std::min(g.n, g.m);
    if (g.method == MatchMethod::greedy) {
        match_greedily(costs, work, threads, found);
    } else if (is_full(g)) {
        match_fully(costs, work, found);
    } else {
        size = g.count;
        match_optimally(costs, g.count, work, found);
    }
    struct Pair {
        Index i, j;
    };
    Pair* all = reinterpret_cast<Pair*>(found);
    if (is_transposed(g))
        for (Index e = 0; e < size; ++e) std::swap(all[e].i, all[e].j);
    std::sort(all, all + size, [&](const Pair& x, const Pair& y) {
        const bool turned = is_transposed(g);
        const T cx = turned ? costs.at(x.j, x.i) : costs.at(x.i, x.j);
        const T cy = turned ? costs.at(y.j, y.i) : costs.at(y.i, y.j);
        return cx < cy || (cx == cy && (x.i < y.i || (x.i == y.i && x.j < y.j)));
    });
    std::copy(found, found + 2 * g.count, pairs);
}

// Threads that the work is worth: it reads every cost a few times.
int worth(const MatchNeuronsArgs& g, int threads) {
    const double most = 1 + double(g.batch * g.n * g.m) / 16384;
    return most < threads ? int(most) : threads;
}

template <class T>
void run(const MatchNeuronsArgs& g, char* workspace, int threads) {
    if (!share_matrices(g, threads)) {
        for (Index p = 0; p < g.batch; ++p) match_one<T>(g, p, workspace, threads);
        return;
    }
    const std::size_t slot = slot_bytes(g, 1);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int t = 0; t < threads; ++t)
        for (Index p = t; p < g.batch; p += threads) match_one<T>(g, p, workspace + t * slot, 1);
}

}  // namespace

std::size_t optimal_workspace(Index n, Index m) {
    MTZ_DISPATCH(optimal_workspace(n, m))
}

template <class T>
void match_optimally(Costs<T> costs, Index count, void* work,
                     Index* pairs){MTZ_DISPATCH(match_optimally(costs, count, work, pairs))}

std::size_t full_workspace(Index n, Index m) {
    MTZ_DISPATCH(full_workspace(n, m))
}

template <class T>
void match_fully(Costs<T> costs, void* work, Index* pairs){MTZ_DISPATCH(match_fully(costs, work, pairs))}

std::size_t match_neurons_workspace(const MatchNeuronsArgs& g, int threads) {
    threads = worth(g, threads);
    return share_matrices(g, threads) ? slot_bytes(g, 1) * std::min<Index>(threads, g.batch) : slot_bytes(g, threads);
}

Status match_neurons(const MatchNeuronsArgs& g, void* workspace, int threads) {
    threads = worth(g, threads);
    if (g.scalar == Scalar::float32)
        run<float>(g, static_cast<char*>(workspace), threads);
    else if (g.scalar == Scalar::float64)
        run<double>(g, static_cast<char*>(workspace), threads);
    else
        return {Code::unsupported};
    return {};
}

}  // namespace mtz::cpu
