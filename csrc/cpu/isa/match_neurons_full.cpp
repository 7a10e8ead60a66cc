// Linear assignment of every row, n <= m, by Jonker and Volgenant (Computing 38, 1987).
//
// Column potentials v keep a lower bound; row i is content with the column of least c_ij - v_j. Most rows find theirs in
// bids: a row takes its cheapest column, lowering its potential until the second cheapest is as good, and the row that had
// it bids next. The few rows left over are matched along shortest paths (Dijkstra's algorithm on reduced costs), which is
// exact whatever the bids have come to. Columns that nobody took keep v = 0, or, if there are none, anything.
#include "cpu/isa/kernels.h"
#include "cpu/isa/simd.h"

namespace mtz::cpu::MTZ_ISA {
namespace {

constexpr double kInfinite = __builtin_inf();
constexpr int kRounds = 2;   // of bids over the rows that are free
constexpr Index kBids = 16;  // of each, at most, times n; measured on distances of random neurons, 4,096 x 4,096

template <class T>
struct Assignment {
    Costs<T> costs;
    double* potential;  // [m]
    Index* row_of;      // [m], -1 if free
    Index* column_of;   // [n], -1 if free
    Index* queue;       // [n], rows that are free, last one first
    Index* later;       // [n], those for the next round
    // of one search, [m]:
    double* distance;
    double* closed;  // infinite for columns scanned, else 0
    Index* from;     // row the path comes from
    Index* seen;     // columns scanned

    const T* row(Index i) const { return costs.data + i * costs.row; }

    void pair(Index i, Index j) {
        column_of[i] = j;
        row_of[j] = i;
    }

    // Least c_ij - v_j.
    double least(Index i) const {
        const T* c = row(i);
        double best = kInfinite;
#pragma omp simd reduction(min : best)
        for (Index j = 0; j < costs.m; ++j) {
            const double x = double(c[j]) - potential[j];
            best = x < best ? x : best;
        }
        return best;
    }

    // The same without column j.
    double least_but(Index i, Index j) const {
        const double own = potential[j];
        potential[j] = -kInfinite;
        const double best = least(i);
        potential[j] = own;
        return best;
    }

    // First column with c_ij - v_j = value, which is there.
    Index column_with(Index i, double value) const {
        constexpr Index block = 64;
        const T* c = row(i);
        Index j = 0;
        for (; j + block <= costs.m; j += block) {
            int hits = 0;
#pragma omp simd reduction(+ : hits)
            for (Index l = 0; l < block; ++l) hits += double(c[j + l]) - potential[j + l] == value;
            if (hits > 0) break;
        }
        while (double(c[j]) - potential[j] != value) ++j;
        return j;
    }

    // As many columns as rows: each column starts at its cheapest row, which takes it if it has none, and its potential
    // falls until that row's second cheapest column is as good.
    void reduce_columns() {
        for (Index j = 0; j < costs.m; ++j) {
            potential[j] = kInfinite;
            from[j] = 0;
        }
        for (Index i = 0; i < costs.n; ++i) {
            const T* c = row(i);
            for (Index j = 0; j < costs.m; ++j) {
                const bool less = double(c[j]) < potential[j];
                potential[j] = less ? double(c[j]) : potential[j];
                from[j] = less ? i : from[j];
            }
        }
        for (Index j = costs.m - 1; j >= 0; --j)
            if (column_of[from[j]] < 0) pair(from[j], j);
        if (costs.m == 1) return;
        for (Index i = 0; i < costs.n; ++i) {
            const Index j = column_of[i];
            if (j >= 0) potential[j] -= least_but(i, j) - (double(row(i)[j]) - potential[j]);
        }
    }

    // Bids of `count` rows in `queue`; returns how many are still free, in `queue` again.
    Index bid(Index count) {
        Index left = 0;
        for (Index budget = kBids * costs.n; count > 0; --budget) {
            const Index i = queue[--count];
            const double first = least(i);
            const Index j = column_with(i, first), before = row_of[j];
            const double second = least_but(i, j);
            if (budget <= 0 || (!(first < second) && before >= 0)) {  // equally good columns: nobody need give way
                later[left++] = i;
                continue;
            }
            potential[j] -= second - first;
            pair(i, j);
            if (before < 0) continue;
            column_of[before] = -1;
            queue[count++] = before;
        }
        for (Index e = 0; e < left; ++e) queue[e] = later[left - 1 - e];
        return left;
    }

