// Linear assignment of fixed cardinality by successive shortest augmenting paths.
//
// Pairs are units of flow from a source through rows and columns to a sink; after k augmentations along a shortest path
// the flow is the cheapest of k units, so exactly k pairs need neither dummy rows nor a forbidden corner. Node potentials
// keep reduced costs c_ij + p(i) - p(j) >= 0 and zero on matched pairs, so Dijkstra's algorithm finds the path (Edmonds
// and Karp 1972; Tomizawa 1971). Free rows keep the potential of the source, so a path starts at the cheapest free row of
// each column, which is kept up to date, and only matched rows on the way are scanned.
//
// Where that turns out long, and there are as many columns as rows, the flow starts again near its end: an assignment with a
// cap (assignment.h) gives the cheapest pairs of some number, and with them the potentials. The cap is searched for until
// that number is count or little less; few augmentations are left then. Prices only rise with the cap, so each search starts
// from those of the largest cap that was too small.
#include "cpu/isa/assignment.h"

namespace mtz::cpu::MTZ_ISA {
namespace {

constexpr Index kScans = 64;  // of rows, times n, before an auction is worth while
constexpr Index kColumn = 4;  // scans of a row that going down a column takes the time of
constexpr int kTries = 16;    // caps

template <class T>
struct Flow {
    Costs<T> costs;
    double* row_potential = nullptr;     // [n], source at 0
    double* column_potential = nullptr;  // [m]
    double sink_potential = 0;
    Index* column_of = nullptr;   // [n], -1 if free
    Index* row_of = nullptr;      // [m], -1 if free
    double* free_cost = nullptr;  // [m], cost of the cheapest free row
    Index* free_row = nullptr;    // [m], which that is
    // of one search, [m]:
    double* distance = nullptr;
    Index* from = nullptr;      // row the path comes from
    double* to_sink = nullptr;  // free columns: reduced cost of the step to the sink; else infinite
    double* closed = nullptr;   // 0 for matched columns that may be scanned next; infinite for the others
    Index* seen = nullptr;      // columns scanned
    double* settled = nullptr;  // their distances; `distance` is -Inf meanwhile, so that rounding cannot improve on it

    void find_free_row(Index j) {
        double best = kInfinite;
        for (Index i = 0; i < costs.n; ++i)
            if (column_of[i] < 0 && double(costs.at(i, j)) < best) {
                best = double(costs.at(i, j));
                free_row[j] = i;
            }
        free_cost[j] = best;
    }

    void find_free_rows() {
        for (Index j = 0; j < costs.m; ++j) {
            free_row[j] = 0;
            free_cost[j] = kInfinite;
        }
        for (Index i = 0; i < costs.n; ++i) {
            if (column_of[i] >= 0) continue;
            for (Index j = 0; j < costs.m; ++j) {
                const bool less = double(costs.at(i, j)) < free_cost[j];
                free_cost[j] = less ? double(costs.at(i, j)) : free_cost[j];
                free_row[j] = less ? i : free_row[j];
            }
        }
    }

    // From pairs that are the cheapest of their number, and not all: those of `found` below its cap. Rows and columns that
    // have none then pay the cap together, and as each of them could take any other of them, all have the same potential.
    void start_from(const Assignment<T>& found) {
        double free_potential = -kInfinite;
        for (Index j = 0; j < costs.m; ++j)
            free_potential = found.potential[j] > free_potential ? found.potential[j] : free_potential;
        const double offset = found.cap - free_potential;
        for (Index j = 0; j < costs.m; ++j) {
            row_of[j] = -1;
            column_potential[j] = found.cap;
        }
        for (Index i = 0; i < costs.n; ++i) {
            const Index j = found.column_of[i];
            const double c = double(costs.at(i, j));
            column_of[i] = -1;
            row_potential[i] = 0;
            if (!(c < found.cap)) continue;
            column_of[i] = j;
            row_of[j] = i;
            column_potential[j] = offset + found.potential[j];
            row_potential[i] = column_potential[j] - c;
        }
        sink_potential = found.cap;
        find_free_rows();
    }

    void start() {
        for (Index i = 0; i < costs.n; ++i) {
            row_potential[i] = 0;
            column_of[i] = -1;
        }
        for (Index j = 0; j < costs.m; ++j) row_of[j] = -1;
        find_free_rows();
        sink_potential = kInfinite;
        for (Index j = 0; j < costs.m; ++j) {
            column_potential[j] = free_cost[j];
            if (free_cost[j] < sink_potential) sink_potential = free_cost[j];
        }
    }

