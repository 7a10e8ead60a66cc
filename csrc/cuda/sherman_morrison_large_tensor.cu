// The two products of a round of large inverses on tensor cores, of float32: see cuda/sherman_morrison_large.cu. An update
// tile is square and of two warps, so that four are on a multiprocessor and some compute while others load and store.
#include "cuda/sherman_morrison_large_tensor.cuh"
#include "cuda/sherman_morrison_large_tiles.cuh"

namespace mtz::cuda {
namespace {

// For V, of one panel or two, and for the update.
template <int Panels>
using Tall = TensorPanel<kTensorRows / 32, Panels, 32, 3>;
using Update = TensorPanel<2, 1, 32, 2>;
using Tiles = Triangle<Update::kRows / K>;
static_assert(kSliceStep % Tall<1>::kDepth == 0);

// partial[slice, p, q, j] = sum over a slice of i of Y[q, i] A^-1[i, j]
template <bool Words, int Panels>
__global__ void __launch_bounds__(Tall<Panels>::kThreads, 2 / Panels)
    multiply_kernel(Index first_block, Large<float> w, int panels) {
    using P = Tall<Panels>;
    if (!kTensorCores) return;
    SharedMemory memory;
    const P shared(memory);
    const ShermanMorrisonArgs& g = w.g;
    const Index block = first_block + blockIdx.x, groups = panels / Panels, panel = block % groups * Panels,
                tile = block / groups;
    const Index p = tile / (w.across * w.slices), slice = tile / w.across % w.slices;
    const Index j0 = tile % w.across * P::kRows, first = slice * w.length;
    float sum[4][K / 4] = {};
    const bool any = add_product(
        TensorAcross<P, Words>(w.inverse(p) + first * g.inverse_row_stride + j0, g.inverse_row_stride,
                               smaller(P::kRows, g.d - j0)),
        TensorAlong<P>(w.y + (p * w.side + panel * K) * w.pitch + first, w.pitch), int(smaller(w.length, g.d - first)),
        !Words || j0 + P::kRows <= g.d || g.d % 4 == 0, shared, sum, [&] {
            wait_for_launch();  // neither it nor any before it that has not ended writes the matrix
            return !w.skipped(p);
        });
    if (!any) return copy_async_wait<0>();
    float* to = w.partial + ((slice * g.batch + p) * w.side + panel * K) * w.pitch + j0 + P::row();
    if (j0 + P::row() >= w.pitch) return;
#pragma unroll
    for (int c = 0; c < K / 4; ++c)
        store_words(to + (P::column(c / 4) + c % 4) * w.pitch, sum[0][c], sum[1][c], sum[2][c], sum[3][c]);
}

// A^-1 -= V^T D V in tiles of the upper triangle, and their mirror images.
template <bool Words>
__global__ void __launch_bounds__(Update::kThreads, 4) update_kernel(Index first_block, Large<float> w, int panels) {
    if (!kTensorCores) return;
    SharedMemory memory;
    const Update shared(memory);
    const ShermanMorrisonArgs& g = w.g;
    const Tiles tiles(g.d, Update::kRows);
    const Index block = first_block + blockIdx.x, p = block / tiles.count();
    Index i0, j0;
    const bool any = tiles.at(block % tiles.count(), i0, j0);
    i0 *= Update::kRows;
    j0 *= K;
    float* matrix = w.inverse(p);
    if (any) prefetch_tile<Update>(matrix, g.inverse_row_stride, g.d, i0, j0);
    wait_for_launch();
    if (!any || w.skipped(p)) return;
    float sum[4][K / 4] = {};
    add_product(
        TensorAcross<Update, true>(w.minus + p * w.side * w.pitch + i0, w.pitch, smaller(Update::kRows, w.pitch - i0)),
        TensorAlong<Update>(w.vt + (p * g.d + j0) * w.side, w.side), panels * K, true, shared, sum,
        [] { return true; });
    add_to_matrix<Words, Update>(matrix, g.inverse_row_stride, g.d, i0, j0, sum);
}

}  // namespace

template <int Panels>
cudaError_t multiply_panels(const Large<float>& w, int panels, bool words, Queue queue) {
    const auto multiply = words ? multiply_kernel<true, Panels> : multiply_kernel<false, Panels>;
    return launch_in_turn(multiply, w.g.batch * w.across * w.slices * (panels / Panels), Tall<Panels>::kThreads,
                          Tall<Panels>::bytes(), queue, w, panels);
}

// Two panels at a time, if they are of an even number: then an element comes from L2 for both.
cudaError_t multiply_on_tensor_cores(const Large<float>& w, int panels, bool words, Queue queue) {
    return panels % 2 == 0 ? multiply_panels<2>(w, panels, words, queue) : multiply_panels<1>(w, panels, words, queue);
}

cudaError_t update_on_tensor_cores(const Large<float>& w, int panels, bool words, Queue queue) {
    const auto update = words ? update_kernel<true> : update_kernel<false>;
    return launch_in_turn(update, w.g.batch * Tiles(w.g.d, Update::kRows).count(), Update::kThreads, Update::bytes(),
                          queue, w, panels);
}

}  // namespace mtz::cuda
