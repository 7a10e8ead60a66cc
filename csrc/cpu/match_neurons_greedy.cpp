// Greedy matching by mutual nearest neighbours.
//
// A pair that is cheapest in its row and in its column, ties broken by (row, column), is one that greedy takes sooner or
// later, whatever happens elsewhere: so all such pairs are taken at once, and what is left is compacted. On independent
// costs a round matches about half of the rows, and all rounds together read the matrix 4/3 times; with hubs, neurons that
// many others are close to, a round may match a single pair (cost r_i + c_j): as soon as one matches less than an eighth,
// the rows left are sorted and a heap of their heads does the rest.
#include <algorithm>
#include <cstring>
#include <type_traits>
#include <utility>

#include "cpu/match_neurons.h"

namespace mtz::cpu {
namespace {

using Index = std::int64_t;
using Small = std::int32_t;

// The column of the smallest cost of every row, the first one of several.
template <class T>
void nearest_columns(const Costs<T>& costs, int threads, Small* nearest) {
    constexpr Index lanes = 64 / sizeof(T);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (Index i = 0; i < costs.n; ++i) {
        const T* row = costs.data + i * costs.row;
        T least[lanes];
        for (Index l = 0; l < lanes; ++l) least[l] = row[0];
        Index j = 0;
        for (; j + lanes <= costs.m; j += lanes)
            for (Index l = 0; l < lanes; ++l) least[l] = row[j + l] < least[l] ? row[j + l] : least[l];
        T best = least[0];
        for (Index l = 1; l < lanes; ++l) best = least[l] < best ? least[l] : best;
        for (; j < costs.m; ++j) best = row[j] < best ? row[j] : best;
        Index at = 0;
        while (row[at] != best) ++at;
        nearest[i] = Small(at);
    }
}

// The row of the smallest cost of every column, the first one of several. `best` [m].
template <class T>
void nearest_rows(const Costs<T>& costs, int threads, T* best, Small* nearest) {
    using Same = std::conditional_t<sizeof(T) == 4, std::int32_t, std::int64_t>;  // as wide as T, for vectors
    constexpr Index strip = 512;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (Index j0 = 0; j0 < costs.m; j0 += strip) {
        const Index width = std::min(strip, costs.m - j0);
        Same index[strip];
        T* least = best + j0;
        for (Index j = 0; j < width; ++j) {
            least[j] = costs.at(0, j0 + j);
            index[j] = 0;
        }
        for (Index i = 1; i < costs.n; ++i) {
            const T* row = costs.data + i * costs.row + j0;
            for (Index j = 0; j < width; ++j) {
                const bool less = row[j] < least[j];
                index[j] = less ? Same(i) : index[j];
                least[j] = less ? row[j] : least[j];
            }
        }
        for (Index j = 0; j < width; ++j) nearest[j0 + j] = Small(index[j]);
    }
}

// What is left of a matrix and which rows and columns of the original that is.
struct Left {
    Small *rows, *columns;
};

inline std::size_t round_up(std::size_t bytes) {
    return (bytes + 63) / 64 * 64;
}

// An unsigned number in the order of x; -0 and 0 are one.
inline std::uint32_t ordered(float x) {
    std::uint32_t bits;
    x += 0.0f;
    std::memcpy(&bits, &x, sizeof bits);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

inline std::uint64_t ordered(double x) {
    std::uint64_t bits;
    x += 0.0;
    std::memcpy(&bits, &x, sizeof bits);
    return bits & (std::uint64_t(1) << 63) ? ~bits : bits | std::uint64_t(1) << 63;
}

template <class T>
struct SortScratch {
    using Key = decltype(ordered(T()));
    static constexpr int kBits = 11, kPasses = (8 * int(sizeof(T)) + kBits - 1) / kBits, kDigits = 1 << kBits;
    Key *keys, *other_keys;    // [m]
    Small* other;              // [m]
    Small (*counts)[kDigits];  // [kPasses]

    static std::size_t bytes(Index m) {
        return std::size_t(m) * (2 * sizeof(Key) + sizeof(Key)) + kPasses * kDigits * 4;
    }

    explicit SortScratch(char* at, Index m) {
        keys = reinterpret_cast<Key*>(at);
        other_keys = keys + m;
        other = reinterpret_cast<Small*>(other_keys + m);
        counts = reinterpret_cast<Small(*)[kDigits]>(other_keys + 2 * m);
    }
};

// Columns of a row in order of cost, equal ones by number: a radix sort from the lowest digit up.
template <class T>
void sort_row(const T* row, Index m, SortScratch<T> scratch, Small* list) {
    using S = SortScratch<T>;
    std::memset(scratch.counts, 0, sizeof(Small) * S::kPasses * S::kDigits);
    for (Index j = 0; j < m; ++j) {
        const auto key = ordered(row[j]);
        scratch.keys[j] = key;
        list[j] = Small(j);
        for (int pass = 0; pass < S::kPasses; ++pass)
            ++scratch.counts[pass][key >> (pass * S::kBits) & (S::kDigits - 1)];
    }
    auto *keys = scratch.keys, *to_keys = scratch.other_keys;
    Small *from = list, *to = scratch.other;
    for (int pass = 0; pass < S::kPasses; ++pass) {
        Small* counts = scratch.counts[pass];
        if (counts[keys[0] >> (pass * S::kBits) & (S::kDigits - 1)] == m) continue;  // all digits are the same
        for (Small digit = 0, sum = 0; digit < S::kDigits; ++digit) sum += std::exchange(counts[digit], sum);
        for (Index j = 0; j < m; ++j) {
            const Small at = counts[keys[j] >> (pass * S::kBits) & (S::kDigits - 1)]++;
            to_keys[at] = keys[j];
            to[at] = from[j];
        }
        std::swap(keys, to_keys);
        std::swap(from, to);
    }
    if (from != list) std::copy(from, from + m, list);
}

// Rows by the cost of their cheapest free column, the cheapest row on top, ties by row: a binary heap.
template <class T>
struct Heap {
    struct Entry {
        T cost;
        Small row;
        bool before(const Entry& o) const { return cost < o.cost || (cost == o.cost && row < o.row); }
    };
    Entry* entries;
    Index size;

    void sink(Index at) {
        const Entry moved = entries[at];
        for (Index child; (child = 2 * at + 1) < size; at = child) {
            if (child + 1 < size && entries[child + 1].before(entries[child])) ++child;
            if (!entries[child].before(moved)) break;
            entries[at] = entries[child];
        }
        entries[at] = moved;
    }
};

// Greedy by its definition on rows sorted by cost: `order` [n, m], `head` [n].
template <class T>
void match_sorted(const Costs<T>& costs, const Left& left, int threads, Small* order, Small* head, void* entries,
                  bool* taken, char* scratch, Index* pairs) {
    const Index n = costs.n, m = costs.m;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int t = 0; t < threads; ++t)
        for (Index i = t; i < n; i += threads)
            sort_row(costs.data + i * costs.row, m, SortScratch<T>(scratch + t * round_up(SortScratch<T>::bytes(m)), m),
                     order + i * m);
    Heap<T> heap{static_cast<typename Heap<T>::Entry*>(entries), n};
    for (Index i = 0; i < n; ++i) heap.entries[i] = {costs.at(i, order[i * m]), Small(i)};
    for (Index at = n / 2; at >= 0; --at) heap.sink(at);
    std::fill(head, head + n, 0);
    std::fill(taken, taken + m, false);
    for (Index found = 0; found < std::min(n, m);) {
        const Small i = heap.entries[0].row;
        const Small* list = order + i * m;
        bool keep = false;
        if (!taken[list[head[i]]]) {
            taken[list[head[i]]] = true;
            *pairs++ = left.rows[i];
            *pairs++ = left.columns[list[head[i]]];
            ++found;
        } else {
            while (head[i] < m && taken[list[head[i]]]) ++head[i];
            keep = head[i] < m;
        }
        heap.entries[0] = keep ? typename Heap<T>::Entry{costs.at(i, list[head[i]]), i} : heap.entries[--heap.size];
        if (heap.size > 0) heap.sink(0);
    }
}

// The rows and columns of `from` that are marked to stay, next to each other.
template <class T>
Costs<T> compact(const Costs<T>& from, const Small* rows, Index n, const Small* columns, Index m, int threads, T* to) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (Index i = 0; i < n; ++i) {
        const T* row = from.data + rows[i] * from.row;
        for (Index j = 0; j < m; ++j) to[i * m + j] = row[columns[j]];
    }
    return {to, n, m, m};
}

}  // namespace

