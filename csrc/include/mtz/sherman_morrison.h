// In-place update of the inverse A^-1 of a symmetric positive definite matrix by k weighted vectors x_q:
//
//     (A + sum_q w_q x_q x_q^T)^-1              inverse [batch, d, d], vectors [batch, k, d], weight [batch, k]
//
// One vector is the Sherman-Morrison identity A^-1 - w A^-1 x x^T A^-1 / (1 + w x^T A^-1 x); a block of them, with
// y_q = sqrt|w_q| x_q and the signs D = diag(sign w_q), is Woodbury's:
//
//     A^-1 - V^T (D + V Y^T)^-1 V,              V = Y A^-1   [k, d]
//
// Validity. Taken with all w > 0 first, the update keeps A positive definite exactly if every pivot of the unpivoted
// L diag(p) L^T of D + V Y^T has the sign of its weight. A matrix for which a pivot fails, or is too small against its
// own rounding to tell, or which meets a value that is not finite, is left as it was, bit for bit; the others are
// updated. `status` says which, see ShermanMorrisonStatus.
//
// The result is symmetric to the last bit: one triangle is computed and mirrored. `inverse` must be symmetric on entry
// (the binding does not check); both triangles may be read.
//
// Types: inverse and vectors float32 or float64 alike; weight always float64 (it is small, and a scalar is not
// rounded). CUDA also takes float16 / bfloat16 vectors with a float32 inverse.
#pragma once

#include "mtz/common.h"

namespace mtz {

// Written to status[p] as int32.
enum ShermanMorrisonStatus : std::int32_t {
    kUpdated = 0,
    kIndefinite = 1,  // the matrix, or the matrix after the update, is not positive definite
    kNotFinite = 2,   // NaN or Inf in the inverse, the vectors, the weights or the result
};

struct ShermanMorrisonArgs {
    Scalar scalar;         // of inverse
    Scalar vector_scalar;  // of vectors
    std::int64_t batch, d, k;
    void* inverse;  // [batch, d, d], read and written; columns contiguous
    std::int64_t inverse_batch_stride, inverse_row_stride;
    Matrices vectors;      // [batch, k, d]
    const double* weight;  // [batch, k]
    std::int64_t weight_batch_stride, weight_stride;
    std::int32_t* status;  // [batch], written
};

namespace cpu {
std::size_t sherman_morrison_workspace(const ShermanMorrisonArgs& args, int threads);
Status sherman_morrison(const ShermanMorrisonArgs& args, void* workspace, int threads);
}  // namespace cpu

namespace cuda {
std::size_t sherman_morrison_workspace(const ShermanMorrisonArgs& args);
Status sherman_morrison(const ShermanMorrisonArgs& args, void* workspace, void* stream);
}  // namespace cuda

}  // namespace mtz
