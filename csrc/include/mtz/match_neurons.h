// One-to-one matching of `count` pairs (i, j) of a cost matrix, count <= min(n, m):
//
//     greedy    take the cheapest pair whose row and column are both free, `count` times; this is the order of the
//     output; optimal   the `count` pairs of least total cost (a linear assignment of fixed cardinality), cheapest pair
//     first.
//
// Ties are broken by (row, column), so the result is a function of the matrix alone. Costs of any sign and +-Inf order
// as usual for greedy; optimal needs finite costs. NaN has no order:
//     status[p] = flat index i * m + j of the first NaN of matrix p (for optimal: of the first value that is not
//     finite),
//                 -1 if there is none; the pairs of a matrix with status >= 0 are all written as -1.
//
// Types: float32 and float64. Only greedy is native on CUDA; optimal there is Code::unsupported.
#pragma once

#include "mtz/common.h"

namespace mtz {

enum class MatchMethod : std::int32_t { greedy = 0, optimal = 1 };

struct MatchNeuronsArgs {
    Scalar scalar;
    MatchMethod method;
    std::int64_t batch, n, m, count;
    Matrices distances;    // [batch, n, m]
    std::int64_t* pairs;   // [batch, count, 2], contiguous: (row, column)
    std::int64_t* status;  // [batch]
};

namespace cpu {
std::size_t match_neurons_workspace(const MatchNeuronsArgs& args, int threads);
Status match_neurons(const MatchNeuronsArgs& args, void* workspace, int threads);
}  // namespace cpu

namespace cuda {
std::size_t match_neurons_workspace(const MatchNeuronsArgs& args);
Status match_neurons(const MatchNeuronsArgs& args, void* workspace, void* stream);
}  // namespace cuda

}  // namespace mtz
