// Everything a kernel uses that is not plain C++. tests/cuda_host has a twin of this file, under which the same kernels
// run on the host: keep both alike.
#pragma once

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace mtz::cuda {

constexpr int kWarp = 32;

struct Half {
    std::uint16_t bits;
};
struct BFloat16 {
    std::uint16_t bits;
};

__device__ __forceinline__ float to_float(Half x) {
    return __half2float(__ushort_as_half(x.bits));
}
__device__ __forceinline__ float to_float(BFloat16 x) {
    return __bfloat162float(__ushort_as_bfloat16(x.bits));
}

// Dynamic shared memory, handed out in pieces aligned to 16 bytes; SharedSize counts the same pieces on the host.
class SharedMemory {
  public:
    __device__ __forceinline__ SharedMemory() {
        extern __shared__ __align__(16) char mtz_shared[];
        at_ = mtz_shared;
    }
    template <class T>
    __device__ __forceinline__ T* take(std::size_t count) {
        T* piece = reinterpret_cast<T*>(at_);
        at_ += (count * sizeof(T) + 15) / 16 * 16;
        return piece;
    }

  private:
    char* at_;
};

class SharedSize {
  public:
    __host__ __device__ SharedSize& add(std::size_t size, std::size_t count) {
        bytes_ += (count * size + 15) / 16 * 16;
        return *this;
    }
    std::size_t bytes() const { return bytes_; }

  private:
    std::size_t bytes_ = 0;
};

// Starts copying `valid` of Bytes bytes (4, 8 or 16, both sides aligned to them) to shared memory; the others become zero.
template <int Bytes>
__device__ __forceinline__ void copy_async(void* shared, const void* global, int valid) {
    const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
    if constexpr (Bytes == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(valid) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(global), "n"(Bytes), "r"(valid)
                     : "memory");
}
// Closes the group of the copies this thread has started.
__device__ __forceinline__ void copy_async_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits until at most N groups of this thread are under way; other threads see the data after a barrier.
template <int N>
__device__ __forceinline__ void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Stores 16 bytes to global memory at once: of a structure, the compiler makes four stores.
__device__ __forceinline__ void store_words(float* global, float a, float b, float c, float d) {
    asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(global), "f"(a), "f"(b), "f"(c), "f"(d) : "memory");
}

// Brings the 128 bytes around `global` nearer: no more than a hint.
__device__ __forceinline__ void prefetch(const void* global) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(global));
}

__device__ __forceinline__ void sync_block() {
    __syncthreads();
}
// A barrier of the warp, all of whose lanes must take part.
__device__ __forceinline__ void sync_warp() {
    __syncwarp();
}
// A barrier of the block that says whether `value` holds in any thread.
__device__ __forceinline__ bool sync_block_any(bool value) {
    return __syncthreads_or(value) != 0;
}
// All blocks; the launch must be cooperative. Writes before it are seen after it.
__device__ __forceinline__ void sync_grid() {
    cooperative_groups::this_grid().sync();
}

// Waits for the launches before this one to end, whose writes are then seen, and lets the next one start ahead.
__device__ __forceinline__ void wait_for_launch() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// The same value, worked out again in every step of a loop that counts `step` up from 0: what depends on it is then not
// kept in registers through the loop.
__device__ __forceinline__ int recomputed(int value, int step) {
    asm volatile("" : "+r"(step));
    return value ^ (step >> 31);
}

// The value of the lane whose number differs in the bits of `mask`; all lanes of the warp must take part.
template <class T>
__device__ __forceinline__ T shuffle_xor(T value, int mask) {
    return __shfl_xor_sync(0xffffffffu, value, mask);
}

// The value that lane number `lane` has; all lanes of the warp must take part.
template <class T>
__device__ __forceinline__ T shuffle_from(T value, int lane) {
    return __shfl_sync(0xffffffffu, value, lane);
}

// Whether a float32 product is faster as three of TF32 on tensor cores than on the other units: on data-centre GPUs.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 800 || __CUDA_ARCH__ == 900 || __CUDA_ARCH__ / 100 == 10)
constexpr bool kTensorCores = true;
#else
constexpr bool kTensorCores = false;
#endif

// x = high + low, high its first 10 bits of fraction, rounded: with 13 more bits than a float32 has for it, 8193 x loses as
// many of x, and unlike the conversion this leaves integer units alone. Of low, tensor cores take as many bits: 21 of x are
// left. Beyond 4e34, both are NaN.
struct Tf32 {
    std::uint32_t high, low;
};
__device__ __forceinline__ Tf32 split_tf32(float x) {
    const float high = fmaf(x, -8192.0f, fmaf(x, 8192.0f, x));
    Tf32 result;
    result.high = __float_as_uint(high);
    result.low = __float_as_uint(x - high);
    return result;
}

// sum [16, 8] += a [16, 8] b [8, 8] by a warp; with g = lane / 4, t = lane % 4, a lane has rows g and g + 8:
//     a: (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4)     b: (t, g), (t + 4, g)
//     sum: (g, 2 t), (g, 2 t + 1), (g + 8, 2 t), (g + 8, 2 t + 1)
// The hardware takes the first 10 bits of fraction of a and b, and truncates its sums.
__device__ __forceinline__ void multiply_add_tf32(float (&sum)[4], std::uint32_t a0, std::uint32_t a1, std::uint32_t a2,
                                                  std::uint32_t a3, std::uint32_t b0, std::uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void atomic_min(unsigned long long* at, unsigned long long value) {
    atomicMin(at, value);
}
__device__ __forceinline__ void atomic_max(int* at, int value) {
    atomicMax(at, value);
}

__device__ __forceinline__ float square_root(float x) {
    return sqrtf(x);
}
__device__ __forceinline__ double square_root(double x) {
    return sqrt(x);
}
// 1 / sqrt(x) of a positive number, to the last bit or the one before it.
__device__ __forceinline__ float inverse_root(float x) {
    float result;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return fmaf(0.5f * result, fmaf(-x * result, result, 1.0f), result);
}
__device__ __forceinline__ double inverse_root(double x) {
    return 1 / sqrt(x);
}
// 1 / x, to the last bit or the one before it.
__device__ __forceinline__ float reciprocal(float x) {
    float result;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}
__device__ __forceinline__ double reciprocal(double x) {
    return 1 / x;
}
// Of two numbers, or the other of a NaN.
__device__ __forceinline__ float larger_of(float a, float b) {
    return fmaxf(a, b);
}
__device__ __forceinline__ double larger_of(double a, double b) {
    return fmax(a, b);
}
__device__ __forceinline__ float multiply_add(float a, float b, float c) {
    return fmaf(a, b, c);
}
__device__ __forceinline__ double multiply_add(double a, double b, double c) {
    return fma(a, b, c);
}

}  // namespace mtz::cuda
