// Chooses between shifts of the packed image and unfolding in chunks, by the number of multiply-adds. See
// mtz/conv2d_second_moment.h.
#include "mtz/conv2d_second_moment.h"

#include "cpu/dispatch.h"
#include "cpu/isa/kernels.h"
#include "cpu/shift_plan.h"

namespace mtz::cpu {
namespace {

struct Method {
    bool shifts = false;
    double instructions = 0;
    ShiftPlan full, half;

    explicit Method(const Conv2dSecondMomentArgs& g) {
        const std::int64_t panel = 64 / std::int64_t(scalar_size(g.in)), per_group = g.channels / g.groups;
        const std::int64_t offsets = g.kernel[0] * g.kernel[1];
        const double columns = double((per_group * offsets + panel - 1) / panel);
        const double unfolded = columns * (columns + 1) / 2 * double(g.output[0] * g.output[1]);
        instructions = double(g.groups * g.samples * panel) * unfolded;
        if (g.stride[0] != 1 || g.stride[1] != 1) return;
        if (offsets > 225) return;  // a plan of offsets^2 blocks is no longer small
        half = make_shift_plan(g, true);
        full = make_shift_plan(g, false);
        const double panels = double((per_group + panel - 1) / panel);
        const double shifted = panels * (panels - 1) / 2 * double(full.positions) + panels * double(half.positions);
        shifts = shifted < unfolded;
        if (shifts) instructions *= shifted / unfolded;
    }

    // Threads that the work is worth; see cpu/isa/threads.h.
    int worth(int threads) const {
        const double most = 1 + instructions / 16384;
        return most < threads ? int(most) : threads;
    }

    ShiftPlans plans() const { return {view(half), view(full)}; }

    static ShiftPlans::View view(const ShiftPlan& p) {
        return {p.terms.data(), p.parts.data(), p.blocks.data(), std::int64_t(p.terms.size()),
                std::int64_t(p.blocks.size())};
    }
};

bool supported(const Conv2dSecondMomentArgs& g) {
    return g.in == g.out_scalar && (g.in == Scalar::float32 || g.in == Scalar::float64);
}

bool nothing_to_sum(const Conv2dSecondMomentArgs& g) {
    return g.samples * g.channels * g.height * g.width * g.output[0] * g.output[1] == 0;
}

}  // namespace

std::size_t conv2d_second_moment_workspace(const Conv2dSecondMomentArgs& g, int threads) {
    if (!supported(g) || nothing_to_sum(g)) return 0;
    const Method method(g);
    threads = method.worth(threads);
    if (!method.shifts) MTZ_DISPATCH(second_moment_by_unfolding_workspace(g, threads))
    MTZ_DISPATCH(second_moment_by_shifts_workspace(g, method.plans(), threads))
}

Status conv2d_second_moment(const Conv2dSecondMomentArgs& g, void* workspace, int threads) {
    if (!supported(g)) return {Code::unsupported};
    *g.status = 0;
    if (nothing_to_sum(g)) {
        const std::int64_t side = g.channels / g.groups * g.kernel[0] * g.kernel[1];
        char* out = static_cast<char*>(g.out);
        for (std::size_t e = 0; e < std::size_t(g.groups * side * side) * scalar_size(g.out_scalar); ++e) out[e] = 0;
        return {};
    }
    const Method method(g);
    threads = method.worth(threads);
    if (!method.shifts) MTZ_DISPATCH(second_moment_by_unfolding(g, workspace, threads))
    MTZ_DISPATCH(second_moment_by_shifts(g, method.plans(), workspace, threads))
}

}  // namespace mtz::cpu
