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

// When a kernel starts: after the launches before it; after them with all of its blocks at once; or, where the GPU can,
// before they have ended. Such a kernel calls wait_for_launch() before anything else.
enum class Start { after, together, ahead };

struct Queue {
    void* stream;
    Start start = Start::after;
    Queue(void* stream) : stream(stream) {}
    Queue(void* stream, Start start) : stream(stream), start(start) {}
};

inline bool can_start_ahead() {
    int device = 0, major = 0;
    return cudaGetDevice(&device) == cudaSuccess &&
           cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess && major >= 9;
}

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), Index blocks, int threads, std::size_t shared, Queue queue,
                   Arguments... arguments) {
    if (blocks <= 0) return cudaSuccess;
    if (shared > 48 * 1024) {
        const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                       cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
        if (error != cudaSuccess) return error;
    }
    cudaLaunchAttribute attribute{};
    cudaLaunchConfig_t config{};
    if (queue.start == Start::together) {
        attribute.id = cudaLaunchAttributeCooperative;
        attribute.val.cooperative = 1;
        config.numAttrs = 1;
    } else if (queue.start == Start::ahead && can_start_ahead()) {
        attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attribute.val.programmaticStreamSerializationAllowed = 1;
        config.numAttrs = 1;
    }
    config.gridDim = dim3(unsigned(smaller(blocks, MTZ_MAX_BLOCKS)));
    config.blockDim = dim3(unsigned(threads));
    config.dynamicSmemBytes = shared;
    config.stream = static_cast<cudaStream_t>(queue.stream);
    config.attrs = &attribute;
    return cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
}

// As many blocks as `items` of work need, with `threads` a block.
template <class... Parameters, class... Arguments>
cudaError_t launch_over(void (*kernel)(Parameters...), Index items, int threads, Queue queue, Arguments... arguments) {
    return launch(kernel, ceil_div(items, threads), threads, 0, queue, arguments...);
}

// A block for each of `blocks` pieces of work, the first of them passed to the kernel first.
template <class... Parameters, class... Arguments>
cudaError_t launch_in_turn(void (*kernel)(Index, Parameters...), Index blocks, int threads, std::size_t shared,
                           Queue queue, Arguments... arguments) {
    cudaError_t error = cudaSuccess;
    for (Index first = 0; first < blocks && error == cudaSuccess; first += MTZ_MAX_BLOCKS)
        error = launch(kernel, smaller(blocks - first, MTZ_MAX_BLOCKS), threads, shared, queue, first, arguments...);
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
