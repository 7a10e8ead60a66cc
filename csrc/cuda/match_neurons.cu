// Greedy matching by mutual nearest neighbours, all of it on the device. See mtz/match_neurons.h.
//
// A pair that is cheapest in its row and in its column, ties broken by (row, column), is one that greedy takes sooner or
// later, whatever happens elsewhere: so all such pairs are taken at once, round after round. Every row keeps its nearest
// free column and every column its nearest free row; only those whose nearest was taken look again, a warp each. Columns
// look in a transposed copy, so that both read contiguously. The number of rounds depends on the costs: one cooperative
// launch does all of them, with barriers of the whole grid in between, so that nothing is read back.
//
// At the end a pair's place in the output is the number of pairs that come before it.
#include "cuda/intrinsics.cuh"
#include "cuda/launch.cuh"
#include "mtz/match_neurons.h"

namespace mtz::cuda {
namespace {

constexpr int kThreads = 256, kSide = 32;
constexpr unsigned long long kNone = ~0ull;

// A line is a row (of `costs`) or a column (of `turned`); -1 is none.
template <class T>
struct Work {
    MatchNeuronsArgs g;
    T* turned;                       // [batch, m, n]
    unsigned long long* not_number;  // [batch]      flat index of the first NaN
    Index *near_column, *near_row;   // [batch, n], [batch, m]   nearest free line of the other kind
    Index *column_of, *row_of;       // [batch, n], [batch, m]   matched
    T* cost_of;                      // [batch, n]   of the pair matched
    int* rounds;                     // [2]          whether this round, and the last one, took a pair

