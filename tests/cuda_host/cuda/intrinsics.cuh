// The twin of csrc/cuda/intrinsics.cuh: the same names for kernels that run on the host as fibers.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "fibers.h"

namespace mtz::cuda {

constexpr int kWarp = 32;

struct Half {
    std::uint16_t bits;
};
struct BFloat16 {
    std::uint16_t bits;
};

inline float to_float(BFloat16 x) {
    const std::uint32_t bits = std::uint32_t(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline float to_float(Half x) {
    const int exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
    const float size = exponent == 31  ? (fraction ? NAN : INFINITY)
                       : exponent == 0 ? std::ldexp(float(fraction), -24)
                                       : std::ldexp(float(fraction + 1024), exponent - 25);
    return x.bits >> 15 ? -size : size;
}

// Every piece is followed by a red zone of the address sanitizer, and holds NaN until it is written.
class SharedMemory {
  public:
    template <class T>
    T* take(std::size_t count) {
        char* piece = cuda_host::shared_piece(at_, count * sizeof(T));
        at_ += (count * sizeof(T) + 15) / 16 * 16 + 64;
        return reinterpret_cast<T*>(piece);
    }

  private:
    std::size_t at_ = 0;
};

class SharedSize {
  public:
    SharedSize& add(std::size_t size, std::size_t count) {
        bytes_ += (count * size + 15) / 16 * 16 + 64;
        return *this;
    }
    std::size_t bytes() const { return bytes_; }

  private:
    std::size_t bytes_ = 0;
};

template <int Bytes>
void copy_async(void* shared, const void* global, int valid) {
    static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16, "cp.async copies 4, 8 or 16 bytes");
    cuda_host::copy_start(shared, global, Bytes, valid);
}
inline void copy_async_commit() {
    cuda_host::copy_commit();
}
template <int N>
void copy_async_wait() {
    cuda_host::copy_wait(N);
}

struct alignas(16) GlobalWords {
    float at[4];
};
inline void store_words(float* global, float a, float b, float c, float d) {
    if (reinterpret_cast<std::uintptr_t>(global) % 16) cuda_host::fail("a store of 16 bytes is not aligned to them");
    *reinterpret_cast<GlobalWords*>(global) = {{a, b, c, d}};
}

inline void prefetch(const void*) {}

inline void sync_block() {
    cuda_host::wait_block(false);
}
inline void sync_warp() {
    cuda_host::exchange(0, 0);
}
inline bool sync_block_any(bool value) {
    return cuda_host::wait_block(value);
}
inline void sync_grid() {
    cuda_host::wait_grid();
}

inline void wait_for_launch() {}

inline int recomputed(int value, int) {
    return value;
}

template <class T>
T shuffle_from(T value, int lane) {
    static_assert(sizeof(T) <= 8);
    std::uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof(T));
    bits = cuda_host::exchange(bits, lane);
    std::memcpy(&value, &bits, sizeof(T));
    return value;
}
template <class T>
T shuffle_xor(T value, int mask) {
    return shuffle_from(value, int(threadIdx.x) % kWarp ^ mask);
}

static const bool& kTensorCores = cuda_host::tensor_cores;

struct Tf32 {
    std::uint32_t high, low;
};
inline Tf32 split_tf32(float x) {
    const float high = std::fmaf(x, -8192.0f, std::fmaf(x, 8192.0f, x)), low = x - high;
    Tf32 result;
    std::memcpy(&result.high, &high, 4);
    std::memcpy(&result.low, &low, 4);
    return result;
}

// As the hardware does: 10 bits of fraction, products exact, their sum truncated.
inline void multiply_add_tf32(float (&sum)[4], std::uint32_t a0, std::uint32_t a1, std::uint32_t a2, std::uint32_t a3,
                              std::uint32_t b0, std::uint32_t b1) {
    const cuda_host::Fragment mine = {a0, a1, a2, a3, b0, b1};
    const auto* lanes = cuda_host::gather(mine);
    const auto value = [&](int lane, int which) {
        const std::uint32_t bits = lanes[lane][which] & ~0x1fffu;
        float x;
        std::memcpy(&x, &bits, 4);
        return double(x);
    };
    const int lane = int(threadIdx.x) % kWarp, g = lane / 4, t = lane % 4;
    for (int e = 0; e < 4; ++e) {
        double total = sum[e];
        for (int k = 0; k < 8; ++k)
            total += value(4 * g + k % 4, k / 4 * 2 + e / 2) * value(4 * (2 * t + e % 2) + k % 4, 4 + k / 4);
        const float rounded = float(total);
        sum[e] = std::fabs(double(rounded)) > std::fabs(total) ? std::nextafter(rounded, 0.0f) : rounded;
    }
}

inline void atomic_min(unsigned long long* at, unsigned long long value) {
    if (value < *at) *at = value;
}
inline void atomic_max(int* at, int value) {
    if (value > *at) *at = value;
}

inline float square_root(float x) {
    return std::sqrt(x);
}
inline double square_root(double x) {
    return std::sqrt(x);
}
template <class T>
T inverse_root(T x) {
    return 1 / std::sqrt(x);
}
inline float reciprocal(float x) {
    return 1 / x;
}
inline double reciprocal(double x) {
    return 1 / x;
}
template <class T>
T larger_of(T a, T b) {
    return std::fmax(a, b);
}
inline float multiply_add(float a, float b, float c) {
    return float(double(a) * b + c);
}
inline double multiply_add(double a, double b, double c) {
    return a * b + c;
}

}  // namespace mtz::cuda
