// The only file that knows Python. Pointers, sizes and strides come in as integers; shapes were checked by mtz_ext.
//
// Every operator has two functions: op_workspace(backend, execution, ...) -> bytes, and op(backend, execution, workspace,
// ...). backend is 0 for the CPU, where `execution` is the number of threads, or 1 for CUDA, where it is the stream. The
// GIL is released while they run.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "cpu/dispatch.h"
#include "mtz/conv2d_second_moment.h"
#include "mtz/match_neurons.h"
#include "mtz/neuron_distances.h"
#include "mtz/sherman_morrison.h"

namespace py = pybind11;

namespace {

using Int = std::int64_t;
using Address = std::uintptr_t;

template <class T = void>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

void check(const char* op, mtz::Status status) {
    if (status.code == mtz::Code::ok) return;
    if (status.code == mtz::Code::unsupported)
        throw std::invalid_argument(std::string(op) + ": this combination of element types is not implemented here");
#ifdef MTZ_HAS_CUDA
    throw std::runtime_error(std::string(op) + ": " + mtz::cuda::error_name(status.device_error) + ": " +
                             mtz::cuda::error_text(status.device_error));
#else
    throw std::runtime_error(std::string(op) + ": device error " + std::to_string(status.device_error));
#endif
}

mtz::Matrices matrices(Address data, Int batch_stride, Int row_stride, Int column_stride) {
    return {pointer(data), batch_stride, row_stride, column_stride};
}

// Binds `name` and `name`_workspace; `make` turns their remaining arguments into the operator's struct.
template <class Args, class... Rest>
struct Op {
    const char* name;
    std::size_t (*cpu_workspace)(const Args&, int);
    mtz::Status (*cpu)(const Args&, void*, int);
    std::size_t (*cuda_workspace)(const Args&);
    mtz::Status (*cuda)(const Args&, void*, void*);
    Args (*make)(Rest...);

