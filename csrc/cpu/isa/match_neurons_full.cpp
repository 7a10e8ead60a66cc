// All min(n, m) pairs of least total cost.
#include "cpu/isa/assignment.h"

namespace mtz::cpu::MTZ_ISA {
namespace {

template <class T>
void match(Costs<T> costs, void* work, Index* pairs) {
    Arrays space(static_cast<char*>(work));
    Assignment<T> assignment = make_assignment(costs, space);
    assignment.no_prices();
    assignment.run();
    for (Index i = 0; i < costs.n; ++i) {
        *pairs++ = i;
        *pairs++ = assignment.column_of[i];
    }
}

}  // namespace

std::size_t full_workspace(Index n, Index m) {
    Arrays space(nullptr);
    make_assignment(Costs<double>{nullptr, n, m, m}, space);
    return space.used();
}

void match_fully(Costs<float> costs, void* work, Index* pairs) {
    match(costs, work, pairs);
}

void match_fully(Costs<double> costs, void* work, Index* pairs) {
    match(costs, work, pairs);
}

}  // namespace mtz::cpu::MTZ_ISA
