// The product of large inverses on tensor cores. Sums over k of a[k, i] b[j, k] for kRows x kColumns pairs (i, j), 32 x K
// a warp, so that an element of the larger matrix is split into its parts once. Of its lanes g = lane / 4, t = lane % 4 has
//
//     rows 4 g ..., columns 16 c + 4 t ..., and steps 4 t ... 4 t + 3 of sixteen
//
// as sums of products may be taken in any order: so all that a lane loads and stores is words of 16 bytes. In shared memory a
// lies as it does in the matrix, k after k, and b row after row; words are where those of 8 lanes lie in all banks. What is
// to be multiplied next is loaded while tensor cores are busy, four tiles of columns at a time.
#pragma once

#include "cuda/sherman_morrison_large.cuh"

namespace mtz::cuda {

template <int Warps, int Panels, int Depth, int Stages>
struct TensorPanel {
    static constexpr int kThreads = Warps * Panels * kWarp, kRows = Warps * 32, kColumns = Panels * K;
    static constexpr int kDepth = Depth, kStages = Stages, kPanels = Panels;
    static constexpr int kTogether = 4, kParts = K / 8 / kTogether;  // tiles of 8 columns
    static constexpr int kSizeA = kDepth * kRows, kSizeB = kColumns * kDepth;
    static_assert(kDepth == 16 || kDepth == 32);
    float *a, *b;

    __device__ __forceinline__ explicit TensorPanel(SharedMemory& memory) {
        a = memory.take<float>(kStages * kSizeA);
        b = memory.take<float>(kStages * kSizeB);
    }
    static std::size_t bytes() {
        return SharedSize().add(sizeof(float), kStages * kSizeA).add(sizeof(float), kStages * kSizeB).bytes();
    }
    // The first of four rows, and of four columns.
    __device__ static __forceinline__ int row() {
        return int(threadIdx.x) / kWarp % Warps * 32 + int(threadIdx.x) % kWarp / 4 * 4;
    }
    __device__ static __forceinline__ int first_column() { return int(threadIdx.x) / (Warps * kWarp) * K; }
    __device__ static __forceinline__ int column(int c) { return first_column() + 16 * c + int(threadIdx.x) % 4 * 4; }

    // Where step k of element i of a is kept, and that of row j of b.
    __device__ static __forceinline__ int place_a(int k, int i) { return k * kRows + (i ^ k / 4 % 4 * 8); }
    __device__ static __forceinline__ int place_b(int j, int k) { return j * kDepth + (k ^ j % 2 * (kDepth - 16)); }

    // Four steps each of a lane: of four rows, and of a row of each of some tiles.
    __device__ __forceinline__ void load_a(int stage, int k, Four<float> (&to)[4]) const {
        const float* from = a + stage * kSizeA + place_a(threadIdx.x % 4 * 4, row());
#pragma unroll
        for (int e = 0; e < 4; ++e) to[e] = load_four(from + (k + e) * kRows);
    }
    __device__ __forceinline__ void load_b(int stage, int k, int part, Four<float> (&to)[kTogether]) const {
        const int g = int(threadIdx.x) % kWarp / 4, t = int(threadIdx.x) % 4;
        const float* from = b + stage * kSizeB + place_b(first_column() + g / 2 * 4 + g % 2, k + 4 * t);
#pragma unroll
        for (int c = 0; c < kTogether; ++c) {
            const int tile = part * kTogether + c;
            to[c] = load_four(from + (tile / 2 * 16 + tile % 2 * 2) * kDepth);
        }
    }

    // Sums of sixteen steps are taken on tensor cores and added up here, as those truncate; the small parts first.
    __device__ static __forceinline__ void add(const Tf32 (&x)[4][4], const Tf32 (&y)[kTogether][4], int part,
                                               float (&sum)[4][K / 4]) {
        float here[2][kTogether][4] = {};
        const auto multiply = [&](std::uint32_t Tf32::* of_x, std::uint32_t Tf32::* of_y) {
#pragma unroll
            for (int k = 0; k < 4; k += 2)
#pragma unroll
                for (int c = 0; c < kTogether; ++c)
#pragma unroll
                    for (int m = 0; m < 2; ++m)
                        multiply_add_tf32(here[m][c], x[2 * m][k].*of_x, x[2 * m + 1][k].*of_x, x[2 * m][k + 1].*of_x,
                                          x[2 * m + 1][k + 1].*of_x, y[c][k].*of_y, y[c][k + 1].*of_y);
        };
        multiply(&Tf32::low, &Tf32::high);
        multiply(&Tf32::high, &Tf32::low);
        multiply(&Tf32::high, &Tf32::high);
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
            for (int c = 0; c < kTogether; ++c)
#pragma unroll
                for (int e = 0; e < 4; ++e) sum[2 * m + e / 2][2 * (part * kTogether + c) + e % 2] += here[m][c][e];
    }
};

// Rows of a, [.., columns], one for each step; Words: each begins at a multiple of 16 bytes. A thread's rows are kept with the
// same columns swapped, or it would have an address of each to work out. Strides have 32 bits, as matrices of as many rows as
// come here do not fit into memory otherwise.
template <class P, bool Words>
struct TensorAcross {
    static constexpr int kWide = Words ? 4 : 1, kAcross = P::kRows / kWide, kCopies = P::kDepth / (kWide * P::kPanels);
    static_assert(P::kThreads / kAcross == kWide * P::kPanels && P::kDepth % (16 * P::kPanels) == 0);
    const float* from;  // what this thread copies next
    int row_stride, valid, place;

