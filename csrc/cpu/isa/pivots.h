// L diag(p) L^T of the small matrix D + V Y^T of a block of vectors, and what it says about the update (see
// mtz/sherman_morrison.h).
#pragma once

#include "cpu/isa/pack.h"
#include "mtz/sherman_morrison.h"

namespace mtz::cpu::MTZ_ISA {

inline bool finite(double x) {
    return x - x == 0;
}

// s [count, count], symmetric, holds V Y^T and is overwritten; sign[i] is that of weight i, all positive ones first. Written:
// pivot [count] and l [count, count], L transposed (its diagonal of ones and what is beside it undefined). `rounding` is
// the relative error of an element of s; count is a multiple of 8.
template <class T>
inline int factor_pivots(double* s, const double* sign, Index count, double rounding, double* pivot, T* l) {
    for (Index i = 0; i < count; ++i) {
        const double size = s[i * count + i] < 0 ? -s[i * count + i] : s[i * count + i];
        pivot[i] = rounding * (size > 1 ? size : 1);  // what p may be off by; replaced by p
        s[i * count + i] += sign[i];
    }
    for (Index i = 0; i < count; ++i) {
        const double* row = s + i * count;
        double p = row[i];
        if (!finite(p)) return kNotFinite;
        if (sign[i] > 0) {
            // 1 + x^T A^-1 x: at least 1 for a positive definite A, whatever rounding says
            if (p < 1 - pivot[i]) return kIndefinite;
            if (p < 1) p = 1;
        } else if (!(p < -pivot[i])) {
            return kIndefinite;
        }
        pivot[i] = p;
        const double inverse = 1 / p;
        // Schur complement, whole rows in eights: what lies left of the diagonal is not read again
        for (Index r = i + 1; r < count; ++r) {
            double* other = s + r * count;
            const double f = row[r] * inverse;
            l[i * count + r] = T(f);
            for (Index c = (i + 1) / 8 * 8; c < count; c += 8)
                for (Index e = 0; e < 8; ++e) other[c + e] -= f * row[c + e];
        }
    }
    return kUpdated;
}

// V <- L^-1 V and U <- -diag(1/p) L^-1 V, both [count, P] panels.
template <class T>
inline void solve_panel(const T* l, const double* pivot, Index count, T* v, T* u) {
    constexpr Index P = kPanel<T>, lanes = Simd<T>::kLanes;
    // P rows at a time: first less what the rows above contribute, then among themselves, in registers
    for (Index c = 0; c < P; c += lanes)
        for (Index i0 = 0; i0 < count; i0 += P) {
            Vector<T> rows[P];
#pragma GCC unroll 16
            for (Index i = 0; i < P; ++i) rows[i] = load(v + (i0 + i) * P + c);
            for (Index j = 0; j < i0; ++j) {
                const Vector<T> above = load(v + j * P + c);
#pragma GCC unroll 16
                for (Index i = 0; i < P; ++i) rows[i] -= above * l[j * count + i0 + i];
            }
#pragma GCC unroll 16
            for (Index j = 0; j < P; ++j)
#pragma GCC unroll 16
                for (Index i = j + 1; i < P; ++i) rows[i] -= rows[j] * l[(i0 + j) * count + i0 + i];
#pragma GCC unroll 16
            for (Index i = 0; i < P; ++i) {
                store(v + (i0 + i) * P + c, rows[i]);
                store(u + (i0 + i) * P + c, rows[i] * T(-1 / pivot[i0 + i]));
            }
        }
}

// The vectors in the order of an update, all positive weights first.
class VectorOrder {
  public:
    VectorOrder(const ShermanMorrisonArgs& args, Index p)
        : weight_(args.weight + p * args.weight_batch_stride), stride_(args.weight_stride), count_(args.k) {}

    // The next vector and its weight; false when there are no more. Weights that are NaN come last.
    bool next(Index& q, double& w) {
        for (; pass_ < 2; ++pass_, at_ = 0)
            while (at_ < count_) {
                q = at_++;
                w = weight_[q * stride_];
                if ((w >= 0) == (pass_ == 0)) return true;
            }
        return false;
    }

  private:
    const double* weight_;
    Index stride_, count_, at_ = 0;
    int pass_ = 0;
};

}  // namespace mtz::cpu::MTZ_ISA
