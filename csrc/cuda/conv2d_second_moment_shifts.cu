// Second moment of a convolution of stride 1 as sums of products of the image with its shifted self (cuda/shift_plan.cuh).
// See mtz/conv2d_second_moment.h.
//
// The input is packed once, channels innermost, zeros behind every row and below every sample: [groups, positions, pitch].
// A shift is then a pointer offset that never runs into another row. A term is a rectangle of positions and a shift,
//
//     term[c, e] = sum_q x[q, c] x[q + shift, e]
//
// for all channels: a block of threads takes a tile of 64 x 64 channels of it and a slice of its positions. Then the terms
// are added up into the blocks of the result, in float64. For a 3x3 kernel with padding 1, 49 terms: 25 of the whole image,
// and of single rows, columns and corners. A tile on the diagonal of the channels needs the half of them, as that of the
// other shifts is transposed: 13 products of the whole image in the place of 45.
//
// The inner loop takes 32 multiply-adds from three 16-byte loads of shared memory a thread. As in
// cuda/conv2d_second_moment_patches.cu, runs of kRun positions are summed in the type of the result, and the runs with the
// rounding of every addition kept.
#include "cuda/conv2d_second_moment.cuh"
#include "cuda/rows.cuh"
#include "cuda/shift_plan.cuh"

namespace mtz::cuda {
namespace {

// Sums are kept of as many units at a time as fit into this, of one at least.
#ifndef MTZ_MOST_SUM_BYTES
#define MTZ_MOST_SUM_BYTES (64 << 20)
#endif

constexpr int kSide = 64, kDepth = 8, kStrip = 32, kThreads = 256;

// How many channels of a tile a thread takes: rows, columns.
template <class S>
constexpr int kRows = sizeof(S) == 4 ? 8 : 4;
constexpr int kColumns = 4;
template <class S>
constexpr int kTermThreads = kSide / kRows<S> * (kSide / kColumns);

template <class S>
struct Shifts {
    Conv2dSecondMomentArgs g;
    AxisPlan y, x;
    Index channels, pitch, tiles, pairs, units;     // of a group; elements of a position; tiles i <= j; of all groups
    Index width, sample, before, positions;         // positions of a row, a sample; in front of the first; of all
    Index long_terms, slices, length, slots, wave;  // slots: sums of a unit; units of which sums are kept at a time
    S* packed;                                      // [groups, positions, pitch]
    double* sums;                                   // [wave, slots, kSide, kSide]

    Shifts(const Conv2dSecondMomentArgs& args, Workspace& space)
        : g(args), y(best_plan(args, 0)), x(best_plan(args, 1)) {
        channels = g.channels / g.groups;
        pitch = ceil_div(channels, Word<S>::kCount) * Word<S>::kCount;
        tiles = ceil_div(channels, kSide);
        pairs = tiles * (tiles + 1) / 2;
        units = g.groups * pairs;
        width = g.width + g.kernel[1] - 1;
        sample = (g.height + g.kernel[0] - 1) * width;
        before = (g.kernel[0] - 1) * width + g.kernel[1] - 1;
        positions = before + g.samples * sample + g.kernel[1] - 1;
        long_terms = Index(y.long_spans) * x.long_spans;
        const Index most = g.samples * g.height * width;
        const Index wanted = ceil_div(2 * kEnoughBlocks, larger(1, units * long_terms));
        length = ceil_div(ceil_div(most, smaller(wanted, larger(1, most / (4 * kRun)))), kRun) * kRun;
        slices = ceil_div(most, length);
        slots = long_terms * (slices - 1) + Index(y.spans) * x.spans;
        wave = smaller(units, larger(1, MTZ_MOST_SUM_BYTES / (slots * kSide * kSide * Index(sizeof(double)))));
        sums = space.take<double>(wave * slots * kSide * kSide);
        packed = space.take<S>(g.groups * positions * pitch);
    }

    // Tiles i <= j of a unit.
    __device__ __forceinline__ void find(Index unit, Index& group, Index& i, Index& j) const {
        group = unit / pairs;
        Index pair = unit % pairs;
        for (i = 0; pair >= tiles - i; ++i) pair -= tiles - i;
        j = i + pair;
    }