    // First column of least distance that is not closed, and that distance.
    Index nearest(double& best) const {
        double low = kInfinite;
#pragma omp simd reduction(min : low)
        for (Index j = 0; j < costs.m; ++j) {
            const double x = distance[j] + closed[j];
            low = x < low ? x : low;
        }
        constexpr Index block = 64;
        Index j = 0;
        for (; j + block <= costs.m; j += block) {
            int hits = 0;
#pragma omp simd reduction(+ : hits)
            for (Index l = 0; l < block; ++l) hits += distance[j + l] + closed[j + l] == low;
            if (hits > 0) break;
        }
        while (distance[j] + closed[j] != low) ++j;
        best = low;
        return j;
    }

    // Matches one more row, along a shortest path from it to a free column.
    void augment(Index start) {
        const T* c = row(start);
        for (Index j = 0; j < costs.m; ++j) {
            distance[j] = double(c[j]) - potential[j];
            closed[j] = 0;
            from[j] = start;
        }
        Index count = 0, j;
        double reached;
        for (j = nearest(reached); row_of[j] >= 0; j = nearest(reached)) {
            closed[j] = kInfinite;
            seen[count++] = j;
            const Index i = row_of[j];
            const T* further = row(i);
            const double base = double(further[j]) - potential[j] - reached;
#pragma omp simd
            for (Index k = 0; k < costs.m; ++k) {
                const double through = double(further[k]) - potential[k] - base + closed[k];
                const bool less = through < distance[k];
                distance[k] = less ? through : distance[k];
                from[k] = less ? i : from[k];
            }
        }
        for (Index e = 0; e < count; ++e) potential[seen[e]] += distance[seen[e]] - reached;
        for (Index i = -1; i != start;) {  // turn the path over, from its end
            i = from[j];
            const Index before = column_of[i];
            pair(i, j);
            j = before;
        }
    }

    void run() {
        for (Index j = 0; j < costs.m; ++j) {
            potential[j] = 0;
            row_of[j] = -1;
        }
        for (Index i = 0; i < costs.n; ++i) column_of[i] = -1;
        if (costs.n == costs.m) reduce_columns();
        Index left = 0;
        for (Index i = costs.n - 1; i >= 0; --i)
            if (column_of[i] < 0) queue[left++] = i;
        for (int round = 0; round < kRounds && left > 0; ++round) left = bid(left);
        while (left > 0) augment(queue[--left]);
    }
};

// Bytes of an array in whole cache lines. A few more, as arrays a multiple of 4,096 bytes apart stall each other's loads.
inline std::size_t line(Index size) {
    return std::size_t(size + 7) / 8 * 64 + 5 * 64;
}

template <class T>
void match(Costs<T> costs, char* at, Index* pairs) {
    const auto reals = [&at](Index size) {
        double* here = reinterpret_cast<double*>(at);
        at += line(size);
        return here;
    };
    const auto indices = [&reals](Index size) { return reinterpret_cast<Index*>(reals(size)); };
    const Index n = costs.n, m = costs.m;
    Assignment<T> assignment{costs,      reals(m), indices(m), indices(n), indices(n),
                             indices(n), reals(m), reals(m),   indices(m), indices(m)};
    assignment.run();
    for (Index i = 0; i < n; ++i) {
        *pairs++ = i;
        *pairs++ = assignment.column_of[i];
    }
}

}  // namespace

std::size_t full_workspace(Index n, Index m) {
    return 3 * line(n) + 6 * line(m);
}

void match_fully(Costs<float> costs, void* work, Index* pairs) {
    match(costs, static_cast<char*>(work), pairs);
}

void match_fully(Costs<double> costs, void* work, Index* pairs) {
    match(costs, static_cast<char*>(work), pairs);
}

}  // namespace mtz::cpu::MTZ_ISA
