// Vectors of the instruction set this file is compiled for, as GCC/Clang vector extensions: one source for all of them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "mtz/common.h"

namespace mtz::cpu::MTZ_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

using Index = std::int64_t;

template <class T>
struct Simd {
    static constexpr int kLanes = kVectorBytes / int(sizeof(T));
    typedef T Vector __attribute__((vector_size(kVectorBytes), may_alias));
    // the same at any address
    typedef T Unaligned __attribute__((vector_size(kVectorBytes), aligned(alignof(T)), may_alias));
};

template <class T>
using Vector = typename Simd<T>::Vector;

template <class T>
inline Vector<T> load(const T* p) {
    return *reinterpret_cast<const typename Simd<T>::Unaligned*>(p);
}

template <class T>
inline void store(T* p, Vector<T> v) {
    *reinterpret_cast<typename Simd<T>::Unaligned*>(p) = v;
}

// Step H of a transpose by halves: exchange the off-diagonal H x H blocks of every 2H x 2H block.
template <class T, int H>
inline void exchange(Vector<T>& a, Vector<T>& b) {
    constexpr int n = Simd<T>::kLanes;
#if defined(__clang__)
    Vector<T> x = a, y = b;
    for (int i = 0; i < n; ++i) {
        a[i] = i & H ? y[i - H] : x[i];
        b[i] = i & H ? y[i] : x[i + H];
    }
#else
    using Lane = std::conditional_t<sizeof(T) == 4, std::int32_t, std::int64_t>;
    typedef Lane Mask __attribute__((vector_size(kVectorBytes)));
    Mask low, high;
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) {
        low[i] = i & H ? n + i - H : i;
        high[i] = i & H ? n + i : i + H;
    }
    const Vector<T> x = a, y = b;
    a = __builtin_shuffle(x, y, low);
    b = __builtin_shuffle(x, y, high);
#endif
}

template <class T, int H>
inline void transpose_steps(Vector<T>* rows) {
    if constexpr (H >= 1) {
#pragma GCC unroll 16
        for (int i = 0; i < Simd<T>::kLanes; ++i)
            if ((i & H) == 0) exchange<T, H>(rows[i], rows[i + H]);
        transpose_steps<T, H / 2>(rows);
    }
}

// kLanes x kLanes, in registers.
template <class T>
inline void transpose(Vector<T>* rows) {
    transpose_steps<T, Simd<T>::kLanes / 2>(rows);
}

}  // namespace mtz::cpu::MTZ_ISA