    // First column where distance + offset is `value`, which is there.
    Index find(const double* offset, double value) const {
        return first_of(costs.m, [&](Index j) { return distance[j] + offset[j] == value; });
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

    // One more pair; returns how many rows and columns were gone through for it.
    Index augment() {
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
            if (free_row[j] == started) {
                find_free_row(j);
                count += kColumn;
            }
        return count;
    }
};

template <class T>
Flow<T> make_flow(Costs<T> costs, Arrays& space) {
    const Index n = costs.n, m = costs.m;
    Flow<T> made{costs};
    made.row_potential = space.reals(n);
    made.column_potential = space.reals(m);
    made.column_of = space.indices(n);
    made.row_of = space.indices(m);
    made.free_cost = space.reals(m);
    made.free_row = space.indices(m);
    made.distance = space.reals(m);
    made.from = space.indices(m);
    made.to_sink = space.reals(m);
    made.closed = space.reals(m);
    made.seen = space.indices(m);
    made.settled = space.reals(m);
    return made;
}

template <class T>
Index below_cap(const Assignment<T>& found) {
    Index pairs = 0;
    for (Index i = 0; i < found.costs.n; ++i) pairs += double(found.row(i)[found.column_of[i]]) < found.cap;
    return pairs;
}

// Starts `flow` from the cheapest pairs of a number that is `count` or less by few; returns that number.
template <class T>
Index start_near(Flow<T>& flow, Assignment<T>& found, double* prices, Index count) {
    const Index n = flow.costs.n, few = 4 + n / 64;
    double low = kInfinite, cap = -kInfinite;  // the least cost; and so that every row has a cost below the cap
    for (Index i = 0; i < n; ++i) {
        double least = kInfinite;
        for (Index j = 0; j < n; ++j) least = double(found.row(i)[j]) < least ? double(found.row(i)[j]) : least;
        low = least < low ? least : low;
        cap = least > cap ? least : cap;
    }
    found.no_prices();
    for (Index j = 0; j < n; ++j) prices[j] = 0;
    double below = low, above = kInfinite;
    Index at_below = 0, at_above = n, started = -1;
    for (int tries = 0; tries < kTries && low < cap && cap < above; ++tries) {
        found.cap = cap;
        found.run();
        const Index pairs = below_cap(found);
        if (pairs <= count && pairs > started) {
            flow.start_from(found);
            started = pairs;
        }
        if (pairs <= count && pairs >= count - few) break;
        if (pairs <= count) {
            below = cap;
            at_below = pairs;
            for (Index j = 0; j < n; ++j) prices[j] = found.potential[j];
        } else {
            above = cap;
            at_above = pairs;
            for (Index j = 0; j < n; ++j) found.potential[j] = prices[j];
        }
        if (above < kInfinite) {
            const double part = (double(count) - 0.5 * double(few) - double(at_below)) / double(at_above - at_below);
            cap = below + (part < 0.1 ? 0.1 : part > 0.9 ? 0.9 : part) * (above - below);
        } else {
            cap = low + 2 * (cap - low);
        }
    }
    if (started >= 0) return started;
    flow.start();
    return 0;
}

template <class T>
void match(Costs<T> costs, Index count, void* work, Index* pairs) {
    if (count == 0) return;
    Arrays space(static_cast<char*>(work));
    Flow<T> flow = make_flow(costs, space);
    flow.start();
    // Most costs need few scans; where all rows like the same columns, or the other way round, a path goes through them all.
    Index scans = 0, most = costs.n == costs.m ? kScans * costs.n : -1;
    for (Index there = 0; there < count; ++there) {
        scans += flow.augment();
        if (most < 0 || scans <= most) continue;
        Assignment<T> found = make_assignment(costs, space);
        there = start_near(flow, found, space.reals(costs.m), count) - 1;
        most = -1;
    }
    for (Index i = 0; i < costs.n; ++i)
        if (flow.column_of[i] >= 0) {
            *pairs++ = i;
            *pairs++ = flow.column_of[i];
        }
}

}  // namespace

std::size_t optimal_workspace(Index n, Index m) {
    Arrays space(nullptr);
    const Costs<double> costs{nullptr, n, m, m};
    make_flow(costs, space);
    make_assignment(costs, space);
    space.reals(m);  // prices
    return space.used();
}

void match_optimally(Costs<float> costs, Index count, void* work, Index* pairs) {
    match(costs, count, work, pairs);
}

void match_optimally(Costs<double> costs, Index count, void* work, Index* pairs) {
    match(costs, count, work, pairs);
}

}  // namespace mtz::cpu::MTZ_ISA
