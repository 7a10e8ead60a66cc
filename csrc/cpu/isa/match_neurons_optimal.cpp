// Linear assignment of fixed cardinality by successive shortest augmenting paths.
//
// Pairs are units of flow from a source through rows and columns to a sink; after k augmentations along a shortest path
// the flow is the cheapest of k units, so exactly k pairs need neither dummy rows nor a forbidden corner. Node potentials
// keep reduced costs c_ij + p(i) - p(j) >= 0 and zero on matched pairs, so Dijkstra's algorithm finds the path (Edmonds
// and Karp 1972; Tomizawa 1971). Free rows keep the potential of the source, so a path starts at the cheapest free row of
// each column, which is kept up to date, and only matched rows on the way are scanned.
#include "cpu/isa/kernels.h"
#include "cpu/isa/simd.h"

namespace mtz::cpu::MTZ_ISA {
namespace {

constexpr double kInfinite = __builtin_inf();

template <class T>
struct Flow {
    Costs<T> costs;
    double* row_potential;     // [n], source at 0
    double* column_potential;  // [m]
    double sink_potential;
    Index* column_of;   // [n], -1 if free
    Index* row_of;      // [m], -1 if free
    double* free_cost;  // [m], cost of the cheapest free row
    Index* free_row;    // [m], which that is
    // of one search, [m]:
    double* distance;
    Index* from;      // row the path comes from
    double* to_sink;  // free columns: reduced cost of the step to the sink; else infinite
    double* closed;   // 0 for matched columns that may be scanned next; infinite for the others
    Index* seen;      // columns scanned
    double* settled;  // their distances; `distance` is -Inf meanwhile, so that rounding cannot improve on it

    void find_free_row(Index j) {
        double best = kInfinite;
        for (Index i = 0; i < costs.n; ++i)
            if (column_of[i] < 0 && double(costs.at(i, j)) < best) {
                best = double(costs.at(i, j));
                free_row[j] = i;
            }
        free_cost[j] = best;
    }

    void start() {
        for (Index i = 0; i < costs.n; ++i) {
            row_potential[i] = 0;
            column_of[i] = -1;
        }
        for (Index j = 0; j < costs.m; ++j) {
            row_of[j] = -1;
            free_row[j] = 0;
            free_cost[j] = kInfinite;
        }
        for (Index i = 0; i < costs.n; ++i)
            for (Index j = 0; j < costs.m; ++j) {
                const bool less = double(costs.at(i, j)) < free_cost[j];
                free_cost[j] = less ? double(costs.at(i, j)) : free_cost[j];
                free_row[j] = less ? i : free_row[j];
            }
        sink_potential = kInfinite;
        for (Index j = 0; j < costs.m; ++j) {
            column_potential[j] = free_cost[j];
            if (free_cost[j] < sink_potential) sink_potential = free_cost[j];
        }
    }

    // First column where distance + offset is `value`, which is there.
    Index find(const double* offset, double value) const {
        constexpr Index block = 64;
        Index j = 0;
        for (; j + block <= costs.m; j += block) {
            int hits = 0;
#pragma omp simd reduction(+ : hits)
            for (Index l = 0; l < block; ++l) hits += distance[j + l] + offset[j + l] == value;
            if (hits > 0) break;
        }
        while (distance[j] + offset[j] != value) ++j;
        return j;
    }

    // Steps from matched row i at distance `base` minus its potential. least and end: of the columns that may be scanned
    // next, and of the sink.
    void scan(Index i, double base, double& least, double& end) const {
        const T* row = costs.data + i * costs.row;
        double nearest = kInfinite, sink = kInfinite;
#pragma omp simd reduction(min : nearest, sink)
        for (Index j = 0; j < costs.m; ++j) {
            const double through = base + double(row[j]) - column_potential[j];
            const bool less = through < distance[j];
            const double d = less ? through : distance[j];
            from[j] = less ? i : from[j];
            distance[j] = d;
            const double open = d + closed[j], last = d + to_sink[j];
            nearest = open < nearest ? open : nearest;
            sink = last < sink ? last : sink;
        }
        least = nearest;
        end = sink;
    }

    // One more pair.
    void augment() {
        double least = kInfinite, end = kInfinite;
        for (Index j = 0; j < costs.m; ++j) {
            const bool matched = row_of[j] >= 0;
            from[j] = free_row[j];
            distance[j] = free_cost[j] - column_potential[j];
            to_sink[j] = matched ? kInfinite : column_potential[j] - sink_potential;
            closed[j] = matched ? 0 : kInfinite;  // free columns lead to the sink alone
            if (matched && distance[j] < least) least = distance[j];
            if (!matched && distance[j] + to_sink[j] < end) end = distance[j] + to_sink[j];
        }
        Index count = 0;
        while (least < end) {
            const Index j = find(closed, least);
            closed[j] = kInfinite;
            seen[count] = j;
            settled[count++] = distance[j];
            distance[j] = -kInfinite;
            scan(row_of[j], least + row_potential[row_of[j]], least, end);
        }
        for (Index e = 0; e < count; ++e) distance[seen[e]] = settled[e];
        const Index last = find(to_sink, end);
        // potentials grow by the distance, at most that of the sink; free rows are at distance 0
        for (Index i = 0; i < costs.n; ++i)
            if (column_of[i] >= 0) row_potential[i] += end;
        for (Index e = 0; e < count; ++e)
            if (distance[seen[e]] < end) row_potential[row_of[seen[e]]] -= end - distance[seen[e]];
        for (Index j = 0; j < costs.m; ++j) column_potential[j] += distance[j] < end ? distance[j] : end;
        sink_potential += end;
        // turn the path over, from its end
        Index started = -1;
        for (Index j = last; j >= 0;) {
            const Index i = from[j], before = column_of[i];
            column_of[i] = j;
            row_of[j] = i;
            started = i;
            j = before;
        }
        for (Index j = 0; j < costs.m; ++j)
            if (free_row[j] == started) find_free_row(j);
    }
};

inline std::size_t line(Index size) {
    return std::size_t(size + 7) / 8 * 64;
}

template <class T>
void match(Costs<T> costs, Index count, char* at, Index* pairs) {
    if (count == 0) return;
    const auto reals = [&at](Index size) {
        double* here = reinterpret_cast<double*>(at);
        at += line(size);
        return here;
    };
    const auto indices = [&reals](Index size) { return reinterpret_cast<Index*>(reals(size)); };
    const Index n = costs.n, m = costs.m;
    Flow<T> flow{costs,      reals(n), reals(m),   0,        indices(n), indices(m), reals(m),
                 indices(m), reals(m), indices(m), reals(m), reals(m),   indices(m), reals(m)};
    flow.start();
    for (Index k = 0; k < count; ++k) flow.augment();
    for (Index i = 0; i < n; ++i)
        if (flow.column_of[i] >= 0) {
            *pairs++ = i;
            *pairs++ = flow.column_of[i];
        }
}

}  // namespace

std::size_t optimal_workspace(Index n, Index m) {
    return 2 * line(n) + 10 * line(m);
}

void match_optimally(Costs<float> costs, Index count, void* work, Index* pairs) {
    match(costs, count, static_cast<char*>(work), pairs);
}

void match_optimally(Costs<double> costs, Index count, void* work, Index* pairs) {
    match(costs, count, static_cast<char*>(work), pairs);
}

}  // namespace mtz::cpu::MTZ_ISA
