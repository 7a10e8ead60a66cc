#include "mtz/neuron_distances.h"

#include "cpu/isa/kernels.h"

namespace mtz::cpu::MTZ_ISA {
namespace {

template <class In, class Out>
void run(const NeuronDistancesArgs& g, int threads) {
    const In* a = static_cast<const In*>(g.a.data);
    const In* b = static_cast<const In*>(g.b.data);
    Out* out = static_cast<Out*>(g.out);
#pragma omp parallel for num_threads(threads) collapse(2)
    for (std::int64_t p = 0; p < g.batch; ++p)
        for (std::int64_t i = 0; i < g.n; ++i)
            for (std::int64_t j = 0; j < g.m; ++j) {
                double sum = 0;
                for (std::int64_t q = 0; q < g.d; ++q) {
                    const double e = double(a[p * g.a.batch_stride + i * g.a.row_stride + q * g.a.column_stride]) -
                                     double(b[p * g.b.batch_stride + j * g.b.row_stride + q * g.b.column_stride]);
                    sum += e * e;
                }
                out[(p * g.n + i) * g.m + j] = Out(0.5 * sum);
            }
}

}  // namespace

std::size_t neuron_distances_workspace(const NeuronDistancesArgs&, int) {
    return 0;
}

Status neuron_distances(const NeuronDistancesArgs& g, void*, int threads) {
    if (g.in == Scalar::float32 && g.out_scalar == Scalar::float32)
        run<float, float>(g, threads);
    else if (g.in == Scalar::float64 && g.out_scalar == Scalar::float64)
        run<double, double>(g, threads);
    else if (g.in == Scalar::float64 && g.out_scalar == Scalar::float32)
        run<double, float>(g, threads);
    else
        return {Code::unsupported};
    return {};
}

}  // namespace mtz::cpu::MTZ_ISA
