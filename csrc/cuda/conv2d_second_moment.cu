// Chooses between shifts of the packed image and gathered patches, by the number of multiply-adds. See
// mtz/conv2d_second_moment.h.
#include "cuda/conv2d_second_moment.cuh"

namespace mtz::cuda {
namespace {

__global__ void clear_kernel(std::int32_t* status) {
    if (blockIdx.x == 0 && threadIdx.x == 0) *status = 0;
}

template <class In, class S>
Status run(const Conv2dSecondMomentArgs& g, void* workspace, void* stream) {
    Status status;
    if (failed(status, launch_over(clear_kernel, 1, 32, stream, g.status))) return status;
    return shifts_are_fewer(g) ? moment_by_shifts<In, S>(g, workspace, stream)
                               : moment_by_patches<In, S>(g, workspace, stream);
}

}  // namespace

std::size_t conv2d_second_moment_workspace(const Conv2dSecondMomentArgs& g) {
    if (!shifts_are_fewer(g)) return patches_workspace(g);
    return g.in == Scalar::float64 ? shifts_workspace<double>(g) : shifts_workspace<float>(g);
}

Status conv2d_second_moment(const Conv2dSecondMomentArgs& g, void* workspace, void* stream) {
    if ((g.in == Scalar::float64) != (g.out_scalar == Scalar::float64) ||
        (g.out_scalar != Scalar::float64 && g.out_scalar != Scalar::float32))
        return {Code::unsupported};
    switch (g.in) {
        case Scalar::float32:
            return run<float, float>(g, workspace, stream);
        case Scalar::float64:
            return run<double, double>(g, workspace, stream);
        case Scalar::float16:
            return run<Half, float>(g, workspace, stream);
        case Scalar::bfloat16:
            return run<BFloat16, float>(g, workspace, stream);
    }
    return {Code::unsupported};
}

}  // namespace mtz::cuda
