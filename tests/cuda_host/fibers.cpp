#include "fibers.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(at, size)
#define ASAN_UNPOISON_MEMORY_REGION(at, size)
#endif

#if defined(__x86_64__) && defined(__linux__)
// Saves the registers that a call keeps, and the stack pointer, and takes up those of another fiber.
extern "C" void cuda_host_switch(void** from, void* to);
asm(R"(
.text
.type cuda_host_switch, @function
cuda_host_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");
#define CUDA_HOST_ASSEMBLY 1
#else
#include <ucontext.h>
#define CUDA_HOST_ASSEMBLY 0
#endif

namespace cuda_host {

[[noreturn]] void fail(const char* what) {
    std::fprintf(stderr, "cuda_host: %s\n", what);
    std::exit(3);
}

namespace {

constexpr std::size_t kStack = 64 << 10;
constexpr int kLanes = 32;
constexpr int kSharedMemory = 99 << 10;  // of a block on the smallest device that is built for

class Context {
  public:
#if CUDA_HOST_ASSEMBLY
    void start(char* stack, void (*entry)()) {
        void** top = reinterpret_cast<void**>(stack + kStack);
        *--top = nullptr;  // as after a call: the stack pointer is 8 off a multiple of 16 on entry
        *--top = reinterpret_cast<void*>(entry);
        for (int i = 0; i < 6; ++i) *--top = nullptr;
        at_ = top;
    }
    static void change(Context& from, Context& to) { cuda_host_switch(&from.at_, to.at_); }

  private:
    void* at_ = nullptr;
#else
    void start(char* stack, void (*entry)()) {
        getcontext(&context_);
        context_.uc_stack.ss_sp = stack;
        context_.uc_stack.ss_size = kStack;
        makecontext(&context_, entry, 0);
    }
    static void change(Context& from, Context& to) { swapcontext(&from.context_, &to.context_); }

  private:
    ucontext_t context_;
#endif
};

struct Copy {
    void* to;
    const void* from;
    int bytes, valid;
    void run() const {
        std::memcpy(to, from, valid);
        std::memset(static_cast<char*>(to) + valid, 0, bytes - valid);
    }
};

enum class Wait { nothing, warp, block, grid, done };

struct Block;
struct Fiber {
    Place place;
    Context context;
    Block* block = nullptr;
    int index = 0;  // in the block
    Wait wait = Wait::nothing;
    int exchanges = 0, gathers = 0, votes = 0;
    std::vector<Copy> open;
    std::deque<std::vector<Copy>> groups;
};

struct Block {
    std::vector<Fiber*> fibers;
    std::unique_ptr<char[]> shared;
    std::size_t shared_size = 0;
    std::vector<std::uint64_t> lanes[2];
    std::unique_ptr<Fragment[]> gathered[2];
    bool vote[2] = {false, false};
};

Schedule schedule;
std::mt19937_64 randomness;
std::vector<std::unique_ptr<char[]>> stacks;
Context scheduler;
Fiber* now = nullptr;
const std::function<void()>* body = nullptr;
const void* raised_kernel = nullptr;
std::size_t raised_size = 0;

void leave(Wait wait) {
    Fiber* self = now;
    self->wait = wait;
    Context::change(self->context, scheduler);
}

void entry() {
    (*body)();
    now->open.clear();
    leave(Wait::done);
    fail("a finished thread ran again");
}

bool all(const std::vector<Fiber*>& fibers, std::size_t first, std::size_t last, Wait wait) {
    return std::all_of(fibers.begin() + first, fibers.begin() + last, [=](Fiber* f) { return f->wait == wait; });
}

void release(const std::vector<Fiber*>& fibers, std::size_t first, std::size_t last) {
    for (std::size_t i = first; i < last; ++i) fibers[i]->wait = Wait::nothing;
}

bool release_what_is_complete(const std::vector<Block*>& blocks) {
    bool released = false, grid = true;
    for (Block* block : blocks) {
        auto& fibers = block->fibers;
        for (std::size_t i = 0; i < fibers.size(); i += kLanes) {
            const std::size_t last = std::min(i + kLanes, fibers.size());
            if (all(fibers, i, last, Wait::warp)) release(fibers, i, last), released = true;
        }
        if (all(fibers, 0, fibers.size(), Wait::block)) {
            block->vote[fibers[0]->votes & 1] = false;  // of the barrier before and the one after
            release(fibers, 0, fibers.size());
            released = true;
        }
        grid = grid && all(fibers, 0, fibers.size(), Wait::grid);
    }
    if (grid && !blocks.empty()) {
        for (Block* block : blocks) release(block->fibers, 0, block->fibers.size());
        released = true;
    }
    return released;
}

void run_blocks(const cudaLaunchConfig_t& config, unsigned first, unsigned last) {
    const unsigned size = config.blockDim.x;
    std::vector<std::unique_ptr<Block>> owned;
    std::vector<std::unique_ptr<Fiber>> fibers;
    std::vector<Block*> blocks;
    std::vector<Fiber*> turn;
    for (unsigned b = first; b < last; ++b) {
        owned.push_back(std::make_unique<Block>());
        Block* block = owned.back().get();
        blocks.push_back(block);
        block->shared_size = config.dynamicSmemBytes;
        block->shared = std::make_unique<char[]>(block->shared_size + 1);
        std::memset(block->shared.get(), 0xff, block->shared_size);  // NaN
        ASAN_POISON_MEMORY_REGION(block->shared.get(), block->shared_size);
        for (auto& lanes : block->lanes) lanes.resize(size);
        for (auto& lanes : block->gathered) lanes = std::make_unique<Fragment[]>(size);
        for (unsigned t = 0; t < size; ++t) {
            fibers.push_back(std::make_unique<Fiber>());
            Fiber* fiber = fibers.back().get();
            fiber->place = {dim3(t, 0, 0), dim3(b, 0, 0), config.blockDim, config.gridDim};
            fiber->block = block;
            fiber->index = int(t);
            block->fibers.push_back(fiber);
            turn.push_back(fiber);
        }
    }
    while (stacks.size() < turn.size()) stacks.push_back(std::make_unique<char[]>(kStack));
    for (std::size_t i = 0; i < turn.size(); ++i) {
        ASAN_UNPOISON_MEMORY_REGION(stacks[i].get(), kStack);
        turn[i]->context.start(stacks[i].get(), entry);
    }
    if (schedule.order == Order::backward) std::reverse(turn.begin(), turn.end());
    for (;;) {
        if (schedule.order == Order::random) std::shuffle(turn.begin(), turn.end(), randomness);
        bool ran = false, done = true;
        for (Fiber* fiber : turn) {
            if (fiber->wait == Wait::nothing) {
                now = fiber;
                here = &fiber->place;
                Context::change(scheduler, fiber->context);
                ran = true;
            }
            done = done && fiber->wait == Wait::done;
        }
        if (done) break;
        if (!release_what_is_complete(blocks) && !ran) fail("threads wait for a barrier that others do not reach");
    }
    for (Block* block : blocks) ASAN_UNPOISON_MEMORY_REGION(block->shared.get(), block->shared_size);
}

}  // namespace

Place* here = nullptr;
const int fault = std::getenv("CUDA_HOST_FAULT") ? std::atoi(std::getenv("CUDA_HOST_FAULT")) : 0;
const bool tensor_cores = !std::getenv("CUDA_HOST_TENSOR_CORES") || std::atoi(std::getenv("CUDA_HOST_TENSOR_CORES"));

void use(const Schedule& wanted) {
    schedule = wanted;
    randomness.seed(wanted.seed);
}

cudaError_t run(const cudaLaunchConfig_t& config, const void* kernel, const std::function<void()>& thread) {
    const unsigned blocks = config.gridDim.x, threads = config.blockDim.x;
    const bool cooperative = config.numAttrs > 0 && config.attrs[0].val.cooperative;
    if (blocks == 0 || threads == 0 || threads > 1024 || threads % kLanes) return cudaErrorInvalidConfiguration;
    if (config.dynamicSmemBytes > (raised_kernel == kernel ? raised_size : 48 * 1024)) return cudaErrorInvalidValue;
    body = &thread;
    if (cooperative) {
        run_blocks(config, 0, blocks);
        return cudaSuccess;
    }
    std::vector<unsigned> order(blocks);
    std::iota(order.begin(), order.end(), 0);
    if (schedule.order == Order::backward) std::reverse(order.begin(), order.end());
    if (schedule.order == Order::random) std::shuffle(order.begin(), order.end(), randomness);
    for (unsigned block : order) run_blocks(config, block, block + 1);
    return cudaSuccess;
}

char* shared_piece(std::size_t at, std::size_t bytes) {
    Block* block = now->block;
    if (at + bytes > block->shared_size) fail("a kernel takes more shared memory than its launch asked for");
    ASAN_UNPOISON_MEMORY_REGION(block->shared.get() + at, bytes);
    return block->shared.get() + at;
}

bool wait_block(bool value) {
    Fiber* self = now;
    const int slot = self->votes++ & 1;
    Block* block = self->block;
    block->vote[slot] = block->vote[slot] || value;
    leave(Wait::block);
    return block->vote[slot];
}

void wait_grid() {
    leave(Wait::grid);
}

std::uint64_t exchange(std::uint64_t value, int lane) {
    Fiber* self = now;
    auto& lanes = self->block->lanes[self->exchanges++ & 1];
    lanes[self->index] = value;
    leave(Wait::warp);
    if (lane < 0 || lane >= kLanes) fail("a shuffle leaves its warp");
    return lanes[self->index / kLanes * kLanes + lane];
}

const Fragment* gather(const Fragment& mine) {
    Fiber* self = now;
    const auto& lanes = self->block->gathered[self->gathers++ & 1];
    std::copy(mine, mine + 6, lanes[self->index]);
    leave(Wait::warp);
    return &lanes[self->index / kLanes * kLanes];
}

void copy_start(void* to, const void* from, int bytes, int valid) {
    if (valid < 0 || valid > bytes) fail("an asynchronous copy of fewer than no or more than all bytes");
    if (reinterpret_cast<std::uintptr_t>(to) % bytes || (valid && reinterpret_cast<std::uintptr_t>(from) % bytes))
        fail("an asynchronous copy is not aligned to its size");
    const Copy copy{to, from, bytes, valid};
    schedule.eager ? copy.run() : now->open.push_back(copy);
}

void copy_commit() {
    now->groups.push_back(std::move(now->open));
    now->open.clear();
}

void copy_wait(int pending) {
    for (; int(now->groups.size()) > pending; now->groups.pop_front())
        for (const Copy& copy : now->groups.front()) copy.run();
}

}  // namespace cuda_host

// CUDA_HOST_SHARED_MEMORY is what the device says it has: little, so that small cases take the way of large ones, or more.
static int shared_memory() {
    const char* said = std::getenv("CUDA_HOST_SHARED_MEMORY");
    return said ? std::atoi(said) : cuda_host::kSharedMemory;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
    if (value > std::max(cuda_host::kSharedMemory, shared_memory())) return cudaErrorInvalidValue;
    cuda_host::raised_kernel = kernel;
    cuda_host::raised_size = std::size_t(value);
    return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    switch (attribute) {
        case cudaDevAttrMultiProcessorCount:
            *value = 2;
            break;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin:
            *value = shared_memory();
            break;
        case cudaDevAttrComputeCapabilityMajor:  // 9.0, or 8.6 without fast tensor cores
            *value = cuda_host::tensor_cores ? 9 : 8;
            break;
        case cudaDevAttrComputeCapabilityMinor:
            *value = cuda_host::tensor_cores ? 0 : 6;
            break;
    }
    return cudaSuccess;
}

const char* cudaGetErrorName(cudaError_t) {
    return "cudaError";
}

const char* cudaGetErrorString(cudaError_t) {
    return "an error of the stand-in";
}
