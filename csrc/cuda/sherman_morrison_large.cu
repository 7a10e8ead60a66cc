// Large inverses, all of a batch at once, in place. For a round of vectors V = Y A^-1 (tiles of K x 128, the inner dimension
// in slices); then for each panel of it S = V Y^T, its pivots, V <- X V, and what that takes out of V in later panels
// (cuda/sherman_morrison_large_panels.cu); and A^-1 -= V^T D V (tiles of 128 x K of the upper triangle, written with their
// mirror images). The two products are here for float64 and for GPUs without fast tensor cores, and in
// cuda/sherman_morrison_large_tensor.cu for the others. See cuda/sherman_morrison.cuh for the formula, cuda/pivots.cuh for X.
//
// Of 3 k d^2 operations, two thirds are V and one third the update, both on the whole grid. Beside the matrix, which is read
// one and a half times and written once a round, slices of V are written and read, and V a few times more. What is left is
// 2 k^2 d operations for S and X V in a round of k vectors, and the pivots, one after another, which take some microseconds a
// panel whatever d is. So it takes d of some thousands for products to be most of the time. Launches start ahead, as they
// are short and there are 4 and two more a panel.
//
// Whether a round may be put in is known before anything is written. A later one may still fail, so with more than one a
// copy is kept, and put back where it did.
#include "cuda/sherman_morrison_large_tiles.cuh"

