// A tile of sums over pairs of rows, the inner loop of every large product here:
//
//     sum[i, j] += sum_k Op(a[i, k], b[j, k])         a, b in shared memory, row after row, kPitch apart
//
// 256 threads, each with RA x RB sums in registers: rows ty + 16 i of a, rows tx + 16 j of b. A warp is 8 wide and 4 high,
// so that each of its 16-byte loads, along k, is of 8 or 4 different rows: all in other banks, as the pitch is an odd number
// of 16-byte words. For four columns of float32 a thread loads RA + RB words and takes 4 RA RB steps: 16 and 256 at 8 x 8.
//
// 8 x 8 must fit into 128 registers, of which sums and words take 100, for two blocks to share a processor. So the next piece
// waits in shared memory and not in registers, what a thread needs to know to bring it is worked out again each time, and
// the steps through a piece are unrolled: there are no addresses to keep.
#pragma once

#include <type_traits>

#include "cuda/intrinsics.cuh"
#include "cuda/launch.cuh"

namespace mtz::cuda {

constexpr int kTileThreads = 256;
constexpr int kNoRuns = 1 << 30;  // for sums that are taken at the end only

// A float64 number as the sum of two float32: the difference of two such, (x.high - y.high) + (x.low - y.low), keeps 24
// good bits wherever float64 would, and takes no float64 arithmetic, which is slow on most GPUs.
struct Split {
    float high, low;
};

__device__ __forceinline__ Split split(double x) {
    const float high = float(x);
    const double low = x - double(high);
    return {high, low - low == 0 ? float(low) : 0.0f};  // an infinite one has no low part
}

template <class S>
struct alignas(16) Word {  // 16 bytes
    static constexpr int kCount = 16 / sizeof(S);
    S at[kCount];
};

struct SquaredDifference {
    template <class T>
    __device__ static __forceinline__ T add(T x, T y, T sum) {
        const T difference = x - y;
        return multiply_add(difference, difference, sum);
    }
    __device__ static __forceinline__ float add(Split x, Split y, float sum) {
        const float difference = (x.high - y.high) + (x.low - y.low);
        return multiply_add(difference, difference, sum);
    }
};

struct Product {
    template <class T>
    __device__ static __forceinline__ T add(T x, T y, T sum) {
        return multiply_add(x, y, sum);
    }
};

// Where a thread's sums are: rows of a from tile_row(), of b from tile_column(), in steps of 16. Lanes next to each other
// share a row of b, and those two apart a row of a.
__device__ __forceinline__ int tile_row(int thread) {
    return thread / kWarp / 2 * 4 + thread % kWarp / 16 * 2 + thread % 2;
}
__device__ __forceinline__ int tile_column(int thread) {
    return thread / kWarp % 2 * 8 + thread % kWarp / 2 % 8;
}

template <class S_, int RA, int RB, int Depth>
struct Tile {
    using S = S_;
    static constexpr int kRows = 16 * RA, kColumns = 16 * RB, kDepth = Depth, kPitch = Depth + Word<S>::kCount;
    static constexpr int kSizeA = kRows * kPitch, kSizeB = kColumns * kPitch;  // elements in shared memory
    static_assert(Depth / Word<S>::kCount % 2 == 0, "the pitch must be an odd number of words");

