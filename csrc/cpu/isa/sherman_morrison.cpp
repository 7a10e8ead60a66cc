#include "mtz/sherman_morrison.h"

#include <cmath>

#include "cpu/isa/kernels.h"

namespace mtz::cpu::MTZ_ISA {
namespace {

// One vector at a time, in float64, on a copy.
template <class T>
int update(const ShermanMorrisonArgs& g, std::int64_t p, double* copy, double* ax) {
    T* inverse = static_cast<T*>(g.inverse) + p * g.inverse_batch_stride;
    const T* x0 = static_cast<const T*>(g.vectors.data) + p * g.vectors.batch_stride;
    const std::int64_t d = g.d;
    for (std::int64_t i = 0; i < d; ++i)
        for (std::int64_t j = 0; j < d; ++j) copy[i * d + j] = inverse[i * g.inverse_row_stride + j];
    for (int sign = 1; sign >= -1; sign -= 2)  // all that is added first: what is then taken away decides
        for (std::int64_t q = 0; q < g.k; ++q) {
            const double w = g.weight[p * g.weight_batch_stride + q * g.weight_stride];
            if (!std::isfinite(w)) return kNotFinite;
            if (w == 0 || (w > 0) != (sign > 0)) continue;
            const T* x = x0 + q * g.vectors.row_stride;
            double quadratic = 0;
            for (std::int64_t i = 0; i < d; ++i) {
                ax[i] = 0;
                for (std::int64_t j = 0; j < d; ++j) ax[i] += copy[i * d + j] * x[j * g.vectors.column_stride];
                quadratic += ax[i] * x[i * g.vectors.column_stride];
            }
            const double pivot = 1 + w * quadratic;
            if (!std::isfinite(pivot)) return kNotFinite;
            if (!(pivot > 1e-6) || quadratic < 0) return kIndefinite;
            for (std::int64_t i = 0; i < d; ++i)
                for (std::int64_t j = 0; j < d; ++j) copy[i * d + j] -= w / pivot * ax[i] * ax[j];
        }
    for (std::int64_t i = 0; i < d * d; ++i)
        if (!std::isfinite(T(copy[i]))) return kNotFinite;
    for (std::int64_t i = 0; i < d; ++i)
        for (std::int64_t j = i; j < d; ++j)
            inverse[i * g.inverse_row_stride + j] = inverse[j * g.inverse_row_stride + i] = T(copy[i * d + j]);
    return kUpdated;
}

}  // namespace

std::size_t sherman_morrison_workspace(const ShermanMorrisonArgs& g, int) {
    return sizeof(double) * g.d * (g.d + 1);
}

Status sherman_morrison(const ShermanMorrisonArgs& g, void* workspace, int) {
    double* copy = static_cast<double*>(workspace);
    for (std::int64_t p = 0; p < g.batch; ++p) {
        if (g.scalar == Scalar::float32)
            g.status[p] = update<float>(g, p, copy, copy + g.d * g.d);
        else if (g.scalar == Scalar::float64)
            g.status[p] = update<double>(g, p, copy, copy + g.d * g.d);
        else
            return {Code::unsupported};
    }
    return {};
}

}  // namespace mtz::cpu::MTZ_ISA
