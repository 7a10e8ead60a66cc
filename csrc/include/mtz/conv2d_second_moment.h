// Second moment of the input patches of a convolution, summed over samples and output positions, one matrix a group:
//
//     out[g, (c, u), (e, v)] = sum_{s, p} x[s, g C' + c, p * stride + u * dilation - padding] *
//                                         x[s, g C' + e, p * stride + v * dilation - padding]
//
// with C' = channels / groups, c and e in [0, C'), u = (uy, ux) and v kernel offsets, p = (py, px) an output position,
// and x zero outside the image. Rows and columns are ordered (channel, uy, ux), as weight.flatten(1) is. out is
// [groups, C' k, C' k] with k = kernel[0] * kernel[1], symmetric to the last bit.
//
// Many (u, v) see the same product: at equal phase (u * dilation - padding modulo stride) it depends on the shift
// delta = (v - u) * dilation alone, up to border rows and columns. With R_delta summed over the whole image and the
// border strips subtracted, a 3x3 kernel of stride 1 needs 13 products instead of 45 (the other shifts are transposes).
//
// Products accumulate in the type of the output over runs of a few hundred positions, the runs in float64.
// A NaN or Inf anywhere in x would reach `out` unpredictably where strips are subtracted:
//     status = 0 if every element of x is finite, else 1 (one int32 for the whole call); then CUDA, where the caller may not
//              want to wait for the status, makes NaN of all of out, and on the CPU out is undefined.
//
// Types: float32 -> float32, float64 -> float64; CUDA also float16 / bfloat16 -> float32.
#pragma once

#include "mtz/common.h"

namespace mtz {

struct Conv2dSecondMomentArgs {
    Scalar in, out_scalar;
    std::int64_t samples, channels, height, width, groups;
    std::int64_t kernel[2], stride[2], dilation[2];  // (y, x)
    std::int64_t padding[2];                         // (top, left); bottom and right follow from `output`
    std::int64_t output[2];                          // output positions (y, x)
    const void* x;                                   // [samples, channels, height, width]
    std::int64_t x_stride[4];
    void* out;             // [groups, C' k, C' k], contiguous
    std::int32_t* status;  // [1]
};

namespace cpu {
std::size_t conv2d_second_moment_workspace(const Conv2dSecondMomentArgs& args, int threads);
Status conv2d_second_moment(const Conv2dSecondMomentArgs& args, void* workspace, int threads);
}  // namespace cpu

namespace cuda {
std::size_t conv2d_second_moment_workspace(const Conv2dSecondMomentArgs& args);
Status conv2d_second_moment(const Conv2dSecondMomentArgs& args, void* workspace, void* stream);
}  // namespace cuda

}  // namespace mtz
