// What a block of threads does for a matrix that it keeps in shared memory, whichever way it is updated: brings it and its
// vectors, finds out whether these need an order, judges the result and writes it back.
#pragma once

#include "cuda/sherman_morrison.cuh"

namespace mtz::cuda {

__device__ __forceinline__ bool in_words(const void* data, Index stride, Index other, int count) {
    return reinterpret_cast<std::uintptr_t>(data) % 16 == 0 && stride % count == 0 && other % count == 0;
}

// f(i, j) for all i < rows, j < columns, by the first `step` threads, half a warp a row; not unrolled, as its code is
// fetched more often than it is run.
template <class F>
__device__ __forceinline__ void for_each(int rows, int columns, int thread, int step, F f) {
    constexpr int half = kWarp / 2;
#pragma unroll 1
    for (int i = thread / half; i < rows; i += step / half)
#pragma unroll 1
        for (int j = thread % half; j < columns; j += half) f(i, j);
}

// `to(i, j)` is where element j of row i goes in shared memory; `side` is d, padded to whole words.
template <class T>
struct Resident {
    static constexpr int kWide = 16 / sizeof(T);
    struct alignas(16) Word {
        T at[kWide];
    };

    const ShermanMorrisonArgs& g;
    int side, thread, threads;
    bool words, vector_words;  // rows may be copied by 16 bytes

    __device__ __forceinline__ Resident(const ShermanMorrisonArgs& args, int side)
        : g(args), side(side), thread(int(threadIdx.x)), threads(int(blockDim.x)) {
        words = in_words(g.inverse, g.inverse_batch_stride, g.inverse_row_stride, kWide);
        vector_words = g.vectors.column_stride == 1 &&
                       in_words(g.vectors.data, g.vectors.batch_stride, g.vectors.row_stride, kWide);
    }
    __device__ __forceinline__ T* inverse(Index p) const {
        return static_cast<T*>(g.inverse) + p * g.inverse_batch_stride;
    }

    // Starts copying rows of d elements; what is beyond, to `rows` and `side`, becomes zero.
    template <int Count, class Row, class To>
    __device__ __forceinline__ void start_copy(int me, int rows, Index stride, int step, Row row, To to) const {
        const int d = int(g.d);
        for_each(rows, side / Count, me, step, [&](int i, int j) {
            const T* from = row(i);
            const int left = from ? d - j * Count : 0, valid = left < 0 ? 0 : left < Count ? left : Count;
            copy_async<Count* int(sizeof(T))>(to(i, j * Count), valid ? from + j * Count * stride : inverse(0),
                                              valid * int(sizeof(T)));
        });
    }

    template <class To>
    __device__ __forceinline__ void start_matrix(Index p, To to) const {
        const T* from = inverse(p);
        const auto row = [&](int i) { return i < g.d ? from + i * g.inverse_row_stride : nullptr; };
        if (words)
            start_copy<kWide>(thread, side, 1, threads, row, to);
        else
            start_copy<1>(thread, side, 1, threads, row, to);
    }

    // `rows` vectors from number `first` on, by the first `step` threads.
    template <class To>
    __device__ __forceinline__ void start_vectors(Index p, const Index* order, Index first, int rows, int me, int step,
                                                  To to) const {
        const auto start = [&](int q) {
            return p * g.vectors.batch_stride + (order ? order[first + q] : first + q) * g.vectors.row_stride;
        };
        if (g.vector_scalar != g.scalar) {
            for_each(rows, side, me, step, [&](int q, int j) {
                const bool any = first + q < g.k && j < g.d;
                *to(q, j) = any ? load_vector_element<T>(g, start(q) + j * g.vectors.column_stride) : T(0);
            });
            return;
        }
        const T* from = static_cast<const T*>(g.vectors.data);
        const auto row = [&](int q) { return first + q < g.k ? from + start(q) : nullptr; };
        if (vector_words)
            start_copy<kWide>(me, rows, 1, step, row, to);
        else
            start_copy<1>(me, rows, g.vectors.column_stride, step, row, to);
    }

    // That of vector number first + thread, for the first `rows` threads.
    __device__ __forceinline__ double weight(Index p, const Index* order, Index first, int rows) const {
        const Index q = first + thread;
        if (thread >= rows || q >= g.k) return 0;
        return g.weight[p * g.weight_batch_stride + (order ? order[q] : q) * g.weight_stride];
    }

    // Brings the first vectors by `bring(order)`. They stay as they came, with no order, unless a weight is negative or NaN,
    // which is found out while they are on their way. `mine` becomes the weight of vector number `thread`; `before` is as in
    // order_vectors.
    template <class Bring>
    __device__ __forceinline__ const Index* bring_in_order(Index p, Index* orders, Index* before, double& mine,
                                                           Bring bring) const {
        const double* weights = g.weight + p * g.weight_batch_stride;
        const Index* order = nullptr;
        for (;;) {
            mine = weight(p, order, 0, threads);
            bring(order);
            copy_async_commit();
            if (order) return order;
            bool other = !(mine >= 0);
#pragma unroll 1
            for (Index q = thread + threads; q < g.k; q += threads)
                other = other || !(weights[q * g.weight_stride] >= 0);
            if (!sync_block_any(other)) return order;
            order = orders + p * g.k;
            order_vectors(weights, g.weight_stride, g.k, orders + p * g.k, before);
            copy_async_wait<0>();
            sync_block();  // the order is there
        }
    }

    // The status of the updated matrix, the same for every thread.
    template <class To>
    __device__ __forceinline__ int judge(To to) const {
        int worst = kUpdated;
        for (int i = thread; i < g.d; i += threads) {
            const int status = judge_diagonal(*to(i, i));
            if (status > worst) worst = status;
        }
        if (!sync_block_any(worst != kUpdated)) return kUpdated;
        return sync_block_any(worst == kNotFinite) ? kNotFinite : kIndefinite;
    }

    template <class To>
    __device__ __forceinline__ void write(Index p, To to) const {
        T* row = inverse(p);
        const int d = int(g.d);
        if (words && d % kWide == 0)
            for_each(d, d / kWide, thread, threads, [&](int i, int j) {
                *reinterpret_cast<Word*>(row + i * g.inverse_row_stride + j * kWide) =
                    *reinterpret_cast<const Word*>(to(i, j * kWide));
            });
        else
            for_each(d, d, thread, threads, [&](int i, int j) { row[i * g.inverse_row_stride + j] = *to(i, j); });
    }
};

}  // namespace mtz::cuda