    template <class Op, class T>
    __device__ static __forceinline__ void add(const S* a, const S* b, T (&sum)[RA][RB]) {
        using W = Word<S>;
        const W* rows = reinterpret_cast<const W*>(a + tile_row(int(threadIdx.x)) * kPitch);
        const W* columns = reinterpret_cast<const W*>(b + tile_column(int(threadIdx.x)) * kPitch);
        constexpr int pitch = 16 * kPitch / W::kCount;
#pragma unroll
        for (int k = 0; k < Depth / W::kCount; ++k) {
            W y[RB];
#pragma unroll
            for (int j = 0; j < RB; ++j) y[j] = columns[j * pitch + k];
#pragma unroll
            for (int i = 0; i < RA; ++i) {
                const W x = rows[i * pitch + k];
#pragma unroll
                for (int e = 0; e < W::kCount; ++e)
#pragma unroll
                    for (int j = 0; j < RB; ++j) sum[i][j] = Op::add(x.at[e], y[j].at[e], sum[i][j]);
            }
        }
    }
};

template <class S>
__device__ __forceinline__ S converted(S x) {
    return x;
}
template <class S>
__device__ __forceinline__ std::enable_if_t<std::is_same_v<S, Split>, S> converted(double x) {
    return split(x);
}
template <class S>
__device__ __forceinline__ S converted(Half x) {
    return to_float(x);
}
template <class S>
__device__ __forceinline__ S converted(BFloat16 x) {
    return to_float(x);
}

// An operand says where element (i, k) is, with what is common to a column worked out once; null is a zero. This one is
// rows of the caller's memory, [count, depth], count at least 1. Rows of a tile beyond the last one are the last one again:
// their sums are not looked at.
template <class In>
struct Rows {
    using Element = In;
    static constexpr bool kWords = false;
    const In* data;
    Index row_stride, column_stride;
    int count;

    __device__ __forceinline__ Index column(Index k) const { return k * column_stride; }
    __device__ __forceinline__ const In* at(int i, Index column) const {
        return data + (i < count ? i : count - 1) * row_stride + column;
    }
};

// The same where rows are contiguous and each begins at a multiple of 16 bytes.
template <class In>
struct WordRows {
    using Element = In;
    static constexpr bool kWords = true;
    const In* data;
    Index row_stride, column_stride;
    int count;
};

// Whether all rows of a batch begin so.
template <class In>
bool in_words(const Matrices& m) {
    constexpr Index wide = Word<In>::kCount;
    return m.column_stride == 1 && m.row_stride % wide == 0 && m.batch_stride % wide == 0 &&
           reinterpret_cast<std::uintptr_t>(m.data) % 16 == 0;
}

// Shared memory for pieces of two operands: one of each that is worked on, and the next one as it lies in memory, which
// each thread copies its part of and converts itself. A second piece that is ready would save a barrier of the two a piece
// takes, but not fit the registers.
template <class In, class Tile>
struct Pieces {
    using S = typename Tile::S;
    static constexpr int kRawA = Tile::kRows * Tile::kDepth, kRawB = Tile::kColumns * Tile::kDepth;  // elements
    S *a, *b;
    In *raw_a, *raw_b;

    __device__ __forceinline__ explicit Pieces(SharedMemory& memory) {
        a = memory.take<S>(Tile::kSizeA);
        b = memory.take<S>(Tile::kSizeB);
        raw_a = memory.take<In>(kRawA);
        raw_b = memory.take<In>(kRawB);
    }
    static void count(SharedSize& size) {
        size.add(sizeof(S), Tile::kSizeA).add(sizeof(S), Tile::kSizeB).add(sizeof(In), kRawA).add(sizeof(In), kRawB);
    }
};

// This thread's part of bringing pieces [Side, Depth] of columns first ... first + count - 1 of an operand into shared
// memory, zero behind them: start() copies, asynchronously where the hardware can, and after a wait finish() converts.
template <class Source, class Tile, int Side, bool = Source::kWords>
struct Piece {  // in single elements
    using In = typename Source::Element;
    using S = typename Tile::S;
    static constexpr int kDown = kTileThreads / Tile::kDepth, kEach = Side / kDown;
    const Source& source;
    Index first;
    int count;

    __device__ __forceinline__ void start(int k, In* raw) const {
        const int x = int(threadIdx.x) % Tile::kDepth, y = int(threadIdx.x) / Tile::kDepth;
        const bool inside = k + x < count;
        const auto column = source.column(inside ? first + k + x : 0);
#pragma unroll 1
        for (int e = 0; e < kEach; ++e) {
            const In* from = inside ? source.at(y + e * kDown, column) : nullptr;
            In* to = raw + e * kTileThreads + threadIdx.x;
            if constexpr (sizeof(In) >= 4)
                copy_async<sizeof(In)>(to, from, from ? int(sizeof(In)) : 0);
            else
                *to = from ? *from : In{};
        }
    }
    __device__ __forceinline__ void finish(S* ready, const In* raw) const {
        const int x = int(threadIdx.x) % Tile::kDepth, y = int(threadIdx.x) / Tile::kDepth;
#pragma unroll 1
        for (int e = 0; e < kEach; ++e)
            ready[(y + e * kDown) * Tile::kPitch + x] = converted<S>(raw[e * kTileThreads + threadIdx.x]);
    }
};

template <class Source, class Tile, int Side>
struct Piece<Source, Tile, Side, true> {  // in words; `first` is at the beginning of one
    using In = typename Source::Element;
    using S = typename Tile::S;
    static constexpr int kWide = Word<In>::kCount, kAcross = Tile::kDepth / kWide, kDown = kTileThreads / kAcross;
    static constexpr int kWords = Side / kDown;
    static_assert(kWords >= 1, "a word for every thread");
    const Source& source;
    Index first;
    int count;