    Work(const MatchNeuronsArgs& args, Workspace& space) : g(args) {
        turned = space.take<T>(g.batch * g.n * g.m);
        not_number = space.take<unsigned long long>(g.batch);
        near_column = space.take<Index>(g.batch * g.n);
        near_row = space.take<Index>(g.batch * g.m);
        column_of = space.take<Index>(g.batch * g.n);
        row_of = space.take<Index>(g.batch * g.m);
        cost_of = space.take<T>(g.batch * g.n);
        rounds = space.take<int>(2);
    }
    __device__ __forceinline__ const T* costs(Index p) const {
        return static_cast<const T*>(g.distances.data) + p * g.distances.batch_stride;
    }
};

template <class T>
__global__ void __launch_bounds__(kThreads) clear_kernel(Work<T> w) {
    const Index first = blockIdx.x * Index(blockDim.x) + threadIdx.x, step = Index(gridDim.x) * blockDim.x;
    for (Index e = first; e < w.g.batch; e += step) w.not_number[e] = kNone;
    for (Index e = first; e < w.g.batch * w.g.n; e += step) w.near_column[e] = w.column_of[e] = -1;
    for (Index e = first; e < w.g.batch * w.g.m; e += step) w.near_row[e] = w.row_of[e] = -1;
    for (Index e = first; e < 2; e += step) w.rounds[e] = 0;
}

// turned [p, j, i] = costs [p, i, j], in tiles through shared memory; and where the first NaN is.
template <class T>
__global__ void __launch_bounds__(kThreads) turn_kernel(Work<T> w) {
    T* tile = SharedMemory().take<T>(kSide * (kSide + 1));
    const MatchNeuronsArgs& g = w.g;
    const Index down = ceil_div(g.n, kSide), across = ceil_div(g.m, kSide);
    const int x = int(threadIdx.x) % kSide, y = int(threadIdx.x) / kSide;
    for (Index block = blockIdx.x; block < g.batch * down * across; block += gridDim.x) {
        const Index p = block / (down * across), i0 = block / across % down * kSide, j0 = block % across * kSide;
        const T* costs = w.costs(p);
        sync_block();  // the tile before this one has been read
        for (int r = y; r < kSide; r += kThreads / kSide) {
            const Index i = i0 + r, j = j0 + x;
            if (i >= g.n || j >= g.m) continue;
            const T cost = costs[i * g.distances.row_stride + j * g.distances.column_stride];
            if (cost != cost) atomic_min(w.not_number + p, static_cast<unsigned long long>(i * g.m + j));
            tile[r * (kSide + 1) + x] = cost;
        }
        sync_block();
        for (int r = y; r < kSide; r += kThreads / kSide) {
            const Index i = i0 + x, j = j0 + r;
            if (i < g.n && j < g.m) w.turned[(p * g.m + j) * g.n + i] = tile[x * (kSide + 1) + r];
        }
    }
}

// The cheapest of `count` costs that is free (taken[i] < 0), the first one of several; by all lanes of a warp.
template <class T>
__device__ __forceinline__ Index nearest(const T* costs, Index stride, const Index* taken, Index count) {
    Index best = -1;
    T least = 0;
    for (Index i = threadIdx.x % kWarp; i < count; i += kWarp) {
        if (taken[i] >= 0) continue;
        const T cost = costs[i * stride];
        if (best < 0 || cost < least) {
            best = i;
            least = cost;
        }
    }
#pragma unroll
    for (int mask = kWarp / 2; mask > 0; mask /= 2) {
        const Index other = shuffle_xor(best, mask);
        const T cost = shuffle_xor(least, mask);
        if (other >= 0 && (best < 0 || cost < least || (cost == least && other < best))) {
            best = other;
            least = cost;
        }
    }
    return best;
}

// Every free line whose nearest is none or taken looks for another.
template <class T>
__device__ __forceinline__ void look(const Work<T>& w, bool rows) {
    const MatchNeuronsArgs& g = w.g;
    const Index lines = rows ? g.n : g.m, others = rows ? g.m : g.n;
    const Index *own = rows ? w.column_of : w.row_of, *taken = rows ? w.row_of : w.column_of;
    Index* near = rows ? w.near_column : w.near_row;
    const Index warp = (blockIdx.x * Index(blockDim.x) + threadIdx.x) / kWarp;
    const Index warps = Index(gridDim.x) * blockDim.x / kWarp;
    for (Index e = warp; e < g.batch * lines; e += warps) {
        const Index p = e / lines, i = e % lines;
        if (own[e] >= 0 || w.not_number[p] != kNone) continue;
        if (near[e] >= 0 && taken[p * others + near[e]] < 0) continue;
        const Index found = rows ? nearest(w.costs(p) + i * g.distances.row_stride, g.distances.column_stride,
                                           taken + p * others, others)
                                 : nearest(w.turned + (p * g.m + i) * g.n, Index(1), taken + p * others, others);
        if (threadIdx.x % kWarp == 0) near[e] = found;
    }
}

template <class T>
__global__ void __launch_bounds__(kThreads) rounds_kernel(Work<T> w) {
    const MatchNeuronsArgs& g = w.g;
    const Index first = blockIdx.x * Index(blockDim.x) + threadIdx.x, step = Index(gridDim.x) * blockDim.x;
    for (int round = 0;; round ^= 1) {
        look(w, true);
        look(w, false);
        sync_grid();
        if (first == 0) w.rounds[round ^ 1] = 0;  // everyone has read it, and nobody sets it before the next barrier
        bool took = false;
        for (Index e = first; e < g.batch * g.n; e += step) {
            const Index p = e / g.n, i = e % g.n, j = w.near_column[e];
            if (w.column_of[e] >= 0 || j < 0 || w.near_row[p * g.m + j] != i) continue;
            w.column_of[e] = j;
            w.row_of[p * g.m + j] = i;
            w.cost_of[e] = w.costs(p)[i * g.distances.row_stride + j * g.distances.column_stride];
            took = true;
        }
        if (took) atomic_max(w.rounds + round, 1);
        sync_grid();
        if (w.rounds[round] == 0) break;
    }
    for (Index p = first; p < g.batch; p += step)
        g.status[p] = w.not_number[p] == kNone ? -1 : static_cast<Index>(w.not_number[p]);
    const Index warp = first / kWarp, warps = step / kWarp;
    for (Index e = warp; e < g.batch * g.n; e += warps) {
        const Index p = e / g.n, i = e % g.n, start = p * g.n;
        if (w.column_of[e] < 0) continue;
        const T cost = w.cost_of[e];
        Index before = 0;
        for (Index k = threadIdx.x % kWarp; k < g.n; k += kWarp)
            if (w.column_of[start + k] >= 0)
                before += w.cost_of[start + k] < cost || (w.cost_of[start + k] == cost && k < i);
#pragma unroll
        for (int mask = kWarp / 2; mask > 0; mask /= 2) before += shuffle_xor(before, mask);
        if (threadIdx.x % kWarp == 0 && before < g.count) {
            g.pairs[(p * g.count + before) * 2] = i;
            g.pairs[(p * g.count + before) * 2 + 1] = w.column_of[e];
        }
    }
    for (Index e = first; e < g.batch * g.count * 2; e += step)
        if (w.not_number[e / (2 * g.count)] != kNone) g.pairs[e] = -1;
}

// As many blocks as the device runs at once, and no more than there is work for.
template <class T>
cudaError_t blocks_at_once(const MatchNeuronsArgs& g, Index& blocks) {
    int device = 0, processors = 0, each = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    if (error == cudaSuccess)
        error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, rounds_kernel<T>, kThreads, 0);
    const Index warps = g.batch * larger(g.n, g.m);
    blocks = larger(1, smaller(Index(processors) * smaller(each, 4), ceil_div(warps, kThreads / kWarp)));
    return error;
}

template <class T>
Status run(const MatchNeuronsArgs& g, void* workspace, void* stream) {
    Workspace space(workspace);
    const Work<T> w(g, space);
    const Index tiles = g.batch * ceil_div(g.n, kSide) * ceil_div(g.m, kSide);
    const std::size_t shared = SharedSize().add(sizeof(T), kSide * (kSide + 1)).bytes();
    Index blocks = 0;
    Status status;
    if (failed(status, blocks_at_once<T>(g, blocks)) ||
        failed(status, launch_over(clear_kernel<T>, larger(2, g.batch * larger(g.n, g.m)), kThreads, stream, w)) ||
        failed(status, launch(turn_kernel<T>, tiles, kThreads, shared, stream, w)))
        return status;
    failed(status, launch(rounds_kernel<T>, blocks, kThreads, 0, {stream, Start::together}, w));
    return status;
}

template <class T>
std::size_t workspace_bytes(const MatchNeuronsArgs& g) {
    Workspace space;
    const Work<T> w(g, space);
    return space.used();
}

}  // namespace

std::size_t match_neurons_workspace(const MatchNeuronsArgs& g) {
    if (g.batch == 0) return 0;
    return g.scalar == Scalar::float64 ? workspace_bytes<double>(g) : workspace_bytes<float>(g);
}

Status match_neurons(const MatchNeuronsArgs& g, void* workspace, void* stream) {
    if (g.method != MatchMethod::greedy || (g.scalar != Scalar::float32 && g.scalar != Scalar::float64))
        return {Code::unsupported};
    if (g.batch == 0) return {};
    return g.scalar == Scalar::float64 ? run<double>(g, workspace, stream) : run<float>(g, workspace, stream);
}

}  // namespace mtz::cuda
