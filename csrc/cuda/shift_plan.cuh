// Which products of an image with its shifted self give the second moment of a convolution of stride 1, and how: what
// cpu/shift_plan.h says, in a form that fits into the arguments of a kernel. A plan is one of each axis; the spans, and the
// parts of a pair of kernel offsets, of the two are multiplied out.
//
//     window(u, v) = every(v - u) - sum of lines missed
#pragma once

#include "cuda/launch.cuh"
#include "mtz/conv2d_second_moment.h"

namespace mtz::cuda {

constexpr int kMostKernel = 5;
constexpr int kMostSpans = 2 * kMostKernel - 1 + 2 * (kMostKernel - 1) * (kMostKernel - 1);

// Positions q = first ... first + count - 1, each times the one at q + shift. A whole one is of every q of the image: where
// q or q + shift is outside, there are zeros.
struct Span {
    int first, count, shift;
    bool whole;
};

struct AxisPlan {
    int kernel, size, spans = 0, long_spans = 0;  // the long ones come first
    Span span[kMostSpans];
    // Of offsets (u, v), at u * kernel + v: the span to add, and those to take away, until -1; empty where nothing is seen.
    signed char part[kMostKernel * kMostKernel][kMostKernel + 1];

    // Where `sharing`, windows of one shift share the span of every position, else each has a span of its own.
    AxisPlan(const Conv2dSecondMomentArgs& g, int axis, bool sharing)
        : kernel(int(g.kernel[axis])), size(axis == 0 ? int(g.height) : int(g.width)) {
        for (int missed = 0; missed < (sharing ? 2 : 1); ++missed, long_spans = long_spans ? long_spans : spans)
            for (int u = 0; u < kernel; ++u)
                for (int v = 0; v < kernel; ++v) {
                    const int shift = v - u, low = shift < 0 ? -shift : 0, high = shift < 0 ? size : size - shift;
                    const int start = u - int(g.padding[axis]), end = start + int(g.output[axis]);
                    const int from = start > low ? start : low, to = end < high ? end : high;
                    signed char* parts = part[u * kernel + v];
                    if (!missed) parts[0] = parts[1] = -1;
                    if (from >= to) continue;
                    if (!missed) {
                        parts[0] = sharing ? add({0, size, shift, true}) : add({from, to - from, shift, false});
                        continue;
                    }
                    int count = 1;
                    for (int q = low; q < high; ++q)
                        if (q < from || q >= to) parts[count++] = add({q, 1, shift, false});
                    parts[count] = -1;
                }
    }
    Index positions() const {
        Index sum = 0;
        for (int i = 0; i < spans; ++i) sum += span[i].count;
        return sum;
    }

  private:
    signed char add(Span wanted) {
        for (int i = 0; i < spans; ++i)
            if (span[i].first == wanted.first && span[i].count == wanted.count && span[i].shift == wanted.shift)
                return static_cast<signed char>(i);
        span[spans] = wanted;
        return static_cast<signed char>(spans++);
    }
};

// The plan of fewest positions.
inline AxisPlan best_plan(const Conv2dSecondMomentArgs& g, int axis) {
    const AxisPlan shared(g, axis, true), single(g, axis, false);
    return shared.positions() < single.positions() ? shared : single;
}

}  // namespace mtz::cuda
