// Chooses between the ways by what the device has and what fits into its shared memory. See mtz/sherman_morrison.h.
#include "cuda/sherman_morrison.cuh"

namespace mtz::cuda {
namespace {

__global__ void vector_order_kernel(ShermanMorrisonArgs g, Index* order) {
    Index* before = SharedMemory().take<Index>(blockDim.x + 1);
    for (Index p = blockIdx.x; p < g.batch; p += gridDim.x) {
        order_vectors(g.weight + p * g.weight_batch_stride, g.weight_stride, g.k, order + p * g.k, before);
        if (threadIdx.x == 0) g.status[p] = kUpdated;
    }
}

__global__ void nothing_kernel(ShermanMorrisonArgs g) {
    for (Index p = blockIdx.x * Index(blockDim.x) + threadIdx.x; p < g.batch; p += Index(gridDim.x) * blockDim.x)
        g.status[p] = kUpdated;
}

template <class T>
bool fits_tensor(Index d) {
    return sizeof(T) == 4 && fits_tensor_cores(d);
}

template <class T>
Status run(const ShermanMorrisonArgs& g, void* workspace, void* stream) {
    if (fits_tensor<T>(g.d)) return update_tensor(g, workspace, stream);
    return fits_shared_memory<T>(g.d) ? update_small<T>(g, workspace, stream) : update_large<T>(g, workspace, stream);
}

template <class T>
std::size_t workspace_bytes(const ShermanMorrisonArgs& g) {
    const bool small = fits_tensor<T>(g.d) || fits_shared_memory<T>(g.d);
    return small ? std::size_t(small_workspace(g)) : large_workspace<T>(g);
}

}  // namespace

bool has_fast_tensor_cores() {
    int device = 0, major = 0, minor = 0;
    if (cudaGetDevice(&device) != cudaSuccess ||
        cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
        cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess)
        return false;
    return major == 10 || ((major == 8 || major == 9) && minor == 0);
}

cudaError_t find_vector_order(const ShermanMorrisonArgs& g, Index* order, void* stream) {
    constexpr int threads = 128;
    return launch(vector_order_kernel, g.batch, threads, SharedSize().add(sizeof(Index), threads + 1).bytes(), stream,
                  g, order);
}

std::size_t sherman_morrison_workspace(const ShermanMorrisonArgs& g) {
    if (g.batch * g.d * g.k == 0) return 0;
    return g.scalar == Scalar::float64 ? workspace_bytes<double>(g) : workspace_bytes<float>(g);
}

Status sherman_morrison(const ShermanMorrisonArgs& g, void* workspace, void* stream) {
    const bool half = g.vector_scalar == Scalar::float16 || g.vector_scalar == Scalar::bfloat16;
    if (!(g.vector_scalar == g.scalar && !half) && !(g.scalar == Scalar::float32 && half)) return {Code::unsupported};
    if (g.d * g.k == 0) return status_of(launch_over(nothing_kernel, g.batch, 256, stream, g));
    return g.scalar == Scalar::float32 ? run<float>(g, workspace, stream) : run<double>(g, workspace, stream);
}

}  // namespace mtz::cuda
