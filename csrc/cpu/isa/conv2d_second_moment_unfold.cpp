// Second moment of any convolution by unfolding, in chunks of at most 1.5 times the input: few channels, strides, and
// whatever else the shifts do not pay for.
//
// A chunk is packed as [panels, positions, P] with the columns (channel, uy, ux) of weight.flatten(1) in panels of P. A
// task is a block of kSide x kSide pairs of panels, upper triangle; it adds the chunk up in float64 and to the result.
#include "cpu/isa/kernels.h"
#include "cpu/isa/pack.h"
#include "cpu/isa/threads.h"

namespace mtz::cpu::MTZ_ISA {
namespace {

constexpr Index kRunOfPositions = 128;  // summed in registers
constexpr Index kChunk = 512;           // positions added up before float64 takes over
constexpr Index kSide = 4;

inline Index larger(Index a, Index b) {
    return a > b ? a : b;
}

template <class T>
struct Unfolding {
    static constexpr Index P = kPanel<T>;
    const Conv2dSecondMomentArgs& g;
    Index channels, offsets, side, panels, lines, lines_at_once;  // a line is a row of output positions of a sample

    explicit Unfolding(const Conv2dSecondMomentArgs& args) : g(args) {
        channels = g.channels / g.groups;
        offsets = g.kernel[0] * g.kernel[1];
        side = channels * offsets;
        panels = ceil_div(side, P);
        lines = g.samples * g.output[0];
        const Index input = g.samples * g.channels * g.height * g.width * Index(sizeof(T));
        const Index bytes = smaller(larger(input + input / 2, Index(1) << 20), Index(64) << 20);
        lines_at_once = smaller(lines, larger(1, bytes / (panels * P * g.output[1] * Index(sizeof(T)))));
    }

    Index chunk_size() const { return panels * lines_at_once * g.output[1] * P; }
    Index line_size() const { return P * g.output[1]; }
    Index task_size() const { return kSide * kSide * P * P; }  // doubles

    // Row r = (channel, uy, ux) of the unfolded input on one line of output positions, zeros outside the image.
    void unfold_row(Index group, Index r, Index line, T* to) const {
        const Index sample = line / g.output[0], py = line % g.output[0], u = r % offsets;
        const Index y = py * g.stride[0] + u / g.kernel[1] * g.dilation[0] - g.padding[0];
        const Index first = u % g.kernel[1] * g.dilation[1] - g.padding[1];
        const T* from = static_cast<const T*>(g.x) + sample * g.x_stride[0] +
                        (group * channels + r / offsets) * g.x_stride[1] + y * g.x_stride[2];
        const bool inside = y >= 0 && y < g.height;
        // px with 0 <= first + px * stride < width
        const Index low = !inside ? g.output[1] : first < 0 ? smaller(g.output[1], ceil_div(-first, g.stride[1])) : 0;
        const Index room = g.width - first;
        const Index high = !inside || room <= 0 ? low : larger(low, smaller(g.output[1], ceil_div(room, g.stride[1])));
        const Index step = g.stride[1] * g.x_stride[3];
        from += first * g.x_stride[3];
        for (Index px = 0; px < low; ++px) to[px] = 0;
        if (step == 1)
            for (Index px = low; px < high; ++px) to[px] = from[px];
        else
            for (Index px = low; px < high; ++px) to[px] = from[px * step];
        for (Index px = high; px < g.output[1]; ++px) to[px] = 0;
    }

    void pack(Index group, Index line0, Index count, T* chunk, T* line_buffers, int threads) const {
        const Index width = g.output[1];
#pragma omp parallel for num_threads(threads) schedule(dynamic, 16)
        for (Index e = 0; e < panels * count; ++e) {
            const Index panel = e / count, line = e % count, rows = smaller(P, side - panel * P);
            T* buffer = line_buffers + thread_number() * line_size();
            for (Index r = 0; r < rows; ++r) unfold_row(group, panel * P + r, line0 + line, buffer + r * width);
            pack_panel(buffer, width, 1, rows, width, chunk + e * width * P);
        }
    }

