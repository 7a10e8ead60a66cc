// Threads of a CUDA launch as fibers: each runs until a barrier, then the next one. Blocks take turns; a cooperative launch
// has all of them at once. What a barrier is missing for shows in some order of the threads; a copy that is not waited for
// has not happened; threads that wait for different things are an error.
#pragma once

#include <cstddef>
#include <cstdint>

namespace cuda_host {

// Eager copies happen when they are started, others when they are waited for: both are within the rules of cp.async.
enum class Order { forward, backward, random };
struct Schedule {
    Order order = Order::forward;
    bool eager = false;
    std::uint64_t seed = 0;
};
void use(const Schedule& schedule);

// Number of the fault that is planted (CUDA_HOST_FAULT), for kernels patched by tests/cuda_host/host.py; 0 for none.
extern const int fault;
// Whether products are taken on tensor cores: unless CUDA_HOST_TENSOR_CORES is 0.
extern const bool tensor_cores;

[[noreturn]] void fail(const char* what);
char* shared_piece(std::size_t at, std::size_t bytes);
bool wait_block(bool value);  // whether any thread of the block came with true
void wait_grid();
std::uint64_t exchange(std::uint64_t value, int lane);  // that of this lane of the warp
using Fragment = std::uint32_t[6];
const Fragment* gather(const Fragment& mine);  // of all lanes of the warp, until it does so once more
void copy_start(void* to, const void* from, int bytes, int valid);
void copy_commit();
void copy_wait(int pending);

}  // namespace cuda_host
