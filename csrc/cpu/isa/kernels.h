// The kernels that are compiled once for every instruction set, each into a namespace of that name. csrc/cpu/isa/*.cpp
// must not use anything of the standard library that is a template or inline and not inlined: the linker would keep one
// copy for all instruction sets, possibly one the CPU cannot run.
#pragma once

#include "cpu/match_neurons.h"
#include "mtz/conv2d_second_moment.h"
#include "mtz/neuron_distances.h"
#include "mtz/sherman_morrison.h"

namespace mtz::cpu {

struct ShiftTerm;
struct ShiftPart;
struct ShiftBlock;

// A ShiftPlan without its vectors: for a panel of channels with itself, where (u, v) and (v, u) are transposes, and for
// two different ones.
struct ShiftPlans {
    struct View {
        const ShiftTerm* terms;
        const ShiftPart* parts;
        const ShiftBlock* blocks;
        std::int64_t term_count, block_count;
    };
    View half, full;
};

}  // namespace mtz::cpu

#define MTZ_DECLARE(isa)                                                                                  \
    namespace mtz::cpu::isa {                                                                             \
    std::size_t neuron_distances_workspace(const NeuronDistancesArgs&, int);                              \
    Status neuron_distances(const NeuronDistancesArgs&, void*, int);                                      \
    std::size_t projection_workspace(const ProjectionArgs&, int);                                         \
    Status projection(const ProjectionArgs&, void*, int);                                                 \
    std::size_t sherman_morrison_workspace(const ShermanMorrisonArgs&, int);                              \
    Status sherman_morrison(const ShermanMorrisonArgs&, void*, int);                                      \
    std::size_t second_moment_by_shifts_workspace(const Conv2dSecondMomentArgs&, const ShiftPlans&, int); \
    Status second_moment_by_shifts(const Conv2dSecondMomentArgs&, const ShiftPlans&, void*, int);         \
    std::size_t second_moment_by_unfolding_workspace(const Conv2dSecondMomentArgs&, int);                 \
    Status second_moment_by_unfolding(const Conv2dSecondMomentArgs&, void*, int);                         \
    std::size_t optimal_workspace(std::int64_t n, std::int64_t m);                                        \
    void match_optimally(Costs<float>, std::int64_t count, void*, std::int64_t* pairs);                   \
    void match_optimally(Costs<double>, std::int64_t count, void*, std::int64_t* pairs);                  \
    std::size_t full_workspace(std::int64_t n, std::int64_t m);                                           \
    void match_fully(Costs<float>, void*, std::int64_t* pairs);                                           \
    void match_fully(Costs<double>, void*, std::int64_t* pairs);                                          \
    }

MTZ_DECLARE(generic)
MTZ_DECLARE(avx2)
MTZ_DECLARE(avx512)
#undef MTZ_DECLARE