    // One task: panels i0 ... and j0 ... of a chunk of `positions`.
    void add_block(Index group, Index i0, Index j0, const T* chunk, Index positions, bool first, double* sums) const {
        const Index i1 = smaller(i0 + kSide, panels), j1 = smaller(j0 + kSide, panels);
        for (Index e = 0; e < task_size(); ++e) sums[e] = 0;
        for (Index k0 = 0; k0 < positions; k0 += kChunk)
            for (Index i = i0; i < i1; ++i)
                for (Index j = larger(i, j0); j < j1; ++j) {
                    T tile[P * P] = {};
                    const Index k1 = smaller(k0 + kChunk, positions);
                    for (Index k = k0; k < k1; k += kRunOfPositions)
                        add_tile<T, Product>(chunk + (i * positions + k) * P, chunk + (j * positions + k) * P,
                                             straight(smaller(kRunOfPositions, k1 - k), P, P), tile);
                    double* sum = sums + ((i - i0) * kSide + j - j0) * P * P;
                    for (Index e = 0; e < P * P; ++e) sum[e] += double(tile[e]);
                }
        T* out = static_cast<T*>(g.out) + group * side * side;
        for (Index r = i0 * P; r < smaller(i1 * P, side); ++r)
            for (Index c = larger(r, j0 * P); c < smaller(j1 * P, side); ++c) {
                const double sum = sums[((r / P - i0) * kSide + c / P - j0) * P * P + r % P * P + c % P];
                T& to = out[r * side + c];
                to = T(first ? sum : double(to) + sum);
                out[c * side + r] = to;
            }
    }

    void run(double* sums, T* line_buffers, T* chunk, int threads) const {
        const Index blocks = ceil_div(panels, kSide);
        for (Index group = 0; group < g.groups; ++group)
            for (Index line = 0; line < lines; line += lines_at_once) {
                const Index count = smaller(lines_at_once, lines - line);
                pack(group, line, count, chunk, line_buffers, threads);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
                for (Index e = 0; e < blocks * blocks; ++e)
                    if (e % blocks >= e / blocks)
                        add_block(group, e / blocks * kSide, e % blocks * kSide, chunk, count * g.output[1], line == 0,
                                  sums + thread_number() * task_size());
            }
    }

    // Also what no patch sees must be finite, so that the answer does not depend on the stride.
    bool all_finite(int threads) const {
        int bad = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(max : bad)
        for (Index e = 0; e < g.samples * g.channels * g.height; ++e) {
            const T* row = static_cast<const T*>(g.x) + e / g.height / g.channels * g.x_stride[0] +
                           e / g.height % g.channels * g.x_stride[1] + e % g.height * g.x_stride[2];
            T zero = 0;
            for (Index x = 0; x < g.width; ++x) zero += row[x * g.x_stride[3]] * T(0);
            if (!(zero == 0)) bad = 1;
        }
        return bad == 0;
    }
};

template <class T>
std::size_t workspace(const Conv2dSecondMomentArgs& g, int threads) {
    const Unfolding<T> u(g);
    return threads * (u.task_size() * sizeof(double) + u.line_size() * sizeof(T)) + u.chunk_size() * sizeof(T);
}

template <class T>
void run(const Conv2dSecondMomentArgs& g, void* work, int threads) {
    const Unfolding<T> u(g);
    double* sums = static_cast<double*>(work);
    T* lines = reinterpret_cast<T*>(sums + threads * u.task_size());
    if (!u.all_finite(threads))
        *g.status = 1;
    else
        u.run(sums, lines, lines + threads * u.line_size(), threads);
}

}  // namespace

std::size_t second_moment_by_unfolding_workspace(const Conv2dSecondMomentArgs& g, int threads) {
    return g.in == Scalar::float64 ? workspace<double>(g, threads) : workspace<float>(g, threads);
}

Status second_moment_by_unfolding(const Conv2dSecondMomentArgs& g, void* work, int threads) {
    if (g.in == Scalar::float64)
        run<double>(g, work, threads);
    else
        run<float>(g, work, threads);
    return {};
}

}  // namespace mtz::cpu::MTZ_ISA
