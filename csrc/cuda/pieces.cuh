// Pieces of two operands on their way through shared memory, and the sums of a tile (cuda/rows.cuh) over them.
#pragma once

#include "cuda/rows.cuh"

namespace mtz::cuda {

// Whether pieces are copied as they lie in memory, next to where they are worked on, each thread's part put in place by itself
// after a wait: where elements are converted, and where there is but one place.
template <class In, class Tile>
constexpr bool kInTwoSteps = !std::is_same_v<In, typename Tile::S> || Tile::kStages == 1;

// Shared memory for pieces of two operands: in one step kStages of them, one that is worked on and the others on their way.
// In two steps one that is worked on, and the next one as it lies in memory: this takes two barriers a piece, but 8 x 8 sums
// leave no register for the choice of a place.
template <class In, class Tile>
struct Pieces {
    using S = typename Tile::S;
    static constexpr bool kTwoSteps = kInTwoSteps<In, Tile>;
    static constexpr int kStages = kTwoSteps ? 1 : Tile::kStages, kSize = kStages * (Tile::kSizeA + Tile::kSizeB);
    static constexpr int kRaw = kTwoSteps ? (Tile::kRows + Tile::kColumns) * Tile::kDepth : 0;  // elements
    S *a, *b;
    In *raw_a, *raw_b;

    __device__ __forceinline__ explicit Pieces(SharedMemory& memory) {
        a = memory.take<S>(kSize);
        b = a + kStages * Tile::kSizeA;
        if constexpr (kTwoSteps) {
            raw_a = memory.take<In>(kRaw);
            raw_b = raw_a + Tile::kRows * Tile::kDepth;
        }
    }
    static void count(SharedSize& size) {
        size.add(sizeof(S), kSize);
        if (kTwoSteps) size.add(sizeof(In), kRaw);
    }
};

// This thread's part of bringing pieces [Side, Depth] of columns first ... first + count - 1 of an operand into shared
// memory, zero behind them: start() copies, asynchronously where the hardware can, and in two steps finish() converts after a
// wait. Pieces are started in order.
template <class Source, class Tile, int Side, bool = Source::kWords>
struct Piece {  // in single elements
    using In = typename Source::Element;
    using S = typename Tile::S;
    static constexpr int kDown = Tile::kThreads / Tile::kDepth, kEach = Side / kDown;
    static constexpr int kPitch = kInTwoSteps<In, Tile> ? Tile::kDepth : Tile::kPitch;  // of what is copied
    const Source& source;
    Index first;
    int count;

    __device__ __forceinline__ void start(int k, In* to) const {
        const int thread = recomputed(int(threadIdx.x), k), x = thread % Tile::kDepth, y = thread / Tile::kDepth;
        const bool inside = k + x < count;
        const auto column = source.column(inside ? first + k + x : 0);
#pragma unroll 1
        for (int e = 0; e < kEach; ++e) {
            const In* from = inside ? source.at(y + e * kDown, column) : nullptr;
            In* at = to + (y + e * kDown) * kPitch + x;
            if constexpr (sizeof(In) >= 4)
                copy_async<sizeof(In)>(at, from, from ? int(sizeof(In)) : 0);
            else
                *at = from ? *from : In{};
        }
    }
    __device__ __forceinline__ void finish(S* ready, const In* raw) const {
        const int x = int(threadIdx.x) % Tile::kDepth, y = int(threadIdx.x) / Tile::kDepth;
#pragma unroll 1
        for (int e = 0; e < kEach; ++e)
            ready[(y + e * kDown) * Tile::kPitch + x] = converted<S>(raw[e * Tile::kThreads + threadIdx.x]);
    }
};

template <class Source, class Tile, int Side>
struct Piece<Source, Tile, Side, true> {  // in words; `first` is at the beginning of one
    using In = typename Source::Element;
    using S = typename Tile::S;
    static constexpr int kWide = Word<In>::kCount, kAcross = Tile::kDepth / kWide, kDown = Tile::kThreads / kAcross;
    static constexpr int kWords = Side / kDown;
    static constexpr int kPitch = kInTwoSteps<In, Tile> ? Tile::kDepth : Tile::kPitch;  // of what is copied
    static constexpr bool kKept = Tile::kGroups > 1;  // there are registers for the words' addresses
    static_assert(kWords >= 1, "a word for every thread");
    const Source& source;
    Index first;
    int count;
    const In* next[kWords];

