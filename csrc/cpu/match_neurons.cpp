#include "mtz/match_neurons.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace mtz::cpu {
namespace {

template <class T>
void greedy(const MatchNeuronsArgs& g, std::int64_t p, std::uint32_t* order) {
    const T* data = static_cast<const T*>(g.distances.data) + p * g.distances.batch_stride;
    std::int64_t* pairs = g.pairs + p * g.count * 2;
    const auto cost = [&](std::int64_t e) {
        return data[e / g.m * g.distances.row_stride + e % g.m * g.distances.column_stride];
    };
    for (std::int64_t e = 0; e < g.n * g.m; ++e) {
        if (std::isnan(cost(e))) {
            g.status[p] = e;
            std::fill(pairs, pairs + 2 * g.count, -1);
            return;
        }
        order[e] = std::uint32_t(e);
    }
    g.status[p] = -1;
    std::sort(order, order + g.n * g.m,
              [&](std::uint32_t e, std::uint32_t f) { return cost(e) < cost(f) || (cost(e) == cost(f) && e < f); });
    std::vector<char> row(g.n), column(g.m);
    std::int64_t found = 0;
    for (std::int64_t e = 0; found < g.count; ++e) {
        const std::int64_t i = order[e] / g.m, j = order[e] % g.m;
        if (row[i] || column[j]) continue;
        row[i] = column[j] = 1;
        pairs[2 * found] = i;
        pairs[2 * found + 1] = j;
        ++found;
    }
}

}  // namespace

std::size_t match_neurons_workspace(const MatchNeuronsArgs& g, int) {
    return sizeof(std::uint32_t) * g.n * g.m;
}

Status match_neurons(const MatchNeuronsArgs& g, void* workspace, int) {
    if (g.method != MatchMethod::greedy) return {Code::unsupported};
    for (std::int64_t p = 0; p < g.batch; ++p) {
        if (g.scalar == Scalar::float32)
            greedy<float>(g, p, static_cast<std::uint32_t*>(workspace));
        else if (g.scalar == Scalar::float64)
            greedy<double>(g, p, static_cast<std::uint32_t*>(workspace));
        else
            return {Code::unsupported};
    }
    return {};
}

}  // namespace mtz::cpu
