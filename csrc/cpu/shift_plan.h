// Which products of an image with its shifted self give the second moment of a convolution of stride 1, and how.
//
// Along one axis of length H, kernel offset u sees positions q = o + first(u), o = 0 ... outputs - 1. The sum over o of
// x(o + first(u)) x(o + first(v)) is a sum over q of x(q) x(q + shift), shift = first(v) - first(u), over the window of u,
// where both lie inside the image. The sum over *every* q depends on the shift alone, and the window misses only a few
// lines at the ends:
//
//     window(u, v) = every(shift) - sum of lines missed
//
// In two dimensions a window is the product of two, and so is its expansion. Spans of equal position and shift are one.
#pragma once

#include <cstdint>
#include <vector>

#include "mtz/conv2d_second_moment.h"

namespace mtz::cpu {

struct Span {
    std::int64_t first, count, shift;  // q = first ... first + count - 1
};

// Sum over q in y x x (and all samples) of x_c(q) x_e(q + shift), for all channels c, e: one product of matrices.
struct ShiftTerm {
    Span y, x;
};

// sign * terms[term]
struct ShiftPart {
    std::int32_t term, sign;
};

// The block of kernel offsets (u, v): the sum of parts first_part ... last_part - 1.
struct ShiftBlock {
    std::int32_t u, v, first_part, last_part;
};

struct ShiftPlan {
    std::vector<ShiftTerm> terms;
    std::vector<ShiftPart> parts;
    std::vector<ShiftBlock> blocks;
    std::int64_t positions = 0;  // multiply-adds a sample and pair of channels
};

// The plan of fewest positions; with `half`, only for u <= v.
ShiftPlan make_shift_plan(const Conv2dSecondMomentArgs& args, bool half);

}  // namespace mtz::cpu