    void bind(py::module_& m) const {
        const Op op = *this;
        m.def((std::string(name) + "_workspace").c_str(), [op](int backend, Int execution, Rest... rest) {
            const Args args = op.make(rest...);
            return backend == 0 ? op.cpu_workspace(args, int(execution)) : op.cuda_workspace(args);
        });
        m.def(
            name,
            [op](int backend, Int execution, Address workspace, Rest... rest) {
                const Args args = op.make(rest...);
                check(op.name, backend == 0 ? op.cpu(args, pointer(workspace), int(execution))
                                            : op.cuda(args, pointer(workspace), pointer(Address(execution))));
            },
            py::call_guard<py::gil_scoped_release>());
    }
};

#ifdef MTZ_HAS_CUDA
#define MTZ_BACKENDS(op) mtz::cpu::op##_workspace, mtz::cpu::op, mtz::cuda::op##_workspace, mtz::cuda::op
#else
// never called: mtz_ext refuses CUDA tensors in a build without CUDA
#define MTZ_BACKENDS(op) mtz::cpu::op##_workspace, mtz::cpu::op, nullptr, nullptr
#endif

mtz::NeuronDistancesArgs neuron_distances(int in, int out_scalar, Int batch, Int n, Int m, Int d,  //
                                          Address a, Int a0, Int a1, Int a2, Address b, Int b0, Int b1, Int b2,
                                          Address out) {
    return {mtz::Scalar(in),         mtz::Scalar(out_scalar), batch,       n, m, d,
            matrices(a, a0, a1, a2), matrices(b, b0, b1, b2), pointer(out)};
}

mtz::ProjectionArgs projection(int in, Int batch, Int n, Int d, Int r,  //
                               Address a, Int a0, Int a1, Int a2, Address factor, Int f0, Int f1, Int f2, Address out) {
    return {mtz::Scalar(in),     batch, n, d, r, matrices(a, a0, a1, a2), matrices(factor, f0, f1, f2),
            pointer<double>(out)};
}

mtz::ShermanMorrisonArgs sherman_morrison(int scalar, int vector_scalar, Int batch, Int d, Int k,     //
                                          Address inverse, Int inverse0, Int inverse1,                //
                                          Address vectors, Int vectors0, Int vectors1, Int vectors2,  //
                                          Address weight, Int weight0, Int weight1, Address status) {
    return {mtz::Scalar(scalar),
            mtz::Scalar(vector_scalar),
            batch,
            d,
            k,
            pointer(inverse),
            inverse0,
            inverse1,
            matrices(vectors, vectors0, vectors1, vectors2),
            pointer<const double>(weight),
            weight0,
            weight1,
            pointer<std::int32_t>(status)};
}

mtz::MatchNeuronsArgs match_neurons(int scalar, int method, Int batch, Int n, Int m, Int count,  //
                                    Address distances, Int d0, Int d1, Int d2, Address pairs, Address status) {
    return {mtz::Scalar(scalar), mtz::MatchMethod(method), batch, n, m, count, matrices(distances, d0, d1, d2),
            pointer<Int>(pairs), pointer<Int>(status)};
}

mtz::Conv2dSecondMomentArgs conv2d_second_moment(int in, int out_scalar, Int samples, Int channels, Int height,
                                                 Int width, Int groups, Int ky, Int kx, Int sy, Int sx, Int dy, Int dx,
                                                 Int top, Int left, Int oy, Int ox,  //
                                                 Address x, Int x0, Int x1, Int x2, Int x3, Address out,
                                                 Address status) {
    return {mtz::Scalar(in), mtz::Scalar(out_scalar),
            samples,         channels,
            height,          width,
            groups,          {ky, kx},
            {sy, sx},        {dy, dx},
            {top, left},     {oy, ox},
            pointer(x),      {x0, x1, x2, x3},
            pointer(out),    pointer<std::int32_t>(status)};
}

// The CUDA functions are not deduced from, so that they can be null.
template <class T>
struct Exactly {
    using type = T;
};

template <class Args, class... Rest>
Op<Args, Rest...> op(const char* name, std::size_t (*cpu_workspace)(const Args&, int),
                     mtz::Status (*cpu)(const Args&, void*, int),
                     typename Exactly<std::size_t (*)(const Args&)>::type cuda_workspace,
                     typename Exactly<mtz::Status (*)(const Args&, void*, void*)>::type cuda, Args (*make)(Rest...)) {
    return {name, cpu_workspace, cpu, cuda_workspace, cuda, make};
}

}  // namespace

PYBIND11_MODULE(_mtz_ext, m) {
    m.doc() = "Native kernels of mtz_ext. Call them through mtz_ext, which checks what it passes.";
#ifdef MTZ_HAS_CUDA
    m.attr("has_cuda") = true;
#else
    m.attr("has_cuda") = false;
#endif
    m.def("isa", &mtz::cpu::isa);
    m.def("isas", [] {
        const char* names[3];
        const int count = mtz::cpu::available_isas(names);
        py::tuple result(count);
        for (int i = 0; i < count; ++i) result[i] = names[i];
        return result;
    });
    m.def("use_isa", [](const char* name) {
        if (!mtz::cpu::use_isa(name))
            throw std::invalid_argument(std::string("use_isa: ") + name + " is not available on this CPU");
    });
    op("neuron_distances", MTZ_BACKENDS(neuron_distances), neuron_distances).bind(m);
    op("projection", mtz::cpu::projection_workspace, mtz::cpu::projection, nullptr, nullptr, projection).bind(m);
    op("sherman_morrison", MTZ_BACKENDS(sherman_morrison), sherman_morrison).bind(m);
    op("match_neurons", MTZ_BACKENDS(match_neurons), match_neurons).bind(m);
    op("conv2d_second_moment", MTZ_BACKENDS(conv2d_second_moment), conv2d_second_moment).bind(m);
}