    __device__ static __forceinline__ int step(int e) {
        return Words ? e % 4 + e / 4 * 16 * P::kPanels : e * P::kPanels;
    }
    __device__ static __forceinline__ int first_step() {
        const int y = int(threadIdx.x) / kAcross;
        return Words ? y % 4 * 4 + y / 4 * 16 : y;
    }
    __device__ __forceinline__ TensorAcross(const float* data, Index row_stride, Index columns)
        : row_stride(int(row_stride)) {
        const int x = int(threadIdx.x) % kAcross * kWide, y = first_step();
        const Index left = columns - x;
        valid = int(left < 0 ? 0 : smaller(left, kWide)) * int(sizeof(float));
        from = data + (valid ? x : 0) + y * row_stride;
        place = Words ? P::place_a(y, x) : x;
    }
    // Whole: all rows, and no word is cut off; words that are not there are the first one again.
    template <bool Whole>
    __device__ __forceinline__ void start(int left, float* to) {
        constexpr int size = kWide * int(sizeof(float));
        const int y = first_step();
#pragma unroll(Words&& Whole ? kCopies : 4)
        for (int e = 0; e < kCopies; ++e)
            copy_async<size>(to + (Words ? place + step(e) * P::kRows : P::place_a(y + step(e), place)),
                             from + Index(row_stride) * step(e),
                             Whole                ? size
                             : y + step(e) < left ? valid
                                                  : 0);
        from += Index(row_stride) * P::kDepth;
    }
};

// Rows of b, of whole words.
template <class P>
struct TensorAlong {
    static constexpr int kAcross = P::kDepth / 4, kDown = P::kThreads / kAcross;
    static_assert(kDown % 2 == 0);
    const float* from;  // what this thread copies next
    int row_stride, place;

    __device__ __forceinline__ TensorAlong(const float* data, Index row_stride) : row_stride(int(row_stride)) {
        const int x = int(threadIdx.x) % kAcross * 4, y = int(threadIdx.x) / kAcross;
        from = data + y * row_stride + x;
        place = P::place_b(y, x);
    }
    template <bool Whole>
    __device__ __forceinline__ void start(int left, float* to) {
        const int x = int(threadIdx.x) % kAcross * 4;
#pragma unroll
        for (int e = 0; e < P::kColumns / kDown; ++e)
            copy_async<16>(to + place + e * kDown * P::kDepth, from + Index(row_stride) * (e * kDown),
                           Whole || x < left ? 16 : 0);
        from += P::kDepth;
    }
};

// sum += the first `count` rows of a by as many columns of b, in pieces; whole: no word of a is cut off. Elements of b up
// to the next whole word are read, and must be finite. What comes first of a is on its way before ready() is asked whether
// to go on, and b after that.
template <class P, class A, class B, class Ready>
__device__ __forceinline__ bool add_product(A a, B b, int count, bool whole, const P& shared, float (&sum)[4][K / 4],
                                            Ready ready) {
    const auto start = [whole](auto& source, int left, float* to) {
        if (whole && left >= P::kDepth)
            source.template start<true>(left, to);
        else if (left > 0)
            source.template start<false>(left, to);
    };
#pragma unroll 1
    for (int stage = 0; stage < P::kStages; ++stage) start(a, count - stage * P::kDepth, shared.a + stage * P::kSizeA);
    if (!ready()) return false;
#pragma unroll 1
    for (int stage = 0; stage < P::kStages; ++stage) {
        start(b, count - stage * P::kDepth, shared.b + stage * P::kSizeB);
        copy_async_commit();
    }
    copy_async_wait<P::kStages - 1>();
    sync_block();  // the first piece is there
    Four<float> next_a[4], next_b[P::kTogether];
    shared.load_a(0, 0, next_a);
    shared.load_b(0, 0, 0, next_b);
    int stage = 0, left = count - P::kStages * P::kDepth;  // of what is not yet on its way
#pragma unroll 1
    for (int k = 0; k < count; k += P::kDepth) {
        Tf32 x[4][4];
#pragma unroll
        for (int unit = 0; unit < P::kDepth / 16 * P::kParts; ++unit) {
            constexpr int parts = P::kParts, units = P::kDepth / 16 * parts;
            if (unit % parts == 0) {
#pragma unroll
                for (int r = 0; r < 4; ++r)
#pragma unroll
                    for (int e = 0; e < 4; ++e) x[r][e] = split_tf32(next_a[e].at[r]);
            }
            Tf32 y[P::kTogether][4];
#pragma unroll
            for (int c = 0; c < P::kTogether; ++c)
#pragma unroll
                for (int e = 0; e < 4; ++e) y[c][e] = split_tf32(next_b[c].at[e]);
            if (unit + 1 == units) {
                copy_async_wait<P::kStages - 2>();
                sync_block();  // the next piece is there, and all threads have what they need of this one
                start(a, left, shared.a + stage * P::kSizeA);
                start(b, left, shared.b + stage * P::kSizeB);
                copy_async_commit();
                left -= P::kDepth;
                stage = stage + 1 == P::kStages ? 0 : stage + 1;
            }
            const int next = (unit + 1) % units;
            if (next % parts == 0) shared.load_a(stage, next / parts * 16, next_a);
            shared.load_b(stage, next / parts * 16, next % parts, next_b);
            P::add(x, y, unit % parts, sum);
        }
    }
    return true;
}

}  // namespace mtz::cuda
