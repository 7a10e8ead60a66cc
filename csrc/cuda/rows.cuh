// A tile of sums over pairs of rows, the inner loop of every large product here:
//
//     sum[i, j] += sum_k Op(a[i, k], b[j, k])         a, b in shared memory, row after row, kPitch apart
//
// High x Wide threads (16 x 16 unless said otherwise), each with RA x RB sums in registers: rows ty + High i of a, rows
// tx + Wide j of b. A warp is 8 wide and 4 high, so that each of its 16-byte loads, along k, is of 8 or 4 different rows: all
// in other banks, as the pitch is an odd number of 16-byte words. For four columns of float32 a thread loads RA + RB words
// and takes 4 RA RB steps: 16 and 256 at 8 x 8. With several groups of such threads each sums up its share of a piece's
// columns, for the same pairs: so a tile can be small and the block, and what a thread does with a word, large.
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

// Where a thread's sums are: rows of a from tile_row(), of b from tile_column(), in steps of High and Wide. Lanes next to
// each other share a row of b, and those two apart a row of a.
template <int Wide = 16>
__device__ __forceinline__ int tile_row(int thread) {
    return thread / kWarp / (Wide / 8) * 4 + thread % kWarp / 16 * 2 + thread % 2;
}
template <int Wide = 16>
__device__ __forceinline__ int tile_column(int thread) {
    return thread / kWarp % (Wide / 8) * 8 + thread % kWarp / 2 % 8;
}

template <class S_, int RA, int RB, int Depth, int High = 16, int Wide = 16, int Groups = 1, int Stages = 2>
struct Tile {
    using S = S_;
    static constexpr int kHigh = High, kWide = Wide, kGroup = High * Wide, kGroups = Groups, kThreads = kGroup * Groups;
    static constexpr int kRows = High * RA, kColumns = Wide * RB, kDepth = Depth, kPitch = Depth + Word<S>::kCount;
    static constexpr int kSizeA = kRows * kPitch, kSizeB = kColumns * kPitch;  // elements in shared memory
    static constexpr int kStages = Stages;                                     // pieces in shared memory
    static_assert(Depth / Word<S>::kCount % 2 == 0, "the pitch must be an odd number of words");
    static_assert(kGroup % kWarp == 0 && Depth % (Groups * Word<S>::kCount) == 0,
                  "a group is whole warps, and takes whole words");

    template <class Op, class T>
    __device__ static __forceinline__ void add(const S* a, const S* b, T (&sum)[RA][RB]) {
        using W = Word<S>;
        constexpr int pitch = kPitch / W::kCount, share = Depth / W::kCount / Groups;
        const int thread = int(threadIdx.x) % kGroup, from = int(threadIdx.x) / kGroup * share;
        const W* rows = reinterpret_cast<const W*>(a) + tile_row<Wide>(thread) * pitch + from;
        const W* columns = reinterpret_cast<const W*>(b) + tile_column<Wide>(thread) * pitch + from;
#pragma unroll
        for (int k = 0; k < share; ++k) {
            W y[RB];
#pragma unroll
            for (int j = 0; j < RB; ++j) y[j] = columns[j * Wide * pitch + k];
#pragma unroll
            for (int i = 0; i < RA; ++i) {
                const W x = rows[i * High * pitch + k];
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

}  // namespace mtz::cuda