    __device__ __forceinline__ Piece(const Source& rows, Index first_column, int columns)
        : source(rows), first(first_column), count(columns) {
        if (kKept)
#pragma unroll
            for (int w = 0; w < kWords; ++w) next[w] = at(int(threadIdx.x), w);
    }
    __device__ __forceinline__ const In* at(int thread, int w) const {
        const int i = thread / kAcross + w * kDown, row = i < source.count ? i : source.count - 1;
        return source.data + row * source.row_stride + first + thread % kAcross * kWide;
    }
    __device__ __forceinline__ void start(int k, In* to) {
        const unsigned thread = unsigned(recomputed(int(threadIdx.x), k));
        const int y = int(thread / kAcross), x = int(thread % kAcross * kWide);
        const int left = count - k - x, valid = left < 0 ? 0 : left < kWide ? left : kWide;
#pragma unroll
        for (int w = 0; w < kWords; ++w) {
            const In* from = kKept ? next[w] : at(int(thread), w) + k;
            copy_async<16>(to + (y + w * kDown) * kPitch + x, from, valid * int(sizeof(In)));
            if (kKept) next[w] += Tile::kDepth;
        }
    }
    __device__ __forceinline__ void finish(S* ready, const In* raw) const {
        const int thread = int(threadIdx.x), y = thread / kAcross, x = thread % kAcross * kWide;
#pragma unroll
        for (int w = 0; w < kWords; ++w) {
            const Word<In> word = reinterpret_cast<const Word<In>*>(raw)[w * Tile::kThreads + thread];
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

// Adds columns first ... last - 1 (fewer than 2^31) of all pairs of rows of a tile to `sum`, in pieces, the next ones on
// their way while one is worked on. After every Run columns and at the end flush(columns before the last piece) takes the
// sums, which start again from 0.
template <class Op, int Run, class Tile, class T, int RA, int RB, class SourceA, class SourceB, class Flush>
__device__ __forceinline__ void sum_over_rows(const SourceA& a, const SourceB& b, Index first, Index last,
                                              const Pieces<typename SourceA::Element, Tile>& shared, T (&sum)[RA][RB],
                                              Flush&& flush) {
    using Shared = Pieces<typename SourceA::Element, Tile>;
    constexpr int Depth = Tile::kDepth, ahead = larger(1, Shared::kStages - 1);
    static_assert(Run % Depth == 0, "a run is whole pieces");
    static_assert(Tile::kRows == Tile::kHigh * RA && Tile::kColumns == Tile::kWide * RB);
    const int count = int(last - first);
    Piece<SourceA, Tile, Tile::kRows> piece_a{a, first, count};
    Piece<SourceB, Tile, Tile::kColumns> piece_b{b, first, count};
    const auto start = [&](int k, int stage) {
        if (k < count) {
            if constexpr (Shared::kTwoSteps) {
                piece_a.start(k, shared.raw_a);
                piece_b.start(k, shared.raw_b);
            } else {
                piece_a.start(k, shared.a + stage * Tile::kSizeA);
                piece_b.start(k, shared.b + stage * Tile::kSizeB);
            }
        }
        copy_async_commit();
    };
    int stage = 0;  // of the piece that is worked on
#pragma unroll
    for (int s = 0; s < ahead; ++s) start(s * Depth, s);
    for (int k = 0; k < count; k += Depth) {
        copy_async_wait<ahead - 1>();
        sync_block();  // all threads are done with the piece before this one
        if constexpr (Shared::kTwoSteps) {
            piece_a.finish(shared.a, shared.raw_a);
            piece_b.finish(shared.b, shared.raw_b);
            start(k + Depth, 0);
            sync_block();  // all of this piece is there
        } else {           // and so is all of this one: the next goes where the one before was
            start(k + ahead * Depth, stage == 0 ? ahead : stage - 1);
        }
        Tile::template add<Op>(shared.a + stage * Tile::kSizeA, shared.b + stage * Tile::kSizeB, sum);
        stage = stage == Shared::kStages - 1 ? 0 : stage + 1;
        if ((k + Depth) % Run != 0 && k + Depth < count) continue;
        flush(k);
#pragma unroll
        for (int i = 0; i < RA; ++i)
#pragma unroll
            for (int j = 0; j < RB; ++j) sum[i][j] = T(0);
    }
}

// The sums of all groups for the same pairs added up, in order, through the shared memory of the pieces: four of them each,
// of columns tx + Wide c of row ty + High g of the tile, where thread t has ty and tx as t % kGroup and g = t / kGroup.
template <class Tile, class T, int RA, int RB>
__device__ __forceinline__ Word<T> add_groups(const T (&sum)[RA][RB], T* shared) {
    static_assert(RA == Tile::kGroups && RB == Word<T>::kCount, "a word a row, and a row for each group");
    static_assert(Tile::kStages * (Tile::kSizeA + Tile::kSizeB) >= Tile::kThreads * RA * RB, "place for all sums");
    const int group = int(threadIdx.x) / Tile::kGroup, thread = int(threadIdx.x) % Tile::kGroup;
    Word<T>* to = reinterpret_cast<Word<T>*>(shared) + thread;
    sync_block();  // all threads are done with the last piece
#pragma unroll
    for (int i = 0; i < RA; ++i) {
        Word<T> row;
#pragma unroll
        for (int j = 0; j < RB; ++j) row.at[j] = sum[i][j];
        to[(group * RA + i) * Tile::kGroup] = row;
    }
    sync_block();  // the sums of all groups are there
    Word<T> total = to[group * Tile::kGroup];
#pragma unroll
    for (int g = 1; g < Tile::kGroups; ++g) {
        const Word<T> more = to[(g * RA + group) * Tile::kGroup];
#pragma unroll
        for (int j = 0; j < RB; ++j) total.at[j] += more.at[j];
    }
    return total;
}

}  // namespace mtz::cuda
