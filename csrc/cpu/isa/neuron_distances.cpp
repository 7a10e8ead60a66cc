// Differences first, squares after: exact where rows are nearly equal. See mtz/neuron_distances.h.
#include "mtz/neuron_distances.h"

#include "cpu/isa/kernels.h"
#include "cpu/isa/rows.h"
#include "cpu/isa/threads.h"

namespace mtz::cpu::MTZ_ISA {
namespace {

template <class T, class Out>
void run(const NeuronDistancesArgs& g, T* workspace, int threads) {
    const Blocks blocks = choose_blocks<T>(g.batch, g.n, g.m, threads);
    const Index per_matrix = blocks.down * blocks.across, tasks = g.batch * per_matrix;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (Index task = 0; task < tasks; ++task) {
        const Index p = task / per_matrix, i = task % per_matrix / blocks.across * blocks.rows;
        const Index j = task % blocks.across * blocks.columns;
        block_of_rows<Difference>(
            static_cast<const T*>(g.a.data) + p * g.a.batch_stride + i * g.a.row_stride, g.a.row_stride,
            g.a.column_stride, static_cast<const T*>(g.b.data) + p * g.b.batch_stride + j * g.b.row_stride,
            g.b.row_stride, g.b.column_stride, smaller(blocks.rows, g.n - i), smaller(blocks.columns, g.m - j), g.d,
            T(0.5), static_cast<Out*>(g.out) + (p * g.n + i) * g.m + j, g.m, blocks,
            workspace + thread_number() * block_workspace<T>(blocks));
    }
}

}  // namespace

std::size_t neuron_distances_workspace(const NeuronDistancesArgs& g, int threads) {
    if (g.batch * g.n * g.m == 0) return 0;
    return g.in == Scalar::float64
               ? sizeof(double) * threads * block_workspace<double>(choose_blocks<double>(g.batch, g.n, g.m, threads))
               : sizeof(float) * threads * block_workspace<float>(choose_blocks<float>(g.batch, g.n, g.m, threads));
}

Status neuron_distances(const NeuronDistancesArgs& g, void* workspace, int threads) {
    const bool doubles = g.in == Scalar::float64, to_doubles = g.out_scalar == Scalar::float64;
    if (!doubles && (g.in != Scalar::float32 || to_doubles)) return {Code::unsupported};
    if (g.batch * g.n * g.m == 0) return {};
    if (!doubles)
        run<float, float>(g, static_cast<float*>(workspace), threads);
    else if (to_doubles)
        run<double, double>(g, static_cast<double*>(workspace), threads);
    else
        run<double, float>(g, static_cast<double*>(workspace), threads);
    return {};
}

}  // namespace mtz::cpu::MTZ_ISA
