// Stands in for the CUDA runtime, so that csrc/cuda/*.cu compile as plain C++ and run here, blocks in turn and threads as
// fibers (fibers.cpp). Only what the kernels use. What a kernel uses of the device is in cuda/intrinsics.cuh beside this.
#pragma once

#include <cstddef>
#include <functional>
#include <type_traits>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
const char* cudaGetErrorName(cudaError_t);
const char* cudaGetErrorString(cudaError_t);

enum cudaLaunchAttributeID { cudaLaunchAttributeCooperative, cudaLaunchAttributeProgrammaticStreamSerialization };
struct cudaLaunchAttribute {
    cudaLaunchAttributeID id;
    struct {
        int cooperative, programmaticStreamSerializationAllowed;
    } val;
};
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    std::size_t dynamicSmemBytes = 0;
    cudaStream_t stream = nullptr;
    cudaLaunchAttribute* attrs = nullptr;
    unsigned numAttrs = 0;
};

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr {
    cudaDevAttrMultiProcessorCount,
    cudaDevAttrMaxSharedMemoryPerBlockOptin,
    cudaDevAttrComputeCapabilityMajor,
    cudaDevAttrComputeCapabilityMinor
};
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int device);
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, std::size_t) {
    *blocks = 1;
    return cudaSuccess;
}

namespace cuda_host {

// Where the running fiber is.
struct Place {
    dim3 thread, block, block_size, grid_size;
};
extern Place* here;

cudaError_t run(const cudaLaunchConfig_t& config, const void* kernel, const std::function<void()>& thread);

}  // namespace cuda_host

// Objects, not macros: gridDim and blockDim are also members of cudaLaunchConfig_t.
struct CudaHostCoordinate {
    dim3 cuda_host::Place::* of;
    struct Axis {
        dim3 cuda_host::Place::* of;
        unsigned dim3::* axis;
        operator unsigned() const { return cuda_host::here->*of.*axis; }
    } x{of, &dim3::x}, y{of, &dim3::y}, z{of, &dim3::z};
    CudaHostCoordinate(dim3 cuda_host::Place::* member) : of(member) {}
};
static const CudaHostCoordinate threadIdx{&cuda_host::Place::thread}, blockIdx{&cuda_host::Place::block},
    blockDim{&cuda_host::Place::block_size}, gridDim{&cuda_host::Place::grid_size};

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
    return cuda_host::run(*config, reinterpret_cast<const void*>(kernel), [&] { kernel(Parameters(arguments)...); });
}
