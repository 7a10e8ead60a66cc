// What all ways of mtz/sherman_morrison.h share: the order of the vectors and what is asked of pivots.
//
// Vectors go in blocks of K. With Y [K, d] scaled by sqrt|w|, D the signs, V = Y A^-1 and S = D + V Y^T = L diag(p) L^T:
//
//     V <- diag(|p|)^-1/2 L^-1 V,    A^-1 <- A^-1 - V^T D V
//
// since p_q has the sign of its weight. Blocks that are not full end in rows of zeros with sign +1, which change nothing.
#pragma once

#include "cuda/intrinsics.cuh"
#include "cuda/launch.cuh"
#include "mtz/sherman_morrison.h"

namespace mtz::cuda {

// order [batch, k]: all weights >= 0 first, each part as it came, NaN among the rest; status <- kUpdated.
cudaError_t find_vector_order(const ShermanMorrisonArgs& g, Index* order, void* stream);

// SharedMemory's other side.
struct CountedMemory {
    SharedSize size;
    template <class T>
    __host__ __device__ T* take(std::size_t count) {
        size.add(sizeof(T), count);
        return nullptr;
    }
};

template <class T>
struct alignas(16) Four {
    T at[4];
};
template <class T>
__device__ __forceinline__ Four<T> load_four(const T* from) {
    return *reinterpret_cast<const Four<T>*>(from);
}
template <class T>
__device__ __forceinline__ void store_four(T* to, const T* values) {
    *reinterpret_cast<Four<T>*>(to) = {{values[0], values[1], values[2], values[3]}};
}

template <class T>
__device__ __forceinline__ T load_vector_element(const ShermanMorrisonArgs& g, Index at) {
    if constexpr (sizeof(T) == 4) {  // the same for all threads
        if (g.vector_scalar == Scalar::float16) return to_float(static_cast<const Half*>(g.vectors.data)[at]);
        if (g.vector_scalar == Scalar::bfloat16) return to_float(static_cast<const BFloat16*>(g.vectors.data)[at]);
    }
    return static_cast<const T*>(g.vectors.data)[at];
}

// Vector number `at` in order, scaled: element j is root * x[j].
template <class T>
struct Scaled {
    Index start;
    bool any;
    T root;
    double sign;

    __device__ __forceinline__ Scaled(const ShermanMorrisonArgs& g, const Index* order, Index p, Index at)
        : start(0), any(at < g.k), root(0), sign(1) {
        if (!any) return;
        const Index q = order[p * g.k + at];
        const double w = g.weight[p * g.weight_batch_stride + q * g.weight_stride];
        start = p * g.vectors.batch_stride + q * g.vectors.row_stride;
        root = T(square_root(w < 0 ? -w : w));
        sign = w < 0 ? -1 : 1;
    }
    __device__ __forceinline__ T at(const ShermanMorrisonArgs& g, Index j) const {
        return any ? root * load_vector_element<T>(g, start + j * g.vectors.column_stride) : T(0);
    }
};

// Relative error of an inner product of d terms, with a margin.
template <class T>
__device__ __forceinline__ double rounding(Index d) {
    return 16 * (sizeof(T) == 4 ? 1.2e-7 : 2.3e-16) * (float(d) * inverse_root(float(d)));
}

template <class T>
__device__ __forceinline__ bool finite(T x) {
    return x - x == 0;
}

// Judges pivot p of a weight of this sign, `size` being its row's diagonal element of V Y^T, and rounds it up to the 1 that
// 1 + x^T A^-1 x is at least.
__device__ __forceinline__ int judge_pivot(double sign, double size, double rounding, double& p) {
    if (!finite(p)) return kNotFinite;
    const double absolute = size < 0 ? -size : size, doubt = rounding * (absolute > 1 ? absolute : 1);
    if (sign < 0) return p < -doubt ? kUpdated : kIndefinite;
    if (p < 1 - doubt) return kIndefinite;
    if (p < 1) p = 1;
    return kUpdated;
}

// A diagonal element of the result.
template <class T>
__device__ __forceinline__ int judge_diagonal(T x) {
    return !finite(x) ? kNotFinite : x > 0 ? kUpdated : kIndefinite;
}

// The order of one matrix, order [k], by a block of threads; `before` [threads + 1] is scratch in shared memory. Starts with
// a barrier, ends without one.
__device__ __forceinline__ void order_vectors(const double* weight, Index stride, Index k, Index* order,
                                              Index* before) {
    const int threads = int(blockDim.x), thread = int(threadIdx.x);
    const Index each = ceil_div(k, threads), first = smaller(thread * each, k), last = smaller(first + each, k);
    Index mine = 0;  // weights >= 0 in this thread's part
#pragma unroll 1
    for (Index q = first; q < last; ++q) mine += weight[q * stride] >= 0;
    sync_block();
    before[thread + 1] = mine;
    sync_block();
    if (thread == 0) {
        before[0] = 0;
#pragma unroll 1
        for (int t = 0; t < threads; ++t) before[t + 1] += before[t];
    }
    sync_block();
    Index positive = before[thread], other = before[threads] + first - positive;
#pragma unroll 1
    for (Index q = first; q < last; ++q) order[weight[q * stride] >= 0 ? positive++ : other++] = q;
}

// The ways: each matrix in shared memory through all its updates, of float32 on tensor cores where these are fast, or all
// matrices in passes over the whole device.
// Unlike kTensorCores this asks the device, as one may run what was compiled for another.
bool has_fast_tensor_cores();
bool fits_tensor_cores(Index d);
Status update_tensor(const ShermanMorrisonArgs& g, void* workspace, void* stream);
template <class T>
bool fits_shared_memory(Index d);
template <class T>
Status update_small(const ShermanMorrisonArgs& g, void* workspace, void* stream);
Index small_workspace(const ShermanMorrisonArgs& g);  // of either
template <class T>
std::size_t large_workspace(const ShermanMorrisonArgs& g);
template <class T>
Status update_large(const ShermanMorrisonArgs& g, void* workspace, void* stream);

}  // namespace mtz::cuda
