// The ways of mtz/match_neurons.h, for one matrix.
#pragma once

#include "mtz/match_neurons.h"

namespace mtz::cpu {

// One cost matrix, columns contiguous.
template <class T>
struct Costs {
    const T* data;
    std::int64_t n, m, row;
    T at(std::int64_t i, std::int64_t j) const { return data[i * row + j]; }
};

// All min(n, m) greedy pairs, (row, column) in `pairs` [min(n, m), 2], in no particular order.
std::size_t greedy_workspace(const MatchNeuronsArgs& args, int threads);
template <class T>
void match_greedily(Costs<T> costs, void* workspace, int threads, std::int64_t* pairs);

// The `count` pairs of least total cost: cpu/isa/match_neurons_optimal.cpp.
std::size_t optimal_workspace(std::int64_t n, std::int64_t m);
template <class T>
void match_optimally(Costs<T> costs, std::int64_t count, void* workspace, std::int64_t* pairs);

// The same for count = n <= m, faster: cpu/isa/match_neurons_full.cpp.
std::size_t full_workspace(std::int64_t n, std::int64_t m);
template <class T>
void match_fully(Costs<T> costs, void* workspace, std::int64_t* pairs);

}  // namespace mtz::cpu