// Two matrices to compact into in turn (the one not in use holds the sorted rows), a few numbers a row and column, and
// what a thread needs to sort a row.
std::size_t greedy_workspace(const MatchNeuronsArgs& g, int threads) {
    const std::size_t matrix = round_up(std::size_t(g.n * g.m) * scalar_size(g.scalar));
    const std::size_t lines = 9 * round_up(std::size_t(std::max(g.n, g.m)) * sizeof(std::int64_t));
    return 2 * matrix + lines + threads * round_up(SortScratch<double>::bytes(g.m));
}

template <class T>
void match_greedily(Costs<T> costs, void* workspace, int threads, std::int64_t* pairs) {
    const std::size_t matrix = round_up(std::size_t(costs.n * costs.m) * sizeof(T));
    const std::size_t line = round_up(std::size_t(std::max(costs.n, costs.m)) * sizeof(std::int64_t));
    char* at = static_cast<char*>(workspace);
    const auto take = [&at](std::size_t bytes) { return std::exchange(at, at + bytes); };
    T* buffers[2] = {reinterpret_cast<T*>(take(matrix)), reinterpret_cast<T*>(take(matrix))};
    const auto small = [&] { return reinterpret_cast<Small*>(take(line)); };
    const Left left{small(), small()};
    Small *column_of = small(), *row_of = small(), *rows = small(), *columns = small();
    T* best = reinterpret_cast<T*>(take(line));
    void* entries = take(2 * line);
    for (Index i = 0; i < costs.n; ++i) left.rows[i] = Small(i);
    for (Index j = 0; j < costs.m; ++j) left.columns[j] = Small(j);

    for (int next = 0; costs.n > 0 && costs.m > 0; next ^= 1) {
        nearest_columns(costs, threads, column_of);
        nearest_rows(costs, threads, best, row_of);
        Index n = 0, m = 0;
        for (Index i = 0; i < costs.n; ++i) {
            if (row_of[column_of[i]] == i) {
                *pairs++ = left.rows[i];
                *pairs++ = left.columns[column_of[i]];
            } else {
                rows[n++] = Small(i);
            }
        }
        for (Index j = 0; j < costs.m; ++j)
            if (column_of[row_of[j]] != j) columns[m++] = Small(j);
        const bool few = (costs.n - n) * 8 < std::min(costs.n, costs.m);
        costs = compact(costs, rows, n, columns, m, threads, buffers[next]);
        for (Index i = 0; i < n; ++i) left.rows[i] = left.rows[rows[i]];
        for (Index j = 0; j < m; ++j) left.columns[j] = left.columns[columns[j]];
        if (few && n > 0 && m > 0) {
            match_sorted(costs, left, threads, reinterpret_cast<Small*>(buffers[next ^ 1]), column_of, entries,
                         reinterpret_cast<bool*>(best), at, pairs);
            return;
        }
    }
}

template void match_greedily<float>(Costs<float>, void*, int, std::int64_t*);
template void match_greedily<double>(Costs<double>, void*, int, std::int64_t*);

}  // namespace mtz::cpu
