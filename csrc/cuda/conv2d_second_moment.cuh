// What both ways of mtz/conv2d_second_moment.h share.
#pragma once

#include <limits>

#include "cuda/intrinsics.cuh"
#include "cuda/launch.cuh"
#include "mtz/conv2d_second_moment.h"

namespace mtz::cuda {

constexpr int kRun = 128;  // positions summed in the type of the result
constexpr Index kEnoughBlocks = 512;
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// total + lost += x, the rounding of total + x going into `lost` (Knuth's two-sum).
template <class S>
__device__ __forceinline__ void add_exactly(S x, S& total, S& lost) {
    const S sum = total + x, added = sum - total;
    lost += (total - (sum - added)) + (x - added);
    total = sum;
}

__device__ __forceinline__ float in_type_of_sum(float x) {
    return x;
}
__device__ __forceinline__ double in_type_of_sum(double x) {
    return x;
}
__device__ __forceinline__ float in_type_of_sum(Half x) {
    return to_float(x);
}
__device__ __forceinline__ float in_type_of_sum(BFloat16 x) {
    return to_float(x);
}

template <class S>
__device__ __forceinline__ bool is_finite(S x) {
    return x - x == 0;
}

// The two ways: patches gathered from the image, for any convolution, and sums of products of the image with its shifted
// self. Both find the status cleared, and leave NaN throughout where it is set.
std::size_t patches_workspace(const Conv2dSecondMomentArgs& g);
template <class In, class S>
Status moment_by_patches(const Conv2dSecondMomentArgs& g, void* workspace, void* stream);

bool shifts_are_fewer(const Conv2dSecondMomentArgs& g);
template <class S>
std::size_t shifts_workspace(const Conv2dSecondMomentArgs& g);
template <class In, class S>
Status moment_by_shifts(const Conv2dSecondMomentArgs& g, void* workspace, void* stream);

}  // namespace mtz::cuda
