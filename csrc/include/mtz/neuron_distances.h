// Pairwise functional difference of neurons that are already projected:
//
//     out[p, i, j] = 1/2 * sum_q (a[p, i, q] - b[p, j, q])^2          a [batch, n, d], b [batch, m, d] -> out [batch,
//     n, m]
//
// With a factor F the caller passes a F and b F in float64: projected in float32, rows 1e-4 apart lose all but two
// digits.
//
// Accuracy. The pairs that matter are the nearly equal ones, and |a|^2 + |b|^2 - 2 ab has no correct digit for them. An
// implementation subtracts first, or screens with the product and subtracts wherever the product cancels:
//   float32 in and out          every pair to 1e-6 relative (1e-5 is the contract), however close the rows are;
//   float64 in, float32 out     the difference is taken in float64 wherever the rounded inputs would cancel; same
//   bounds; float64 in and out          every pair to 1e-13; float16, bfloat16 in        float32 out, differences and
//   sums in float32 (CUDA only; on a CPU the caller converts).
// Equal rows give exactly 0. A row with NaN makes NaN of its pairs; infinite rows are the caller's to reject.
//
// Types: in -> out is one of float32 -> float32, float64 -> float64, float64 -> float32, float16 -> float32,
// bfloat16 -> float32; anything else is Code::unsupported.
#pragma once

#include "mtz/common.h"

namespace mtz {

struct NeuronDistancesArgs {
    Scalar in, out_scalar;
    std::int64_t batch, n, m, d;
    Matrices a;  // [batch, n, d]
    Matrices b;  // [batch, m, d]
    void* out;   // [batch, n, m], contiguous
};

// out[p, i, q] = sum_k a[p, i, k] * factor[p, k, q] in float64, for float32 or float64 inputs: what a caller with a factor
// does first. On the CPU only: torch's product there may give other bits on another number of threads; its CUDA product
// does not depend on them.
struct ProjectionArgs {
    Scalar in;
    std::int64_t batch, n, d, r;
    Matrices a;       // [batch, n, d]
    Matrices factor;  // [batch, d, r]
    double* out;      // [batch, n, r], contiguous
};

namespace cpu {
std::size_t projection_workspace(const ProjectionArgs& args, int threads);
Status projection(const ProjectionArgs& args, void* workspace, int threads);

std::size_t neuron_distances_workspace(const NeuronDistancesArgs& args, int threads);
Status neuron_distances(const NeuronDistancesArgs& args, void* workspace, int threads);
}  // namespace cpu

namespace cuda {
std::size_t neuron_distances_workspace(const NeuronDistancesArgs& args);
Status neuron_distances(const NeuronDistancesArgs& args, void* workspace, void* stream);
}  // namespace cuda

}  // namespace mtz
