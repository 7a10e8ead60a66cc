// Exact where rows are nearly equal: differences first, or wherever a product cancels. See mtz/neuron_distances.h.
#include "mtz/neuron_distances.h"

#include "cpu/isa/kernels.h"
#include "cpu/isa/screened.h"
#include "cpu/isa/threads.h"

namespace mtz::cpu::MTZ_ISA {
namespace {

struct Screened {};  // Difference, by products where that is as good

template <class Op, class T>
inline Index workspace_of(const Blocks& blocks) {
    return std::is_same_v<Op, Screened> ? screened_workspace<T>(blocks) : block_workspace<T>(blocks);
}

// out[p, i, j] = scale * sum_k op(a[p, i, k], b[p, j, k]) in T, all blocks of all matrices shared out to the threads.
template <class Op, class In, class T, class Out>
void all_pairs(Index batch, Index n, Index m, Index d, const Matrices& a, const Matrices& b, T scale, Out* out,
               T* workspace, int threads) {
    threads = worth(threads, double(batch * n * m) * double(d) / kPanel<T>);
    const Blocks blocks = choose_blocks<T>(batch, n, m, threads);
    const Index per_matrix = blocks.down * blocks.across, tasks = batch * per_matrix;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (Index task = 0; task < tasks; ++task) {
        const Index p = task / per_matrix, i = task % per_matrix / blocks.across * blocks.rows;
        const Index j = task % blocks.across * blocks.columns;
        const In* from_a = static_cast<const In*>(a.data) + p * a.batch_stride + i * a.row_stride;
        const In* from_b = static_cast<const In*>(b.data) + p * b.batch_stride + j * b.row_stride;
        const Index rows = smaller(blocks.rows, n - i), columns = smaller(blocks.columns, m - j);
        Out* to = out + (p * n + i) * m + j;
        T* work = workspace + thread_number() * workspace_of<Op, T>(blocks);
        if constexpr (std::is_same_v<Op, Screened>)
            screened_block(from_a, a.row_stride, a.column_stride, from_b, b.row_stride, b.column_stride, rows, columns,
                           d, to, m, blocks, work);
        else
            block_of_rows<Op>(from_a, a.row_stride, a.column_stride, from_b, b.row_stride, b.column_stride, rows,
                              columns, d, scale, to, m, blocks, work);
    }
}

template <class Op, class T>
std::size_t pairs_workspace(Index batch, Index n, Index m, Index d, int threads) {
    if (batch * n * m == 0) return 0;
    threads = worth(threads, double(batch * n * m) * double(d) / kPanel<T>);
    return sizeof(T) * threads * workspace_of<Op, T>(choose_blocks<T>(batch, n, m, threads));
}

template <class Op, class T, class Out>
void distances(const NeuronDistancesArgs& g, void* workspace, int threads) {
    all_pairs<Op, T>(g.batch, g.n, g.m, g.d, g.a, g.b, T(0.5), static_cast<Out*>(g.out), static_cast<T*>(workspace),
                     threads);
}

template <class In>
void project(const ProjectionArgs& g, void* workspace, int threads) {
    const Matrices columns{g.factor.data, g.factor.batch_stride, g.factor.column_stride, g.factor.row_stride};
    all_pairs<Product, In>(g.batch, g.n, g.r, g.d, g.a, columns, 1.0, g.out, static_cast<double*>(workspace), threads);
}

}  // namespace

std::size_t neuron_distances_workspace(const NeuronDistancesArgs& g, int threads) {
    return g.in == Scalar::float64 ? pairs_workspace<Screened, double>(g.batch, g.n, g.m, g.d, threads)
                                   : pairs_workspace<Screened, float>(g.batch, g.n, g.m, g.d, threads);
}

Status neuron_distances(const NeuronDistancesArgs& g, void* workspace, int threads) {
    const bool doubles = g.in == Scalar::float64, to_doubles = g.out_scalar == Scalar::float64;
    if (!doubles && (g.in != Scalar::float32 || to_doubles)) return {Code::unsupported};
    if (g.batch * g.n * g.m == 0) return {};
    const bool screened = g.d >= kWorthScreening;
    if (to_doubles)  // to fifteen digits
        distances<Difference, double, double>(g, workspace, threads);
    else if (doubles)
        screened ? distances<Screened, double, float>(g, workspace, threads)
                 : distances<Difference, double, float>(g, workspace, threads);
    else
        screened ? distances<Screened, float, float>(g, workspace, threads)
                 : distances<Difference, float, float>(g, workspace, threads);
    return {};
}

std::size_t projection_workspace(const ProjectionArgs& g, int threads) {
    return pairs_workspace<Product, double>(g.batch, g.n, g.r, g.d, threads);
}

Status projection(const ProjectionArgs& g, void* workspace, int threads) {
    if (g.in != Scalar::float32 && g.in != Scalar::float64) return {Code::unsupported};
    if (g.batch * g.n * g.r == 0) return {};
    if (g.in == Scalar::float32)
        project<float>(g, workspace, threads);
    else
        project<double>(g, workspace, threads);
    return {};
}

}  // namespace mtz::cpu::MTZ_ISA
