// Linear assignment of every row, n <= m: an auction, made exact by shortest paths.
//
// Column potentials v are minus the prices of an auction (Bertsekas 1988): a row takes the column of least c_ij - v_j,
// whose potential falls until it is as good as the second best, and by eps more; the row that had it bids next. Few bids
// settle on prices that are right to eps, and eps goes down by kFactor from phase to phase, each starting from the last
// one's prices. Then rows keep their column if it is their best, and the others are matched along shortest paths
// (Dijkstra's algorithm on reduced costs; Jonker and Volgenant 1987): that is exact, whatever the prices are, and short
// where they are nearly right. With more columns than rows, those that nobody takes must keep v = 0: a single phase from
// there with eps = 0, in which rows and columns that are matched stay right.
//
// With a cap costs count as it at most: with n = m, the pairs below the cap are then the cheapest of their number, as a row
// that has none of them costs the cap, whoever it is.
#pragma once

#include "cpu/isa/kernels.h"
#include "cpu/isa/simd.h"

namespace mtz::cpu::MTZ_ISA {
namespace {

constexpr double kInfinite = __builtin_inf();
// Of the costs' range; measured on distances of neurons and on uniform numbers, 4,096 x 4,096: 0.6 s, half of it bids.
constexpr double kFirst = 0.05, kLast = 1e-5, kFactor = 5;
constexpr Index kBids = 40;  // of a phase, at most, times n

// The first j < m that `is` holds for; there must be one. Blocks without it are passed over by vectors.
template <class F>
Index first_of(Index m, F is) {
    constexpr Index block = 64;
    Index j = 0;
    for (; j + block <= m; j += block) {
        int hits = 0;
#pragma omp simd reduction(+ : hits)
        for (Index l = 0; l < block; ++l) hits += is(j + l);
        if (hits > 0) break;
    }
    while (!is(j)) ++j;
    return j;
}

template <class T>
struct Assignment {
    Costs<T> costs;
    double cap;
    double* potential = nullptr;  // [m]
    Index* row_of = nullptr;      // [m], -1 if free
    Index* column_of = nullptr;   // [n], -1 if free
    Index* queue = nullptr;       // [n], rows that are free, last one first
    // of one search, [m]:
    double* distance = nullptr;
    double* matched = nullptr;  // 0 for matched columns that may be scanned next; infinite for the others
    double* free = nullptr;     // 0 for free columns; infinite for the others
    Index* from = nullptr;      // row the path comes from
    Index* seen = nullptr;      // columns scanned

    const T* row(Index i) const { return costs.data + i * costs.row; }

    double at(const T* c, Index j) const { return double(c[j]) < cap ? double(c[j]) : cap; }

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
            const double x = at(c, j) - potential[j];
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
        const T* c = row(i);
        return first_of(costs.m, [&](Index j) { return at(c, j) - potential[j] == value; });
    }

    void free_all() {
        for (Index j = 0; j < costs.m; ++j) row_of[j] = -1;
        for (Index i = 0; i < costs.n; ++i) column_of[i] = -1;
    }

    // One phase, all rows being free. Without eps, where two columns are equally good, a row does not outbid another.
    void bid(double eps) {
        Index count = costs.n;
        for (Index e = 0; e < count; ++e) queue[e] = count - 1 - e;
        for (Index bids = 0; count > 0 && bids < kBids * costs.n; ++bids) {
            const Index i = queue[--count];
            const double first = least(i);
            const Index j = column_with(i, first), before = row_of[j];
            const double fall = least_but(i, j) - first + eps;
            if (!(fall > 0) && before >= 0) continue;
            potential[j] -= fall;
            pair(i, j);
            if (before < 0) continue;
            column_of[before] = -1;
            queue[count++] = before;
        }
    }

