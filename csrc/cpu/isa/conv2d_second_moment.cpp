#include "mtz/conv2d_second_moment.h"

#include <cmath>

#include "cpu/isa/kernels.h"

namespace mtz::cpu::MTZ_ISA {
namespace {

template <class T>
void run(const Conv2dSecondMomentArgs& g, int threads) {
    const T* x = static_cast<const T*>(g.x);
    const std::int64_t c = g.channels / g.groups, k = g.kernel[0] * g.kernel[1], d = c * k;
    const auto at = [&](std::int64_t s, std::int64_t ch, std::int64_t y, std::int64_t xx) -> double {
        if (y < 0 || y >= g.height || xx < 0 || xx >= g.width) return 0;
        return x[s * g.x_stride[0] + ch * g.x_stride[1] + y * g.x_stride[2] + xx * g.x_stride[3]];
    };
    *g.status = 0;
    for (std::int64_t s = 0; s < g.samples; ++s)
        for (std::int64_t ch = 0; ch < g.channels; ++ch)
            for (std::int64_t y = 0; y < g.height; ++y)
                for (std::int64_t xx = 0; xx < g.width; ++xx)
                    if (!std::isfinite(at(s, ch, y, xx))) *g.status = 1;
#pragma omp parallel for num_threads(threads) collapse(2)
    for (std::int64_t gr = 0; gr < g.groups; ++gr)
        for (std::int64_t i = 0; i < d; ++i)
            for (std::int64_t j = i; j < d; ++j) {
                const std::int64_t u = i % k, v = j % k;
                const std::int64_t uy = u / g.kernel[1] * g.dilation[0] - g.padding[0];
                const std::int64_t ux = u % g.kernel[1] * g.dilation[1] - g.padding[1];
                const std::int64_t vy = v / g.kernel[1] * g.dilation[0] - g.padding[0];
                const std::int64_t vx = v % g.kernel[1] * g.dilation[1] - g.padding[1];
                double sum = 0;
                for (std::int64_t s = 0; s < g.samples; ++s)
                    for (std::int64_t py = 0; py < g.output[0]; ++py)
                        for (std::int64_t px = 0; px < g.output[1]; ++px) {
                            const std::int64_t y = py * g.stride[0], xx = px * g.stride[1];
                            sum += at(s, gr * c + i / k, y + uy, xx + ux) * at(s, gr * c + j / k, y + vy, xx + vx);
                        }
                T* out = static_cast<T*>(g.out) + gr * d * d;
                out[i * d + j] = out[j * d + i] = T(sum);
            }
}

}  // namespace

std::size_t conv2d_second_moment_workspace(const Conv2dSecondMomentArgs&, int) {
    return 0;
}

Status conv2d_second_moment(const Conv2dSecondMomentArgs& g, void*, int threads) {
    if (g.in == Scalar::float32 && g.out_scalar == Scalar::float32)
        run<float>(g, threads);
    else if (g.in == Scalar::float64 && g.out_scalar == Scalar::float64)
        run<double>(g, threads);
    else
        return {Code::unsupported};
    return {};
}

}  // namespace mtz::cpu::MTZ_ISA