    __device__ __forceinline__ void start(int k, In* raw) const {
        const int thread = recomputed(int(threadIdx.x), k), y = thread / kAcross, x = thread % kAcross * kWide;
        const int left = count - k - x, valid = left < 0 ? 0 : left < kWide ? left : kWide;
#pragma unroll
        for (int w = 0; w < kWords; ++w) {
            const int i = y + w * kDown, row = i < source.count ? i : source.count - 1;
            copy_async<16>(raw + (w * kTileThreads + thread) * kWide,
                           source.data + row * source.row_stride + first + k + x, valid * int(sizeof(In)));
        }
    }
    __device__ __forceinline__ void finish(S* ready, const In* raw) const {
        const int thread = int(threadIdx.x), y = thread / kAcross, x = thread % kAcross * kWide;
#pragma unroll
        for (int w = 0; w < kWords; ++w) {
            const Word<In> word = reinterpret_cast<const Word<In>*>(raw)[w * kTileThreads + thread];
            S* to = ready + (y + w * kDown) * Tile::kPitch + x;
#pragma unroll
            for (int e = 0; e < kWide; e += Word<S>::kCount) {
                Word<S> part;
#pragma unroll
                for (int f = 0; f < Word<S>::kCount; ++f) part.at[f] = converted<S>(word.at[e + f]);
                *reinterpret_cast<Word<S>*>(to + e) = part;
            }
        }
    }
};

// Adds columns first ... last - 1 (fewer than 2^31) of all pairs of rows of a tile to `sum`, in pieces, the next on its way
// while one is worked on. After every Run columns and at the end flush(columns before the last piece) takes the sums, which
// start again from 0.
template <class Op, int Run, class Tile, class T, int RA, int RB, class SourceA, class SourceB, class Flush>
__device__ __forceinline__ void sum_over_rows(const SourceA& a, const SourceB& b, Index first, Index last,
                                              const Pieces<typename SourceA::Element, Tile>& shared, T (&sum)[RA][RB],
                                              Flush&& flush) {
    constexpr int Depth = Tile::kDepth;
    static_assert(Run % Depth == 0, "a run is whole pieces");
    static_assert(Tile::kRows == 16 * RA && Tile::kColumns == 16 * RB);
    const int count = int(last - first);
    const Piece<SourceA, Tile, Tile::kRows> piece_a{a, first, count};
    const Piece<SourceB, Tile, Tile::kColumns> piece_b{b, first, count};
    const auto start = [&](int k) {
        piece_a.start(k, shared.raw_a);
        piece_b.start(k, shared.raw_b);
        copy_async_commit();
    };
    if (count > 0) start(0);
    for (int k = 0; k < count; k += Depth) {
        copy_async_wait<0>();
        sync_block();  // all threads are done with the piece before this one
        piece_a.finish(shared.a, shared.raw_a);
        piece_b.finish(shared.b, shared.raw_b);
        if (k + Depth < count) start(k + Depth);
        sync_block();  // all of this piece is there
        Tile::template add<Op>(shared.a, shared.b, sum);
        if ((k + Depth) % Run != 0 && k + Depth < count) continue;
        flush(k);
#pragma unroll
        for (int i = 0; i < RA; ++i)
#pragma unroll
            for (int j = 0; j < RB; ++j) sum[i][j] = T(0);
    }
}

}  // namespace mtz::cuda