    // From the prices there are.
    void hold_auction() {
        free_all();
        if (costs.m == 1) return;
        if (costs.n < costs.m) return bid(0);
        double low = kInfinite, high = -kInfinite;
        for (Index i = 0; i < costs.n; ++i) {
            const T* c = row(i);
            for (Index j = 0; j < costs.m; ++j) {
                const double x = at(c, j);
                low = x < low ? x : low;
                high = x > high ? x : high;
            }
        }
        for (double eps = kFirst * (high - low); eps >= kLast * (high - low) && eps > 0; eps /= kFactor) {
            free_all();
            bid(eps);
        }
        for (Index i = 0; i < costs.n; ++i) {  // what is not a row's best, by eps, is given back
            const Index j = column_of[i];
            if (j < 0 || at(row(i), j) - potential[j] <= least(i)) continue;
            row_of[j] = -1;
            column_of[i] = -1;
        }
    }

    // Least distance among the columns of `kind`.
    double nearest(const double* kind) const {
        double low = kInfinite;
#pragma omp simd reduction(min : low)
        for (Index j = 0; j < costs.m; ++j) {
            const double x = distance[j] + kind[j];
            low = x < low ? x : low;
        }
        return low;
    }

    // First of them at that distance.
    Index find(const double* kind, double value) const {
        return first_of(costs.m, [&](Index j) { return distance[j] + kind[j] == value; });
    }

    // Matches one more row, along a shortest path from it to a free column.
    void augment(Index start) {
        const T* c = row(start);
        for (Index j = 0; j < costs.m; ++j) {
            distance[j] = at(c, j) - potential[j];
            matched[j] = row_of[j] < 0 ? kInfinite : 0;
            free[j] = row_of[j] < 0 ? 0 : kInfinite;
            from[j] = start;
        }
        Index count = 0;
        double reached = nearest(matched), end = nearest(free);
        while (reached < end) {
            const Index j = find(matched, reached), i = row_of[j];
            seen[count++] = j;
            matched[j] = kInfinite;
            const T* further = row(i);
            const double base = at(further, j) - potential[j] - reached;
#pragma omp simd
            for (Index k = 0; k < costs.m; ++k) {
                const double through = at(further, k) - potential[k] - base;
                const double open = matched[k] < free[k] ? matched[k] : free[k];  // infinite for columns scanned
                const bool less = through + open < distance[k];
                distance[k] = less ? through : distance[k];
                from[k] = less ? i : from[k];
            }
            reached = nearest(matched);
            end = nearest(free);
        }
        for (Index e = 0; e < count; ++e) potential[seen[e]] += distance[seen[e]] - end;
        Index j = find(free, end);
        for (Index i = -1; i != start;) {  // turn the path over, from its end
            i = from[j];
            const Index before = column_of[i];
            pair(i, j);
            j = before;
        }
    }

    void no_prices() {
        for (Index j = 0; j < costs.m; ++j) potential[j] = 0;
    }

    void run() {
        hold_auction();
        for (Index i = 0; i < costs.n; ++i)
            if (column_of[i] < 0) augment(i);
    }
};

// Hands out arrays in whole cache lines, and a few lines more, as arrays a multiple of 4,096 bytes apart stall each other's
// loads; without memory it only counts.
class Arrays {
  public:
    explicit Arrays(char* base) : base_(base) {}
    double* reals(Index size) {
        double* here = reinterpret_cast<double*>(base_ + used_);
        used_ += std::size_t(size + 7) / 8 * 64 + 5 * 64;
        return here;
    }
    Index* indices(Index size) { return reinterpret_cast<Index*>(reals(size)); }
    std::size_t used() const { return used_; }

  private:
    char* base_;
    std::size_t used_ = 0;
};

template <class T>
Assignment<T> make_assignment(Costs<T> costs, Arrays& space) {
    const Index n = costs.n, m = costs.m;
    Assignment<T> made{costs, kInfinite};
    made.potential = space.reals(m);
    made.row_of = space.indices(m);
    made.column_of = space.indices(n);
    made.queue = space.indices(n);
    made.distance = space.reals(m);
    made.matched = space.reals(m);
    made.free = space.reals(m);
    made.from = space.indices(m);
    made.seen = space.indices(m);
    return made;
}

}  // namespace
}  // namespace mtz::cpu::MTZ_ISA
