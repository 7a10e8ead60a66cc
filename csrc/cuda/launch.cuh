// Launching through cudaLaunchKernelEx, never <<<>>>, so that a .cu file is plain C++ to a host compiler.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "mtz/common.h"

namespace mtz::cuda {

using Index = std::int64_t;

// The most blocks of a launch; more work than that is walked over with a stride of the grid, or launched in several goes.
#ifndef MTZ_MAX_BLOCKS
#define MTZ_MAX_BLOCKS (1 << 30)
#endif

__host__ __device__ constexpr Index ceil_div(Index a, Index b) {
    return (a + b - 1) / b;
}
__host__ __device__ constexpr Index smaller(Index a, Index b) {
    return a < b ? a : b;
}
__host__ __device__ constexpr Index larger(Index a, Index b) {
    return a > b ? a : b;
}

inline Status status_of(cudaError_t error) {
    return error == cudaSuccess ? Status{} : Status{Code::device, std::int32_t(error)};
}

// The first error of a row of launches.
inline bool failed(Status& status, cudaError_t error) {
    status = status_of(error);
    return error != cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), Index blocks, int threads, std::size_t shared, void* stream,
                   bool cooperative, Arguments... arguments) {
    if (blocks <= 0) return cudaSuccess;
    if (shared > 48 * 1024) {
        const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                       cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
        if (error != cudaSuccess) return error;
    }
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(unsigned(smaller(blocks, MTZ_MAX_BLOCKS)));
    config.blockDim = dim3(unsigned(threads));
    config.dynamicSmemBytes = shared;
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &attribute;
    config.numAttrs = cooperative ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
}

// As many blocks as `items` of work need, with `threads` a block.
template <class... Parameters, class... Arguments>
cudaError_t launch_over(void (*kernel)(Parameters...), Index items, int threads, void* stream, Arguments... arguments) {
    return launch(kernel, ceil_div(items, threads), threads, 0, stream, false, arguments...);
}

// A block for each of `blocks` pieces of work, the first of them passed to the kernel first.
template <class... Parameters, class... Arguments>
cudaError_t launch_in_turn(void (*kernel)(Index, Parameters...), Index blocks, int threads, std::size_t shared,
                           void* stream, Arguments... arguments) {
    cudaError_t error = cudaSuccess;
    for (Index first = 0; first < blocks && error == cudaSuccess; first += MTZ_MAX_BLOCKS)
        error = launch(kernel, smaller(blocks - first, MTZ_MAX_BLOCKS), threads, shared, stream, false, first,
                       arguments...);
    return error;
}

// Hands out pieces of the caller's workspace, each aligned to 64 bytes; without one it only counts.
class Workspace {
  public:
    explicit Workspace(void* base = nullptr) : base_(static_cast<char*>(base)) {}
    template <class T>
    T* take(Index count) {
        const std::size_t at = used_;
        used_ += (std::size_t(count) * sizeof(T) + 63) / 64 * 64;
        return base_ ? reinterpret_cast<T*>(base_ + at) : nullptr;
    }
    std::size_t used() const { return used_; }

  private:
    char* base_;
    std::size_t used_ = 0;
};

}  // namespace mtz::cuda
