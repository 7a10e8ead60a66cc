#include "cpu/dispatch.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

#include "cpu/isa/kernels.h"

namespace mtz::cpu {
namespace {

struct Entry {
    Isa isa;
    const char* name;
};

bool runs_here(Isa isa) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (isa == Isa::avx512)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
    if (isa == Isa::avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
    return isa == Isa::generic;
}

constexpr Entry kCompiled[] = {
#ifdef MTZ_HAS_AVX512
    {Isa::avx512, "avx512"},
#endif
#ifdef MTZ_HAS_AVX2
    {Isa::avx2, "avx2"},
#endif
    {Isa::generic, "generic"},
};

const Entry* find(const char* name) {
    for (const Entry& e : kCompiled)
        if (runs_here(e.isa) && (name == nullptr || std::strcmp(e.name, name) == 0)) return &e;
    return nullptr;
}

std::atomic<const Entry*>& chosen() {
    // an unknown name in the environment falls back to the best; mtz_ext checks the variable and complains
    static std::atomic<const Entry*> entry{[] {
        const char* name = std::getenv("MTZ_ISA");
        const Entry* e = name != nullptr && *name != '\0' ? find(name) : nullptr;
        return e != nullptr ? e : find(nullptr);
    }()};
    return entry;
}

}  // namespace

int available_isas(const char* names[3]) {
    int count = 0;
    for (const Entry& e : kCompiled)
        if (runs_here(e.isa)) names[count++] = e.name;
    return count;
}

const char* isa() {
    return chosen().load()->name;
}

bool use_isa(const char* name) {
    const Entry* e = find(name);
    if (e != nullptr) chosen().store(e);
    return e != nullptr;
}

Isa current_isa() {
    return chosen().load()->isa;
}

std::size_t neuron_distances_workspace(const NeuronDistancesArgs& args,
                                       int threads){MTZ_DISPATCH(neuron_distances_workspace(args, threads))} Status
    neuron_distances(const NeuronDistancesArgs& args, void* workspace,
                     int threads){MTZ_DISPATCH(neuron_distances(args, workspace, threads))}

std::size_t projection_workspace(const ProjectionArgs& args,
                                 int threads){MTZ_DISPATCH(projection_workspace(args, threads))} Status
    projection(const ProjectionArgs& args, void* workspace,
               int threads){MTZ_DISPATCH(projection(args, workspace, threads))}

std::size_t sherman_morrison_workspace(const ShermanMorrisonArgs& args,
                                       int threads){MTZ_DISPATCH(sherman_morrison_workspace(args, threads))} Status
    sherman_morrison(const ShermanMorrisonArgs& args, void* workspace, int threads) {
    MTZ_DISPATCH(sherman_morrison(args, workspace, threads))
}

}  // namespace mtz::cpu
