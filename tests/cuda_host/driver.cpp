// Runs operators' CUDA entry points under fibers, one call after another, as standard input says.
//
// A call is int64 numbers: operator, order, eager, seed, how many arguments, the arguments, how many buffers; then for each
// buffer its size in bytes and its content. Every buffer is allocated to the byte, so that the address sanitizer sees every
// access outside. Answered by int64 status code and device error and the contents of all buffers after the call.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "fibers.h"
#include "mtz/conv2d_second_moment.h"
#include "mtz/match_neurons.h"
#include "mtz/neuron_distances.h"
#include "mtz/sherman_morrison.h"

namespace {

using Int = std::int64_t;

struct Buffer {
    std::unique_ptr<char[]> data;
    std::size_t size = 0;
};

bool read(void* to, std::size_t bytes) {
    return std::fread(to, 1, bytes, stdin) == bytes;
}

Int number() {
    Int value;
    if (!read(&value, 8)) std::exit(4);
    return value;
}

// Arguments in turn, and buffers in turn; an input is its buffer and an offset in bytes.
struct Call {
    std::vector<Int> arguments;
    std::vector<Buffer> buffers;
    std::size_t next = 0, next_buffer = 0;

    Int take() { return arguments.at(next++); }
    template <class T = void>
    T* buffer() {
        return reinterpret_cast<T*>(buffers.at(next_buffer++).data.get());
    }
    mtz::Matrices matrices() {
        mtz::Matrices result{};
        result.data = buffer<char>() + take();
        result.batch_stride = take(), result.row_stride = take(), result.column_stride = take();
        return result;
    }
};

template <class Args>
mtz::Status with_workspace(const Args& args, std::size_t (*size)(const Args&),
                           mtz::Status (*run)(const Args&, void*, void*)) {
    const std::size_t bytes = size(args);
    void* workspace = nullptr;
    if (bytes && posix_memalign(&workspace, 64, bytes)) std::exit(5);
    if (bytes) std::memset(workspace, 0xff, bytes);
    const mtz::Status status = run(args, workspace, nullptr);
    std::free(workspace);
    return status;
}

mtz::Status neuron_distances(Call& c) {
    mtz::NeuronDistancesArgs g{};
    g.in = mtz::Scalar(c.take()), g.out_scalar = mtz::Scalar(c.take());
    g.batch = c.take(), g.n = c.take(), g.m = c.take(), g.d = c.take();
    g.a = c.matrices();
    g.b = c.matrices();
    g.out = c.buffer();
    return with_workspace(g, mtz::cuda::neuron_distances_workspace, mtz::cuda::neuron_distances);
}

#ifdef CUDA_HOST_SHERMAN_MORRISON
mtz::Status sherman_morrison(Call& c) {
    mtz::ShermanMorrisonArgs g{};
    g.scalar = mtz::Scalar(c.take()), g.vector_scalar = mtz::Scalar(c.take());
    g.batch = c.take(), g.d = c.take(), g.k = c.take();
    const mtz::Matrices inverse = c.matrices();
    g.inverse = const_cast<void*>(inverse.data);
    g.inverse_batch_stride = inverse.batch_stride, g.inverse_row_stride = inverse.row_stride;
    g.vectors = c.matrices();
    const mtz::Matrices weight = c.matrices();
    g.weight = static_cast<const double*>(weight.data);
    g.weight_batch_stride = weight.batch_stride, g.weight_stride = weight.row_stride;
    g.status = c.buffer<std::int32_t>();
    return with_workspace(g, mtz::cuda::sherman_morrison_workspace, mtz::cuda::sherman_morrison);
}
#endif

#ifdef CUDA_HOST_MATCH_NEURONS
mtz::Status match_neurons(Call& c) {
    mtz::MatchNeuronsArgs g{};
    g.scalar = mtz::Scalar(c.take()), g.method = mtz::MatchMethod(c.take());
    g.batch = c.take(), g.n = c.take(), g.m = c.take(), g.count = c.take();
    g.distances = c.matrices();
    g.pairs = c.buffer<Int>();
    g.status = c.buffer<Int>();
    return with_workspace(g, mtz::cuda::match_neurons_workspace, mtz::cuda::match_neurons);
}
#endif

#ifdef CUDA_HOST_CONV2D_SECOND_MOMENT
mtz::Status conv2d_second_moment(Call& c) {
    mtz::Conv2dSecondMomentArgs g{};
    g.in = mtz::Scalar(c.take()), g.out_scalar = mtz::Scalar(c.take());
    g.samples = c.take(), g.channels = c.take(), g.height = c.take(), g.width = c.take(), g.groups = c.take();
    for (Int* pair : {g.kernel, g.stride, g.dilation, g.padding, g.output})
        for (int axis = 0; axis < 2; ++axis) pair[axis] = c.take();
    g.x = c.buffer<char>() + c.take();
    for (Int& stride : g.x_stride) stride = c.take();
    g.out = c.buffer();
    g.status = c.buffer<std::int32_t>();
    return with_workspace(g, mtz::cuda::conv2d_second_moment_workspace, mtz::cuda::conv2d_second_moment);
}
#endif

mtz::Status run(Int op, Call& call) {
    switch (op) {
        case 0:
            return neuron_distances(call);
#ifdef CUDA_HOST_SHERMAN_MORRISON
        case 1:
            return sherman_morrison(call);
#endif
#ifdef CUDA_HOST_MATCH_NEURONS
        case 2:
            return match_neurons(call);
#endif
#ifdef CUDA_HOST_CONV2D_SECOND_MOMENT
        case 3:
            return conv2d_second_moment(call);
#endif
    }
    std::exit(6);
}

}  // namespace

int main() {
    Int op;
    while (read(&op, 8)) {
        cuda_host::Schedule schedule;
        schedule.order = cuda_host::Order(number());
        schedule.eager = number() != 0;
        schedule.seed = std::uint64_t(number());
        cuda_host::use(schedule);
        Call call;
        call.arguments.resize(std::size_t(number()));
        for (Int& argument : call.arguments) argument = number();
        call.buffers.resize(std::size_t(number()));
        for (Buffer& buffer : call.buffers) {
            buffer.size = std::size_t(number());
            buffer.data.reset(new char[buffer.size]);
            if (!read(buffer.data.get(), buffer.size)) return 4;
        }
        const mtz::Status status = run(op, call);
        const Int answer[2] = {Int(status.code), status.device_error};
        std::fwrite(answer, 8, 2, stdout);
        for (const Buffer& buffer : call.buffers) std::fwrite(buffer.data.get(), 1, buffer.size, stdout);
        std::fflush(stdout);
    }
    return 0;
}
