// A tile of sums over pairs of rows, the inner loop of every large product here:
//
//     sum[i, j] += sum_k Op(a[i, k], b[j, k])         a, b in shared memory [kSide, kPitch], row after row
//
// 256 threads, each with R x R sums in registers: rows ty + 16 i of a, rows tx + 16 j of b. A warp is 8 wide and 4 high, so
// that each of its 16-byte loads, along k, is 8 or 4 different rows: one pass through the banks, as the pitch is an odd
// number of 16-byte words.
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

    // Where this thread's sums are: rows of a from down(), of b from across(), in steps of 16.
    __device__ static __forceinline__ int across() {
        const int warp = int(threadIdx.x) / kWarp, lane = int(threadIdx.x) % kWarp;
        return warp % 2 * 8 + lane % 8;
    }
    __device__ static __forceinline__ int down() {
        const int warp = int(threadIdx.x) / kWarp, lane = int(threadIdx.x) % kWarp;
        return warp / 2 * 4 + lane / 8;
    }

    template <class Op, class T>
    __device__ static __forceinline__ void add(const S* a, const S* b, T (&sum)[R][R]) {
        using W = Word<S>;
        const W* rows = reinterpret_cast<const W*>(a + down() * kPitch);
        const W* columns = reinterpret_cast<const W*>(b + across() * kPitch);
        constexpr int pitch = 16 * kPitch / W::kCount;
#pragma unroll 2
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

// Rows of the caller's memory, [count, depth], as an operand of a tile. What an operand has to say: where element (i, k) is,
// or that it is zero (null), with what is common to a column worked out once; and whether 16 bytes along k are contiguous.
template <class In>
struct Rows {
    using Element = In;
    const In* data;
    Index row_stride, column_stride, count;

    __device__ __forceinline__ Index column(Index k) const { return k; }
    __device__ __forceinline__ const In* at(Index i, Index k) const {
        return i < count ? data + i * row_stride + k * column_stride : nullptr;
    }
    __device__ __forceinline__ bool whole_words() const {
        return column_stride == 1 && row_stride % (16 / Index(sizeof(In))) == 0 &&
               reinterpret_cast<std::uintptr_t>(data) % 16 == 0;
    }
};

__device__ __forceinline__ Split converted(double x) {
    return split(x);
}
__device__ __forceinline__ float converted(Half x) {
    return to_float(x);
}
__device__ __forceinline__ float converted(BFloat16 x) {
    return to_float(x);
}

// Brings pieces [kSide, kDepth] of an operand into shared memory, zero from column `last` on: asynchronously where no
// conversion is needed, else through registers (fetch before the work on the piece before, put after it).
template <class Source, class S, class Tile>
struct Piece {
    using In = typename Source::Element;
    static constexpr bool kDirect = std::is_same_v<In, S>;
    static constexpr int kDown = kTileThreads / Tile::kDepth, kEach = Tile::kSide / kDown;
    const Source& source;
    Index last;
    bool words;
    S held[kDirect ? 1 : kEach];

    __device__ __forceinline__ Piece(const Source& from, Index end)
        : source(from), last(end), words(kDirect && from.whole_words()) {}

    __device__ __forceinline__ void start(Index k0, S* shared) const {
        if (words) {
            constexpr int wide = Word<S>::kCount, per_row = Tile::kDepth / wide;
            for (int e = int(threadIdx.x); e < Tile::kSide * per_row; e += kTileThreads) {
                const int i = e / per_row, within = e % per_row * wide;
                const In* from = k0 + within < last ? source.at(i, source.column(k0 + within)) : nullptr;
                const int valid = from ? int(smaller(wide, last - k0 - within)) : 0;
                copy_async<16>(shared + i * Tile::kPitch + within, from, valid * int(sizeof(S)));
            }
            return;
        }
        const int within = int(threadIdx.x) % Tile::kDepth, first = int(threadIdx.x) / Tile::kDepth;
        const bool inside = k0 + within < last;
        const auto column = source.column(inside ? k0 + within : 0);
        for (int e = 0; e < kEach; ++e) {
            const int i = first + e * kDown;
            const In* from = inside ? source.at(i, column) : nullptr;
            copy_async<sizeof(S)>(shared + i * Tile::kPitch + within, from, from ? int(sizeof(S)) : 0);
        }
    }
    __device__ __forceinline__ void fetch(Index k0) {
        const int within = int(threadIdx.x) % Tile::kDepth, first = int(threadIdx.x) / Tile::kDepth;
        const bool inside = k0 + within < last;
        const auto column = source.column(inside ? k0 + within : 0);
#pragma unroll
        for (int e = 0; e < kEach; ++e) {
            const In* from = inside ? source.at(first + e * kDown, column) : nullptr;
            held[e] = from ? converted(*from) : S{};
        }
    }
    __device__ __forceinline__ void put(S* shared) const {
        const int within = int(threadIdx.x) % Tile::kDepth, first = int(threadIdx.x) / Tile::kDepth;
#pragma unroll
        for (int e = 0; e < kEach; ++e) shared[(first + e * kDown) * Tile::kPitch + within] = held[e];
    }
};

// Columns first ... last - 1 of all pairs of rows of a tile, in pieces, the next on its way while one is worked on; after
// every `run` columns (a multiple of the depth) and at the end sums go to `flush(sum, first run)` and start again from 0.
// `shared` has 4 * Tile::kSize elements, free when all threads have arrived; a barrier must follow before they change.
template <class Op, class S, class T, int R, int Depth, class Source, class Flush>
__device__ __forceinline__ void sum_over_rows(const Source& a, const Source& b, Index first, Index last, Index run,
                                              S* shared, Flush&& flush) {
    using Tile = Tile<S, R, Depth>;
    using Operand = Piece<Source, S, Tile>;
    T sum[R][R] = {};
    Operand piece_a(a, last), piece_b(b, last);
    const auto at = [&](int buffer) { return shared + buffer * 2 * Tile::kSize; };
    if constexpr (Operand::kDirect) {
        piece_a.start(first, at(0));
        piece_b.start(first, at(0) + Tile::kSize);
        copy_async_commit();
    } else {
        piece_a.fetch(first);
        piece_b.fetch(first);
        piece_a.put(at(0));
        piece_b.put(at(0) + Tile::kSize);
    }
    int buffer = 0;
    Index flushed = first;
    for (Index k = first; k < last; k += Depth, buffer ^= 1) {
        if constexpr (Operand::kDirect) copy_async_wait<0>();
        sync_block();  // this piece is complete, and all threads are done with the one before it
        const bool more = k + Depth < last;
        S* next = at(buffer ^ 1);
        if (more) {
            if constexpr (Operand::kDirect) {
                piece_a.start(k + Depth, next);
                piece_b.start(k + Depth, next + Tile::kSize);
                copy_async_commit();
            } else {
                piece_a.fetch(k + Depth);
                piece_b.fetch(k + Depth);
            }
        }
        Tile::template add<Op>(at(buffer), at(buffer) + Tile::kSize, sum);
        if constexpr (!Operand::kDirect) {
            if (more) {
                piece_a.put(next);
                piece_b.put(next + Tile::kSize);
            }
        }
        if (!more || k + Depth - flushed >= run) {
            flush(sum, flushed == first);
            flushed = k + Depth;
#pragma unroll
            for (int i = 0; i < R; ++i)
#pragma unroll
                for (int j = 0; j < R; ++j) sum[i][j] = T(0);
        }
    }
}

}  // namespace mtz::cuda