    // Slots of long terms come first, slice by slice, then those of the others: of long spans of y, and of short ones.
    __device__ __forceinline__ Index slot(int in_y, int in_x) const {
        const Index first = long_terms * slices, across = x.spans - x.long_spans;
        if (in_y >= y.long_spans) return first + y.long_spans * across + Index(in_y - y.long_spans) * x.spans + in_x;
        return in_x < x.long_spans ? Index(in_y) * x.long_spans + in_x : first + in_y * across + in_x - x.long_spans;
    }
    __device__ __forceinline__ void find_term(Index at, int& in_y, int& in_x, Index& slice) const {
        const Index across = x.spans - x.long_spans, middle = y.long_spans * across;
        slice = 0;
        if (at < long_terms * slices) {
            slice = at / long_terms;
            in_y = int(at % long_terms / x.long_spans);
            in_x = int(at % x.long_spans);
            return;
        }
        at -= long_terms * slices;
        in_y = int(at < middle ? at / across : y.long_spans + (at - middle) / x.spans);
        in_x = int(at < middle ? x.long_spans + at % across : (at - middle) % x.spans);
    }
};

// packed <- x, in strips of positions and channels through shared memory; whether all of it is finite.
template <class In, class S>
__global__ void __launch_bounds__(kThreads) pack_kernel(Index first_block, Shifts<S> w) {
    S* strip = SharedMemory().take<S>(kStrip * (kStrip + 1));
    const Conv2dSecondMomentArgs& g = w.g;
    const Index across = ceil_div(w.positions, kStrip), down = ceil_div(w.pitch, kStrip),
                block = first_block + blockIdx.x;
    const Index group = block / (across * down), q0 = block % across * kStrip, c0 = block / across % down * kStrip;
    const int lane = int(threadIdx.x) % kStrip, row = int(threadIdx.x) / kStrip;
    const Index q = q0 + lane - w.before, s = q / w.sample, py = q % w.sample / w.width, px = q % w.width;
    const bool inside = q >= 0 && s < g.samples && py < g.height && px < g.width;
    const In* from = static_cast<const In*>(g.x) + s * g.x_stride[0] + py * g.x_stride[2] + px * g.x_stride[3];
    bool bad = false;
    for (int c = row; c < kStrip; c += kThreads / kStrip) {
        S value = 0;
        if (inside && c0 + c < w.channels) value = in_type_of_sum(from[(group * w.channels + c0 + c) * g.x_stride[1]]);
        bad = bad || !is_finite(value);
        strip[c * (kStrip + 1) + lane] = value;
    }
    if (bad) atomic_max(g.status, 1);
    sync_block();
    for (int k = row; k < kStrip; k += kThreads / kStrip)
        if (q0 + k < w.positions && c0 + lane < w.pitch)
            w.packed[(group * w.positions + q0 + k) * w.pitch + c0 + lane] = strip[lane * (kStrip + 1) + k];
}

// Positions of a rectangle in order, kDepth apart.
struct Walk {
    int nx, ny, step_x, step_y, x, y;
    Index step_sample, sample;

