// Second moment of a convolution of stride 1 as sums of products of the image with its shifted self (cpu/shift_plan.h).
//
// The input is packed once, channels innermost: [groups, panels, samples, height, width, P]. A shift is then a pointer
// offset, and both operands of a product are panels as they lie; no patch is stored. A task takes a pair of panels and
// some of the terms through the whole input, a chunk at a time that stays in the first-level cache, and keeps the sums in
// float64. Then the terms of a pair are added up into the blocks of the result.
#include "cpu/isa/kernels.h"
#include "cpu/isa/pack.h"
#include "cpu/isa/threads.h"
#include "cpu/shift_plan.h"

namespace mtz::cpu::MTZ_ISA {
namespace {

constexpr Index kRunOfPositions = 128;  // summed in registers
constexpr Index kChunk = 512;           // positions added up before float64 takes over
constexpr Index kTermsOfTask = 8;       // enough work on a chunk while it is in cache
// Bytes of term sums kept at a time, between these half the size of the input.
constexpr Index kLeastSumBytes = Index(1) << 18, kMostSumBytes = Index(4) << 20;

inline Index larger(Index a, Index b) {
    return a > b ? a : b;
}

template <class T>
struct Shifts {
    static constexpr Index P = kPanel<T>;
    const Conv2dSecondMomentArgs& g;
    const ShiftPlans& plans;
    Index channels, panels, pairs, positions, terms, wave;

    Shifts(const Conv2dSecondMomentArgs& args, const ShiftPlans& shift_plans) : g(args), plans(shift_plans) {
        channels = g.channels / g.groups;
        panels = ceil_div(channels, P);
        pairs = panels * (panels + 1) / 2;
        positions = g.height * g.width;
        terms = larger(plans.full.term_count, plans.half.term_count);
        const Index input = g.samples * g.channels * positions * Index(sizeof(T));
        const Index bytes = smaller(kMostSumBytes, larger(kLeastSumBytes, input / 2));
        wave = smaller(g.groups * pairs, larger(1, bytes / (terms * P * P * Index(sizeof(double)))));
    }

    Index packed_size() const { return g.groups * panels * g.samples * positions * P; }
    Index sums_size() const { return wave * terms * P * P; }
    Index tiles_size() const { return g.kernel[0] * g.kernel[1] * P * P; }  // a thread

    // [groups, panels, samples, positions, P]; whether everything is finite.
    bool pack(T* packed, int threads) const {
        const T* x = static_cast<const T*>(g.x);
        const bool whole = g.x_stride[3] == 1 && (g.x_stride[2] == g.width || g.height == 1);
        int bad = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(max : bad)
        for (Index e = 0; e < g.groups * panels * g.samples; ++e) {
            const Index sample = e % g.samples, panel = e / g.samples % panels, group = e / g.samples / panels;
            const T* from = x + sample * g.x_stride[0] + (group * channels + panel * P) * g.x_stride[1];
            T* to = packed + e * positions * P;
            const Index rows = smaller(P, channels - panel * P);
            if (whole)
                pack_panel(from, g.x_stride[1], 1, rows, positions, to);
            else
                for (Index y = 0; y < g.height; ++y)
                    pack_panel(from + y * g.x_stride[2], g.x_stride[1], g.x_stride[3], rows, g.width,
                               to + y * g.width * P);
            Vector<T> zero = {};
            for (Index k = 0; k < positions * P; k += Simd<T>::kLanes) zero += load(to + k) * T(0);
            for (int l = 0; l < Simd<T>::kLanes; ++l)
                if (!(zero[l] == 0)) bad = 1;
        }
        return bad == 0;
    }

    // sums += one term over samples s0 ... s1 - 1 and rows y0 ... y1 - 1
    void add_term(const T* a, const T* b, const ShiftTerm& term, Index s0, Index s1, Index y0, Index y1,
                  double* sums) const {
        y0 = larger(y0, term.y.first);
        y1 = smaller(y1, term.y.first + term.y.count);
        if (y0 >= y1) return;
        const Index row = g.width * P, sample = positions * P;
        const Index columns = smaller(kRunOfPositions, term.x.count);
        const Index rows = smaller(larger(1, kRunOfPositions / columns), y1 - y0);
        const Index samples = larger(1, kRunOfPositions / (columns * rows));
        T tile[P * P] = {};
        for (Index s = s0; s < s1; s += samples)
            for (Index y = y0; y < y1; y += rows)
                for (Index x = term.x.first; x < term.x.first + term.x.count; x += columns) {
                    const Index at = s * sample + y * row + x * P, shift = term.y.shift * row + term.x.shift * P;
                    const Walk walk{{smaller(samples, s1 - s), smaller(rows, y1 - y),
                                     smaller(columns, term.x.first + term.x.count - x)},
                                    {sample, row, P},
                                    {sample, row, P}};
                    add_tile<T, Product>(a + at, b + at + shift, walk, tile);
                }
        for (Index e = 0; e < P * P; ++e) sums[e] += double(tile[e]);
    }

    // Terms first ... last - 1 of a pair of panels over all samples.
    void add_terms(const T* a, const T* b, const ShiftTerm* list, Index first, Index last, double* sums) const {
        const Index samples = positions <= kChunk ? kChunk / positions : 1;
        const Index rows = positions <= kChunk ? g.height : larger(1, kChunk / g.width);
        for (Index e = first * P * P; e < last * P * P; ++e) sums[e] = 0;
        for (Index s = 0; s < g.samples; s += samples)
            for (Index y = 0; y < g.height; y += rows)
                for (Index t = first; t < last; ++t)
                    add_term(a, b, list[t], s, smaller(s + samples, g.samples), y, y + rows, sums + t * P * P);
    }

