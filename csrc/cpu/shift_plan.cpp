#include "cpu/shift_plan.h"

#include <algorithm>

namespace mtz::cpu {
namespace {

struct Signed {
    std::int32_t span, sign;
};

// All pairs of offsets of one axis as sums of spans.
struct AxisPlan {
    std::vector<Span> spans;
    std::vector<std::vector<Signed>> pairs;  // [kernel * kernel]

    std::int32_t add(Span span) {
        for (std::size_t i = 0; i < spans.size(); ++i)
            if (spans[i].first == span.first && spans[i].count == span.count && spans[i].shift == span.shift)
                return std::int32_t(i);
        spans.push_back(span);
        return std::int32_t(spans.size()) - 1;
    }
};

AxisPlan plan_axis(const Conv2dSecondMomentArgs& g, int axis, bool shared) {
    const std::int64_t size = axis == 0 ? g.height : g.width, kernel = g.kernel[axis];
    AxisPlan plan;
    for (std::int64_t u = 0; u < kernel; ++u)
        for (std::int64_t v = 0; v < kernel; ++v) {
            const std::int64_t first = u * g.dilation[axis] - g.padding[axis], shift = (v - u) * g.dilation[axis];
            const std::int64_t low = std::max<std::int64_t>(0, -shift), high = std::min(size, size - shift);
            const std::int64_t from = std::max(low, first), to = std::min(high, first + g.output[axis]);
            std::vector<Signed> sum;
            if (from < to && !shared) {
                sum.push_back({plan.add({from, to - from, shift}), 1});
            } else if (from < to) {
                sum.push_back({plan.add({low, high - low, shift}), 1});
                for (std::int64_t q = low; q < high; ++q)
                    if (q < from || q >= to) sum.push_back({plan.add({q, 1, shift}), -1});
            }
            plan.pairs.push_back(std::move(sum));
        }
    return plan;
}

ShiftPlan combine(const Conv2dSecondMomentArgs& g, const AxisPlan& y, const AxisPlan& x, bool half) {
    ShiftPlan plan;
    std::vector<std::int32_t> known(y.spans.size() * x.spans.size(), -1);
    const std::int64_t width = g.kernel[1], offsets = g.kernel[0] * width;
    for (std::int64_t u = 0; u < offsets; ++u)
        for (std::int64_t v = half ? u : 0; v < offsets; ++v) {
            const auto first = std::int32_t(plan.parts.size());
            for (const Signed& sy : y.pairs[u / width * g.kernel[0] + v / width])
                for (const Signed& sx : x.pairs[u % width * width + v % width]) {
                    std::int32_t& term = known[sy.span * x.spans.size() + sx.span];
                    if (term < 0) {
                        term = std::int32_t(plan.terms.size());
                        plan.terms.push_back({y.spans[sy.span], x.spans[sx.span]});
                        plan.positions += y.spans[sy.span].count * x.spans[sx.span].count;
                    }
                    plan.parts.push_back({term, sy.sign * sx.sign});
                }
            plan.blocks.push_back({std::int32_t(u), std::int32_t(v), first, std::int32_t(plan.parts.size())});
        }
    return plan;
}

}  // namespace

ShiftPlan make_shift_plan(const Conv2dSecondMomentArgs& g, bool half) {
    ShiftPlan best;
    for (int way = 0; way < 4; ++way) {
        ShiftPlan plan = combine(g, plan_axis(g, 0, way & 1), plan_axis(g, 1, way & 2), half);
        if (way == 0 || plan.positions < best.positions) best = std::move(plan);
    }
    return best;
}

}  // namespace mtz::cpu
