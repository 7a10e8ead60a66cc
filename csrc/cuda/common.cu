#include <cuda_runtime.h>

#include "mtz/common.h"

namespace mtz::cuda {

const char* error_name(std::int32_t device_error) {
    return cudaGetErrorName(cudaError_t(device_error));
}

const char* error_text(std::int32_t device_error) {
    return cudaGetErrorString(cudaError_t(device_error));
}

}  // namespace mtz::cuda