    // The tile of offsets (u, v) of a pair of panels, its terms added up; transposed on request.
    void add_up(const ShiftPlans::View& plan, const double* sums, Index u, Index v, bool transposed, T* tile) const {
        const Index offsets = g.kernel[0] * g.kernel[1];
        Index at = u * offsets + v;
        if (plan.block_count < offsets * offsets) {  // of a panel with itself: (u, v) is the transpose of (v, u)
            if (u > v) return add_up(plan, sums, v, u, !transposed, tile);
            at -= u * (u + 1) / 2;
        }
        double total[P * P] = {};
        for (Index part = plan.blocks[at].first_part; part < plan.blocks[at].last_part; ++part) {
            const double* term = sums + plan.parts[part].term * P * P;
            const double sign = plan.parts[part].sign;
            for (Index e = 0; e < P * P; ++e) total[e] += sign * term[e];
        }
        for (Index e = 0; e < P * P; ++e) tile[e] = T(total[e]);
        if (transposed) transpose_tile(tile, P, tile, P);
    }

    // Rows of the result that belong to panel i, columns of panel j, or the mirror image. A row is written in one piece:
    // `tiles` [offsets, P, P] holds all tiles of one offset u.
    void write(Index group, Index i, Index j, bool mirror, const ShiftPlans::View& plan, const double* sums,
               T* tiles) const {
        const Index offsets = g.kernel[0] * g.kernel[1], side = channels * offsets;
        T* out = static_cast<T*>(g.out) + group * side * side;
        const Index across = mirror ? i : j, down = mirror ? j : i;
        const Index rows = smaller(P, channels - down * P), columns = smaller(P, channels - across * P);
        for (Index u = 0; u < offsets; ++u) {
            for (Index v = 0; v < offsets; ++v)
                mirror ? add_up(plan, sums, v, u, true, tiles + v * P * P)
                       : add_up(plan, sums, u, v, false, tiles + v * P * P);
            for (Index c = 0; c < rows; ++c) {
                T* to = out + ((down * P + c) * offsets + u) * side + across * P * offsets;
                for (Index f = 0; f < columns; ++f)
                    for (Index v = 0; v < offsets; ++v) *to++ = tiles[v * P * P + c * P + f];
            }
        }
    }

    void find(Index pair, Index& group, Index& i, Index& j) const {
        group = pair / pairs;
        pair %= pairs;
        for (i = 0; pair >= panels - i; ++i) pair -= panels - i;
        j = i + pair;
    }

    void run(const T* packed, double* sums, T* tiles, int threads) const {
        const Index tasks = ceil_div(terms, kTermsOfTask), panel = g.samples * positions * P;
        for (Index done = 0; done < g.groups * pairs; done += wave) {
            const Index count = smaller(wave, g.groups * pairs - done);
#pragma omp parallel num_threads(threads)
            {
                T* mine = tiles + thread_number() * tiles_size();
#pragma omp for schedule(dynamic, 1)
                for (Index e = 0; e < count * tasks; ++e) {
                    Index group, i, j;
                    find(done + e / tasks, group, i, j);
                    const ShiftPlans::View& plan = i == j ? plans.half : plans.full;
                    const Index first = e % tasks * kTermsOfTask, last = smaller(first + kTermsOfTask, plan.term_count);
                    if (first < last)
                        add_terms(packed + (group * panels + i) * panel, packed + (group * panels + j) * panel,
                                  plan.terms, first, last, sums + e / tasks * terms * P * P);
                }
#pragma omp for schedule(dynamic, 1)
                for (Index e = 0; e < count; ++e) {
                    Index group, i, j;
                    find(done + e, group, i, j);
                    const ShiftPlans::View& plan = i == j ? plans.half : plans.full;
                    write(group, i, j, false, plan, sums + e * terms * P * P, mine);
                    if (i != j) write(group, i, j, true, plan, sums + e * terms * P * P, mine);
                }
            }
        }
    }
};

template <class T>
std::size_t workspace(const Conv2dSecondMomentArgs& g, const ShiftPlans& plans, int threads) {
    const Shifts<T> shifts(g, plans);
    return shifts.sums_size() * sizeof(double) + (shifts.packed_size() + threads * shifts.tiles_size()) * sizeof(T);
}

template <class T>
void run(const Conv2dSecondMomentArgs& g, const ShiftPlans& plans, void* work, int threads) {
    const Shifts<T> shifts(g, plans);
    double* sums = static_cast<double*>(work);
    T* packed = reinterpret_cast<T*>(sums + shifts.sums_size());
    if (!shifts.pack(packed, threads))
        *g.status = 1;
    else
        shifts.run(packed, sums, packed + shifts.packed_size(), threads);
}

}  // namespace

std::size_t second_moment_by_shifts_workspace(const Conv2dSecondMomentArgs& g, const ShiftPlans& plans, int threads) {
    return g.in == Scalar::float64 ? workspace<double>(g, plans, threads) : workspace<float>(g, plans, threads);
}

Status second_moment_by_shifts(const Conv2dSecondMomentArgs& g, const ShiftPlans& plans, void* work, int threads) {
    if (g.in == Scalar::float64)
        run<double>(g, plans, work, threads);
    else
        run<float>(g, plans, work, threads);
    return {};
}

}  // namespace mtz::cpu::MTZ_ISA
