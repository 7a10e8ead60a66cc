// A tile of sums over pairs of rows, the inner loop of every large product here:
//
//     sum[i, j] += sum_k Op(a[i, k], b[j, k])         a, b in shared memory [kSide, kPitch], row after row
//
// 256 threads, each with R x R sums in registers: rows ty + 16 i of a, rows tx + 16 j of b. A warp is 8 wide and 4 high, so
// that each of its 16-byte loads, along k, is of 8 or 4 different rows: all in other banks, as the pitch is an odd number of
// 16-byte words. For 16 bytes of depth in float32 a thread loads 2 R words and takes 4 R^2 steps: 16 and 256 at R = 8.
//
// R = 8 must fit into 128 registers, of which sums and words take 100, for two blocks to share a processor. So the next piece
// waits in shared memory and not in registers, what a thread needs to know to bring it is worked out again each time, and
// the steps through a piece are unrolled: there are no addresses to keep.
#pragma once

#include <type_traits>

#include "cuda/intrinsics.cuh"
#include "cuda/launch.cuh"

namespace mtz::cuda {

constexpr int kTileThreads = 256;

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

template <class S, int R, int Depth>
struct Tile {
    static constexpr int kSide = 16 * R, kDepth = Depth, kPitch = Depth + Word<S>::kCount;
    static constexpr int kSize = kSide * kPitch;  // elements of one operand in shared memory
    static_assert(Depth / Word<S>::kCount % 2 == 0, "the pitch must be an odd number of words");

    // Where this thread's sums are: rows of a from down(), of b from across(), in steps of 16. Lanes next to each other
    // share a row of b, and those two apart a row of a.
    __device__ static __forceinline__ int across(int thread) { return thread / kWarp % 2 * 8 + thread % kWarp / 2 % 8; }
    __device__ static __forceinline__ int down(int thread) {
        return thread / kWarp / 2 * 4 + thread % kWarp / 16 * 2 + thread % 2;
    }

    template <class Op, class T>
    __device__ static __forceinline__ void add(const S* a, const S* b, T (&sum)[R][R]) {
        using W = Word<S>;
        const W* rows = reinterpret_cast<const W*>(a + down(int(threadIdx.x)) * kPitch);
        const W* columns = reinterpret_cast<const W*>(b + across(int(threadIdx.x)) * kPitch);
        constexpr int pitch = 16 * kPitch / W::kCount;
#pragma unroll
        for (int k = 0; k < Depth / W::kCount; ++k) {
            W y[R];
#pragma unroll
            for (int j = 0; j < R; ++j) y[j] = columns[j * pitch + k];
#pragma unroll
            for (int i = 0; i < R; ++i) {
                const W x = rows[i * pitch + k];
#pragma unroll
                for (int e = 0; e < W::kCount; ++e)
#pragma unroll
                    for (int j = 0; j < R; ++j) sum[i][j] = Op::add(x.at[e], y[j].at[e], sum[i][j]);
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
template <class In, class S, class Tile>
struct Pieces {
    static constexpr int kRaw = Tile::kSide * Tile::kDepth;  // elements of an operand
    S* ready;
    In* raw;

    __device__ __forceinline__ explicit Pieces(SharedMemory& memory) {
        ready = memory.take<S>(2 * Tile::kSize);
        raw = memory.take<In>(2 * kRaw);
    }
    static void count(SharedSize& size) { size.add(sizeof(S), 2 * Tile::kSize).add(sizeof(In), 2 * kRaw); }
};

// This thread's part of bringing pieces [kSide, kDepth] of columns first ... first + count - 1 of an operand into shared
// memory, zero behind them: start() copies, asynchronously where the hardware can, and after a wait finish() converts.
template <class Source, class S, class Tile, bool = Source::kWords>
struct Piece {  // in single elements
    using In = typename Source::Element;
    static constexpr int kDown = kTileThreads / Tile::kDepth, kEach = Tile::kSide / kDown;
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

template <class Source, class S, class Tile>
struct Piece<Source, S, Tile, true> {  // in words; `first` is at the beginning of one
    using In = typename Source::Element;
    static constexpr int kWide = Word<In>::kCount, kAcross = Tile::kDepth / kWide, kDown = kTileThreads / kAcross;
    static constexpr int kWords = Tile::kSide / kDown;
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

// Columns first ... last - 1 (fewer than 2^31) of all pairs of rows of a tile, in pieces, the next on its way while one is
// worked on; after every Run columns and at the end sums go to `flush(sum, columns before the last piece)` and start again from 0. The pieces
// are free when all threads have arrived; a barrier must follow before they change.
template <class Op, int Run, class S, class T, int R, int Depth, class SourceA, class SourceB, class Flush>
__device__ __forceinline__ void sum_over_rows(const SourceA& a, const SourceB& b, Index first, Index last,
                                              const Pieces<typename SourceA::Element, S, Tile<S, R, Depth>>& shared,
                                              Flush&& flush) {
    static_assert(Run % Depth == 0, "a run is whole pieces");
    using Tile = Tile<S, R, Depth>;
    using Shared = Pieces<typename SourceA::Element, S, Tile>;
    const int count = int(last - first);
    const Piece<SourceA, S, Tile> piece_a{a, first, count};
    const Piece<SourceB, S, Tile> piece_b{b, first, count};
    const auto start = [&](int k) {
        piece_a.start(k, shared.raw);
        piece_b.start(k, shared.raw + Shared::kRaw);
        copy_async_commit();
    };
    T sum[R][R] = {};
    if (count > 0) start(0);
    for (int k = 0; k < count; k += Depth) {
        copy_async_wait<0>();
        sync_block();  // all threads are done with the piece before this one
        piece_a.finish(shared.ready, shared.raw);
        piece_b.finish(shared.ready + Tile::kSize, shared.raw + Shared::kRaw);
        if (k + Depth < count) start(k + Depth);
        sync_block();  // all of this piece is there
        Tile::template add<Op>(shared.ready, shared.ready + Tile::kSize, sum);
        if ((k + Depth) % Run != 0 && k + Depth < count) continue;
        flush(sum, k);
#pragma unroll
        for (int i = 0; i < R; ++i)
#pragma unroll
            for (int j = 0; j < R; ++j) sum[i][j] = T(0);
    }
}

}  // namespace mtz::cuda
