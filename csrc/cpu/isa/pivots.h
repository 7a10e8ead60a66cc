// L diag(p) L^T of the small matrix D + V Y^T of a block of vectors, and what it says about the update (see
// mtz/sherman_morrison.h).
#pragma once

#include "cpu/isa/pack.h"
#include "mtz/sherman_morrison.h"

namespace mtz::cpu::MTZ_ISA {

inline bool finite(double x) {
    return x - x == 0;
}

// s [count, count] holds V Y^T on entry (its lower triangle is used) and L below the diagonal on return; sign[i] is that
// of weight i, all positive ones first; pivot [count]. `rounding` is the relative error of an element of s.
inline int factor_pivots(double* s, const double* sign, Index count, double rounding, double* pivot) {
    for (Index i = 0; i < count; ++i) {
        double* row = s + i * count;
        const double size = row[i] < 0 ? -row[i] : row[i];
        // L[i, j] p_j for j < i, then L[i, j]; row i of the Schur complement, left to right
        double p = sign[i] + row[i];
        for (Index j = 0; j < i; ++j) {
            const double* other = s + j * count;
            double sum = row[j];
            for (Index l = 0; l < j; ++l) sum -= row[l] * pivot[l] * other[l];
            row[j] = sum / pivot[j];
            p -= row[j] * sum;
        }
        if (!finite(p)) return kNotFinite;
        const double doubt = rounding * (size > 1 ? size : 1);
        if (sign[i] > 0) {
            // 1 + x^T A^-1 x: at least 1 for a positive definite A, whatever rounding says
            if (p < 1 - doubt) return kIndefinite;
            if (p < 1) p = 1;
        } else if (!(p < -doubt)) {
            return kIndefinite;
        }
        pivot[i] = p;
    }
    return kUpdated;
}

// V <- L^-1 V and U <- -diag(1/p) L^-1 V, both [count, P] panels.
template <class T>
inline void solve_panel(const double* l, const double* pivot, Index count, T* v, T* u) {
    constexpr Index P = kPanel<T>, lanes = Simd<T>::kLanes;
    for (Index i = 0; i < count; ++i) {
        const double* row = l + i * count;
        Vector<T> sum[P / lanes];
#pragma GCC unroll 4
        for (Index c = 0; c < P / lanes; ++c) sum[c] = load(v + i * P + c * lanes);
        for (Index j = 0; j < i; ++j) {
            const T f = T(row[j]);
#pragma GCC unroll 4
            for (Index c = 0; c < P / lanes; ++c) sum[c] -= load(v + j * P + c * lanes) * f;
        }
        const T scale = T(-1 / pivot[i]);
#pragma GCC unroll 4
        for (Index c = 0; c < P / lanes; ++c) {
            store(v + i * P + c * lanes, sum[c]);
            store(u + i * P + c * lanes, sum[c] * scale);
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
