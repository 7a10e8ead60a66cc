#include "cpu/isa/sherman_morrison.h"

#include "cpu/isa/kernels.h"
#include "cpu/isa/threads.h"

namespace mtz::cpu::MTZ_ISA {
namespace {

template <class T>
void run(const ShermanMorrisonArgs& g, T* work, int threads) {
    if (g.d > kSmall) {
        for (Index p = 0; p < g.batch; ++p) g.status[p] = update_large<T>(g, p, threads, work);
        return;
    }
    threads = worth(threads, double(g.batch * g.k) * double(g.d * g.d) * 3 / kPanel<T>);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (Index p = 0; p < g.batch; ++p)
        g.status[p] = update_small<T>(g, p, p + threads, work + thread_number() * small_workspace<T>(g.d));
}

template <class T>
std::size_t workspace(const ShermanMorrisonArgs& g, int threads) {
    return sizeof(T) * (g.d > kSmall ? large_workspace<T>(g, threads) : threads * small_workspace<T>(g.d));
}

}  // namespace

std::size_t sherman_morrison_workspace(const ShermanMorrisonArgs& g, int threads) {
    if (g.batch * g.d * g.k == 0) return 0;
    return g.scalar == Scalar::float64 ? workspace<double>(g, threads) : workspace<float>(g, threads);
}

Status sherman_morrison(const ShermanMorrisonArgs& g, void* work, int threads) {
    if (g.vector_scalar != g.scalar || (g.scalar != Scalar::float32 && g.scalar != Scalar::float64))
        return {Code::unsupported};
    if (g.d * g.k == 0)
        for (Index p = 0; p < g.batch; ++p) g.status[p] = kUpdated;
    else if (g.scalar == Scalar::float32)
        run(g, static_cast<float*>(work), threads);
    else
        run(g, static_cast<double*>(work), threads);
    return {};
}

}  // namespace mtz::cpu::MTZ_ISA
