// What every operator shares: element types, views of the caller's memory, and the status that comes back.
//
// Every header of this folder declares one operator twice, with the same arguments:
//
//     namespace mtz::cpu   { size_t op_workspace(const OpArgs&, int threads);  Status op(const OpArgs&, void*
//     workspace, int threads); } namespace mtz::cuda  { size_t op_workspace(const OpArgs&);               Status
//     op(const OpArgs&, void* workspace, void* stream); }
//
// Rules both sides keep:
//   - all memory is the caller's; nothing is allocated on the device, nothing is kept between calls;
//   - `workspace` has at least op_workspace() bytes, aligned to 64, contents undefined on entry and on return; null if
//   0;
//   - sizes and strides are int64, strides count elements and may be zero (broadcast) or negative for inputs;
//   - any size may be zero: the call then writes what is left to write (sums over nothing are zero) and returns ok;
//   - shapes have been checked by the caller; *values* are the operator's business and go into its status array, never
//   into
//     Status, so that on a GPU the call neither synchronises nor reads back and can be captured in a CUDA graph;
//   - the result does not depend on the number of threads, and two calls with equal arguments give equal bits.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mtz {

enum class Scalar : std::int32_t { float32 = 0, float64 = 1, float16 = 2, bfloat16 = 3 };

constexpr std::size_t scalar_size(Scalar s) {
    return s == Scalar::float64 ? 8 : s == Scalar::float32 ? 4 : 2;
}

// A batch of matrices to read: element (p, i, j) is data[p * batch_stride + i * row_stride + j * column_stride].
struct Matrices {
    const void* data;
    std::int64_t batch_stride, row_stride, column_stride;
};

enum class Code : std::int32_t {
    ok = 0,
    unsupported = 1,  // this combination of element types is not implemented on this device
    device = 2,       // a CUDA call failed; `device_error` is its cudaError_t
};

struct Status {
    Code code = Code::ok;
    std::int32_t device_error = 0;
};

// Present in CUDA builds only: what the binding prints for Code::device.
namespace cuda {
const char* error_name(std::int32_t device_error);
const char* error_text(std::int32_t device_error);
}  // namespace cuda

}  // namespace mtz