    __device__ __forceinline__ Walk(int across, int down, Index first) : nx(across), ny(down) {
        step_x = kDepth % nx;
        step_y = kDepth / nx % ny;
        step_sample = kDepth / nx / ny;
        x = int(first % nx);
        y = int(first / nx % ny);
        sample = first / nx / ny;
    }
    __device__ __forceinline__ void step() {
        x += step_x;
        y += step_y;
        sample += step_sample;
        if (x >= nx) x -= nx, ++y;
        if (y >= ny) y -= ny, ++sample;
    }
};

// Part `word` of the elements of a tile that are thread t's: they are words of 16 bytes.
template <class S, int R>
__device__ __forceinline__ int channel(int t, int word) {
    return word * (kSide / (R / Word<S>::kCount)) + t * Word<S>::kCount;
}

// A term's tile over a slice: sums [unit, slot].
template <class S>
__global__ void __launch_bounds__(kTermThreads<S>, sizeof(S) == 4 ? 3 : 1)
    terms_kernel(Index first_block, Shifts<S> w, Index first_unit) {
    constexpr int wide = Word<S>::kCount, words = kSide / wide, RA = kRows<S>, RB = kColumns;
    static_assert(kTermThreads<S> == words * kDepth, "a word a thread and operand");
    using W = Word<S>;
    W* shared = SharedMemory().take<W>(4 * kDepth * words);  // [2, a and b, kDepth, words]
    const Index block = first_block + blockIdx.x, unit = block / w.slots, slot = block % w.slots;
    Index group, i, j, slice;
    int in_y, in_x;
    w.find(first_unit + unit, group, i, j);
    w.find_term(slot, in_y, in_x, slice);
    const Span sy = w.y.span[in_y], sx = w.x.span[in_x];
    if (i == j && (sy.shift < 0 || (sy.shift == 0 && sx.shift < 0))) return;  // the transpose of another
    // Whole rows are one after another, with the zeros behind them.
    const int nx = int(sx.whole ? sy.count * w.width : sx.count), ny = sx.whole ? 1 : sy.count;
    const Index all = w.g.samples * nx * ny, first = slice * w.length;
    const int count = int(smaller(all - first, in_y < w.y.long_spans && in_x < w.x.long_spans ? w.length : all));

    const int thread = int(threadIdx.x), k_mine = thread / words, word = thread % words;
    const Index ca = i * kSide + word * wide, cb = j * kSide + word * wide;
    const S* corner = w.packed + (group * w.positions + w.before + sy.first * w.width + sx.first) * w.pitch;
    // Channels beyond the last are the first again: their sums are not looked at.
    const S* a = corner + (ca < w.pitch ? ca : 0);
    const S* b = corner + (cb < w.pitch ? cb : 0) + (sy.shift * w.width + sx.shift) * w.pitch;
    Walk walk(nx, ny, first + k_mine);
    const auto start = [&](int k) {
        const bool inside = k + k_mine < count;
        const Index at = inside ? (walk.sample * w.sample + walk.y * w.width + walk.x) * w.pitch : 0;
        W* to = shared + k / kDepth % 2 * 2 * kDepth * words + thread;
        copy_async<16>(to, a + at, inside ? 16 : 0);
        copy_async<16>(to + kDepth * words, b + at, inside ? 16 : 0);
        copy_async_commit();
        walk.step();
    };
    const int tx = tile_column(thread), ty = tile_row(thread);
    S sum[RA][RB] = {}, total[RA][RB] = {}, lost[RA][RB] = {};
    if (count > 0) start(0);
    for (int k = 0; k < count; k += kDepth) {
        copy_async_wait<0>();
        sync_block();  // this piece is there, and all threads are done with the one before it
        if (k + kDepth < count) start(k + kDepth);
        const S* piece = reinterpret_cast<const S*>(shared + k / kDepth % 2 * 2 * kDepth * words);
#pragma unroll
        for (int e = 0; e < kDepth; ++e) {
            W x[RA / wide], y[RB / wide];
#pragma unroll
            for (int r = 0; r < RA / wide; ++r)
                x[r] = *reinterpret_cast<const W*>(piece + e * kSide + channel<S, RA>(ty, r));
#pragma unroll
            for (int c = 0; c < RB / wide; ++c)
                y[c] = *reinterpret_cast<const W*>(piece + (kDepth + e) * kSide + channel<S, RB>(tx, c));
#pragma unroll
            for (int r = 0; r < RA; ++r)
#pragma unroll
                for (int c = 0; c < RB; ++c)
                    sum[r][c] = multiply_add(x[r / wide].at[r % wide], y[c / wide].at[c % wide], sum[r][c]);
        }
        if ((k + kDepth) % kRun != 0 && k + kDepth < count) continue;
#pragma unroll
        for (int r = 0; r < RA; ++r)
#pragma unroll
            for (int c = 0; c < RB; ++c) {
                add_exactly(sum[r][c], total[r][c], lost[r][c]);
                sum[r][c] = 0;
            }
    }
    double* to = w.sums + (unit * w.slots + slot) * kSide * kSide;
#pragma unroll
    for (int r = 0; r < RA; ++r)
#pragma unroll
        for (int c = 0; c < RB; ++c)
            to[(channel<S, RA>(ty, r / wide) + r % wide) * kSide + channel<S, RB>(tx, c / wide) + c % wide] =
                double(total[r][c]) + double(lost[r][c]);
}

// Element (c, e) of the block of offsets u and v of a unit, from its sums.
template <class S>
__device__ __forceinline__ double block_element(const Shifts<S>& w, const double* sums, int u, int v, int c, int e) {
    const int kx = w.x.kernel;
    const signed char* parts_y = w.y.part[u / kx * w.y.kernel + v / kx];
    const signed char* parts_x = w.x.part[u % kx * kx + v % kx];
    double value = 0;
    for (int py = 0; parts_y[py] >= 0; ++py)
        for (int px = 0; parts_x[px] >= 0; ++px) {
            const double* term = sums + w.slot(parts_y[py], parts_x[px]) * kSide * kSide + c * kSide + e;
            const bool sliced = parts_y[py] < w.y.long_spans && parts_x[px] < w.x.long_spans;
            double part = 0;
            for (Index slice = 0; slice < (sliced ? w.slices : 1); ++slice)
                part += term[slice * w.long_terms * kSide * kSide];
            value += (py == 0) == (px == 0) ? part : -part;
        }
    return value;
}

// A row of the result, of those that belong to tile i: its columns of tile j; or of the mirror image.
template <class S>
__global__ void __launch_bounds__(kThreads) write_kernel(Index first_block, Shifts<S> w, Index first_unit) {
    const int offsets = w.y.kernel * w.x.kernel, tile = kSide * offsets;
    const Index side = w.channels * offsets, block = first_block + blockIdx.x, unit = block / (2 * tile);
    const int row = int(block % tile);
    const bool mirror = block / tile % 2 != 0, bad = *w.g.status != 0;
    Index group, i, j;
    w.find(first_unit + unit, group, i, j);
    const Index to_row = (mirror ? j : i) * tile + row, to_column = (mirror ? i : j) * tile;
    if ((mirror && i == j) || to_row >= side) return;
    S* to = static_cast<S*>(w.g.out) + (group * side + to_row) * side + to_column;
    for (int column = int(threadIdx.x); column < tile && to_column + column < side; column += kThreads) {
        // Of a tile with itself only the blocks u <= v have sums.
        const bool turned = mirror || (i == j && row % offsets > column % offsets);
        const int p = turned ? column : row, q = turned ? row : column;
        const double value = block_element(w, w.sums + unit * w.slots * kSide * kSide, p % offsets, q % offsets,
                                           p / offsets, q / offsets);
        to[column] = S(bad ? kNaN : value);
    }
}

}  // namespace

// Compares tiles of 64 x 64 sums times positions.
bool shifts_are_fewer(const Conv2dSecondMomentArgs& g) {
    constexpr Index most = Index(1) << 30;
    for (int axis = 0; axis < 2; ++axis)
        if (g.stride[axis] != 1 || g.dilation[axis] != 1 || g.kernel[axis] > kMostKernel) return false;
    if (g.samples * g.channels * g.output[0] * g.output[1] == 0 || g.height * (g.width + kMostKernel) > most)
        return false;
    const Index channels = g.channels / g.groups, tiles = ceil_div(channels, kSide);
    const Index across = ceil_div(channels * g.kernel[0] * g.kernel[1], kSide);
    const Index shifted = best_plan(g, 0).positions() * best_plan(g, 1).positions();
    return tiles * tiles * shifted < across * (across + 1) * g.output[0] * g.output[1];
}

template <class S>
std::size_t shifts_workspace(const Conv2dSecondMomentArgs& g) {
    Workspace space;
    const Shifts<S> w(g, space);
    return space.used();
}

template <class In, class S>
Status moment_by_shifts(const Conv2dSecondMomentArgs& g, void* workspace, void* stream) {
    Workspace space(workspace);
    const Shifts<S> w(g, space);
    const Index strips = g.groups * ceil_div(w.positions, kStrip) * ceil_div(w.pitch, kStrip);
    const std::size_t strip = SharedSize().add(sizeof(S), kStrip * (kStrip + 1)).bytes();
    const std::size_t pieces = SharedSize().add(16, 4 * kDepth * kSide / Word<S>::kCount).bytes();
    const Index tile = kSide * g.kernel[0] * g.kernel[1];
    Status status;
    if (failed(status, launch_in_turn(pack_kernel<In, S>, strips, kThreads, strip, stream, w))) return status;
    for (Index unit = 0; unit < w.units; unit += w.wave) {
        const Index units = smaller(w.wave, w.units - unit);
        if (failed(status,
                   launch_in_turn(terms_kernel<S>, units * w.slots, kTermThreads<S>, pieces, stream, w, unit)) ||
            failed(status, launch_in_turn(write_kernel<S>, units * 2 * tile, kThreads, 0, stream, w, unit)))
            return status;
    }
    return status;
}

template std::size_t shifts_workspace<float>(const Conv2dSecondMomentArgs&);
template std::size_t shifts_workspace<double>(const Conv2dSecondMomentArgs&);
template Status moment_by_shifts<float, float>(const Conv2dSecondMomentArgs&, void*, void*);
template Status moment_by_shifts<double, double>(const Conv2dSecondMomentArgs&, void*, void*);
template Status moment_by_shifts<Half, float>(const Conv2dSecondMomentArgs&, void*, void*);
template Status moment_by_shifts<BFloat16, float>(const Conv2dSecondMomentArgs&, void*, void*);

}  // namespace mtz::cuda