namespace mtz::cuda {
namespace {

constexpr int kScaled = 1024;  // elements of a vector a block of threads scales

// Keeps a copy, or puts it back where a matrix failed.
template <class T>
__global__ void copy_kernel(Large<T> w, bool back) {
    const Index d = w.g.d;
    for (Index e = first_item(); e < w.g.batch * d * d; e += item_step()) {
        const Index p = e / (d * d), i = e / d % d, j = e % d;
        T* element = w.inverse(p) + i * w.g.inverse_row_stride + j;
        if (!back)
            w.copy[e] = *element;
        else if (w.skipped(p))
            *element = w.copy[e];
    }
}

// Where vector q belongs: weights >= 0 first, each part as it came. Every warp counts for itself.
__device__ __forceinline__ Index place_in_order(const ShermanMorrisonArgs& g, Index p, Index q) {
    const double* weight = g.weight + p * g.weight_batch_stride;
    int all = 0, before = 0;
#pragma unroll 4
    for (Index i = threadIdx.x % kWarp; i < g.k; i += kWarp) {
        const bool positive = weight[i * g.weight_stride] >= 0;
        all += positive;
        before += positive && i < q;
    }
#pragma unroll
    for (int mask = kWarp / 2; mask > 0; mask /= 2) {
        all += shuffle_xor(all, mask);
        before += shuffle_xor(before, mask);
    }
    if (q >= g.k) return q;
    return weight[q * g.weight_stride] >= 0 ? before : all + q - before;
}

// Y and the signs of a round, a block of threads for a part of a vector. With one round there is no order yet: each block
// looks where its vector goes.
template <class T>
__global__ void __launch_bounds__(kThreads) scale_kernel(Index first_block, Large<T> w, Index first, int panels) {
    wait_for_launch();
    const ShermanMorrisonArgs& g = w.g;
    const Index parts = ceil_div(w.pitch, kScaled), block = first_block + blockIdx.x;
    const Index p = block / parts / (panels * K), at = block / parts % (panels * K), part = block % parts;
    const bool any = first + at < g.k;
    const Index q = w.order && any ? w.order[p * g.k + first + at] : at;
    const double weight = any ? g.weight[p * g.weight_batch_stride + q * g.weight_stride] : 0;
    const T root = T(square_root(weight < 0 ? -weight : weight));
    const Index start = p * g.vectors.batch_stride + q * g.vectors.row_stride, j0 = part * kScaled + threadIdx.x;
    T value[kScaled / kThreads];  // on their way while the place is looked for
#pragma unroll
    for (int e = 0; e < kScaled / kThreads; ++e) {
        const Index j = j0 + e * kThreads;
        value[e] = any && j < g.d ? load_vector_element<T>(g, start + j * g.vectors.column_stride) : T(0);
    }
    const Index to = w.order ? at : place_in_order(g, p, at);
    T* y = w.y + (p * w.side + to) * w.pitch;
#pragma unroll
    for (int e = 0; e < kScaled / kThreads; ++e)
        if (j0 + e * kThreads < w.pitch) y[j0 + e * kThreads] = root * value[e];
    if (part != 0 || threadIdx.x != 0) return;
    w.sign[p * w.side + to] = weight < 0 ? -1 : 1;
    if (!w.order && at == 0) g.status[p] = kUpdated;
}

// partial[slice, p, q, j] = sum over a slice of i of Y[q, i] A^-1[i, j]
template <class T, bool Words>
__global__ void __launch_bounds__(Large<T>::Tall::kThreads, Large<T>::kResident)
    multiply_kernel(Index first_block, Large<T> w, int panels) {
    using P = typename Large<T>::Tall;
    wait_for_launch();
    SharedMemory memory;
    const P shared(memory);
    const ShermanMorrisonArgs& g = w.g;
    Index panel, p, slice, j0;
    const auto find = [&](int number) {
        const Index block = first_block + number, tile = block / panels;
        panel = block % panels;
        p = tile / (w.across * w.slices);
        slice = tile / w.across % w.slices;
        j0 = tile % w.across * P::kRows;
    };
    find(int(blockIdx.x));
    if (g.status[p] != kUpdated) return;
    const Index first = slice * w.length;
    const Across<T, Words> a{w.inverse(p) + first * g.inverse_row_stride + j0, g.inverse_row_stride,
                             int(smaller(P::kRows, g.d - j0))};
    const Along<T> b{w.y + (p * w.side + panel * K) * w.pitch + first, w.pitch, K};
    T sum[4][P::kColumns] = {};
    add_product(a, b, int(smaller(w.length, g.d - first)), shared, sum);
    find(recomputed(int(blockIdx.x), panels));  // rather than keep it in registers meanwhile
    T* to = w.partial + ((slice * g.batch + p) * w.side + panel * K) * w.pitch + j0;
    const int j = P::row();
    if (j0 + j >= w.pitch) return;
#pragma unroll
    for (int c = 0; c < P::kColumns; ++c) {
        const T four[4] = {sum[0][c], sum[1][c], sum[2][c], sum[3][c]};
        store_global(to + (P::column(c / 4) + c % 4) * w.pitch + j, four);
    }
}

template <class T>
__global__ void add_slices_kernel(Large<T> w) {
    wait_for_launch();
    const Index size = w.g.batch * w.side * w.pitch / 4;
    const Four<T>* partial = reinterpret_cast<const Four<T>*>(w.partial);
    for (Index e = first_item(); e < size; e += item_step()) {
        Four<T> sum = partial[e];
#pragma unroll 8
        for (Index slice = 1; slice < w.slices; ++slice) {
            const Four<T> more = partial[slice * size + e];
#pragma unroll
            for (int f = 0; f < 4; ++f) sum.at[f] += more.at[f];
        }
        reinterpret_cast<Four<T>*>(w.v)[e] = sum;
    }
}

template <class T>
using Tiles = Triangle<Large<T>::Tall::kRows / K>;

// A^-1 -= V^T D V in tiles of the upper triangle, and their mirror images.
template <class T, bool Words>
__global__ void __launch_bounds__(Large<T>::Tall::kThreads, Large<T>::kResident)
    update_kernel(Index first_block, Large<T> w, int panels) {
    using P = typename Large<T>::Tall;
    wait_for_launch();
    SharedMemory memory;
    const P shared(memory);
    const ShermanMorrisonArgs& g = w.g;
    Index p, i0, j0;
    const auto find = [&](int number) {
        const Tiles<T> tiles(g.d, P::kRows);
        const Index block = first_block + number;
        p = block / tiles.count();
        const bool any = tiles.at(block % tiles.count(), i0, j0);
        i0 *= P::kRows;
        j0 *= K;
        return any;
    };
    if (!find(int(blockIdx.x)) || w.skipped(p)) return;
    prefetch_tile<P>(w.inverse(p), g.inverse_row_stride, g.d, i0, j0);
    T sum[4][P::kColumns] = {};
    add_product(Across<T, true>{w.minus + p * w.side * w.pitch + i0, w.pitch, int(smaller(P::kRows, w.pitch - i0))},
                Along<T>{w.vt + (p * g.d + j0) * w.side, w.side, int(smaller(K, g.d - j0))}, panels * K, shared, sum);
    find(recomputed(int(blockIdx.x), panels));
    add_to_matrix<Words, P>(w.inverse(p), g.inverse_row_stride, g.d, i0, j0, sum);
}

template <class T>
cudaError_t multiply_all(const Large<T>& w, int panels, bool words, Queue queue) {
    if constexpr (sizeof(T) == 4) {
        if (w.tensor) return multiply_on_tensor_cores(w, panels, words, queue);
    }
    using P = typename Large<T>::Tall;
    const auto multiply = words ? multiply_kernel<T, true> : multiply_kernel<T, false>;
    return launch_in_turn(multiply, w.g.batch * w.across * w.slices * panels, P::kThreads, P::bytes(), queue, w,
                          panels);
}

template <class T>
cudaError_t update_all(const Large<T>& w, int panels, bool words, Queue queue) {
    if constexpr (sizeof(T) == 4) {
        if (w.tensor) return update_on_tensor_cores(w, panels, words, queue);
    }
    using P = typename Large<T>::Tall;
    const auto update = words ? update_kernel<T, true> : update_kernel<T, false>;
    const Index count = w.g.batch * Tiles<T>(w.g.d, P::kRows).count();
    return launch_in_turn(update, count, P::kThreads, P::bytes(), queue, w, panels);
}

// Vectors first ... of a round.
template <class T>
cudaError_t update_round(const Large<T>& w, Index first, bool words, void* stream) {
    const Queue ahead{stream, Start::ahead};
    const ShermanMorrisonArgs& g = w.g;
    const int panels = int(smaller(w.panels, ceil_div(g.k - first, K)));
    const Index parts = ceil_div(w.pitch, kScaled);
    cudaError_t error =
        launch_in_turn(scale_kernel<T>, g.batch * panels * K * parts, kThreads, 0, ahead, w, first, panels);
    if (error == cudaSuccess) error = multiply_all(w, panels, words, ahead);
    if (error == cudaSuccess && w.slices > 1)
        error = launch_over(add_slices_kernel<T>, g.batch * w.side * w.pitch / 4, kThreads, ahead, w);
    for (int panel = 0; panel < panels && error == cudaSuccess; ++panel) error = solve_panel(w, panel, panels, ahead);
    return error == cudaSuccess ? update_all(w, panels, words, ahead) : error;
}

}  // namespace

template <class T>
std::size_t large_workspace(const ShermanMorrisonArgs& g) {
    Workspace space;
    const Large<T> w(g, space);
    return space.used();
}

template <class T>
Status update_large(const ShermanMorrisonArgs& g, void* workspace, void* stream) {
    Workspace space(workspace);
    const Large<T> w(g, space);
    const bool words = in_words<T>({g.inverse, g.inverse_batch_stride, g.inverse_row_stride, 1});
    Status status;
    if (w.order && failed(status, find_vector_order(g, w.order, stream))) return status;
    if (w.copy && failed(status, launch_over(copy_kernel<T>, g.batch * g.d * g.d, 256, stream, w, false)))
        return status;
    for (Index first = 0; first < g.k; first += w.side)
        if (failed(status, update_round(w, first, words, stream))) return status;
    if (w.copy) failed(status, launch_over(copy_kernel<T>, g.batch * g.d * g.d, 256, stream, w, true));
    return status;
}

template std::size_t large_workspace<float>(const ShermanMorrisonArgs&);
template std::size_t large_workspace<double>(const ShermanMorrisonArgs&);
template Status update_large<float>(const ShermanMorrisonArgs&, void*, void*);
template Status update_large<double>(const ShermanMorrisonArgs&, void*, void*);

}  // namespace mtz::cuda
