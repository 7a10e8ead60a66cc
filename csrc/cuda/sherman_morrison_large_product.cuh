// S = V Y^T of a panel with itself and with the panels behind it, shared out among many blocks and chunks of columns.
#pragma once

#include "cuda/sherman_morrison_large.cuh"

namespace mtz::cuda {

constexpr int kPanelThreads = 256;
constexpr int kProduct = 16 * 8;  // elements of S that a block works out at a time

// s[p, b, chunk, q, r] = sum over a chunk of j of V[q, j] Y[r, j], q of this panel and r of panel b; rows end in zeros. On
// tensor cores a block has 16 x 8 of them, and its warps take sixteens of j in turn.
__device__ __forceinline__ void multiply_small(const Large<float>& w, int panel, int panels) {
    constexpr int tiles = K * K / kProduct, step = kPanelThreads / kWarp * 16;
    float* shared = SharedMemory().take<float>(kPanelThreads / kWarp * kProduct);
    const int thread = int(threadIdx.x), warp = thread / kWarp, g = thread % kWarp / 4, t = thread % 4;
    const int later = panels - panel;
    for (Index e = blockIdx.x; e < w.g.batch * later * w.chunks * tiles; e += gridDim.x) {
        const int q = int(e % tiles) / 8 * 16, r = int(e % tiles) % 8 * 8;
        const Index place = e / tiles, chunk = place % w.chunks, b = panel + place / w.chunks % later;
        const Index p = place / w.chunks / later;
        if ((b == panel && r / 16 > q / 16) || w.skipped(p)) continue;  // for a whole block
        const float* v = w.v + (p * w.side + panel * K + q + g) * w.pitch + 4 * t;
        const float* y = w.y + (p * w.side + b * K + r + g) * w.pitch + 4 * t;
        const Index last = smaller(w.pitch, (chunk + 1) * w.chunk);
        tensor::Tile sum[1][1] = {};
#pragma unroll 4
        for (Index j = chunk * w.chunk + 16 * warp; j < last; j += step) {
            const bool any = j + 4 * t < last;
            const Four<float> none{},
                words[3] = {any ? load_four(v + j) : none, any ? load_four(v + 8 * w.pitch + j) : none,
                            any ? load_four(y + j) : none};
            Tf32 left[1][2][4], right[1][4];
#pragma unroll
            for (int f = 0; f < 4; ++f) {
                left[0][0][f] = split_tf32(words[0].at[f]);
                left[0][1][f] = split_tf32(words[1].at[f]);
                right[0][f] = split_tf32(words[2].at[f]);
            }
            tensor::multiply_add<1>(sum, left, right);
        }
        float* mine = shared + warp * kProduct + g * 8 + 2 * t;
#pragma unroll
        for (int f = 0; f < 4; ++f) mine[f / 2 * 64 + f % 2] = sum[0][0][f];
        sync_block();  // sums of all warps are there
        if (thread < kProduct) {
            float total = 0;
#pragma unroll
            for (int f = 0; f < kPanelThreads / kWarp; ++f) total += shared[f * kProduct + thread];
            w.s[((p * w.panels + b) * w.chunks + chunk) * K * K + (q + thread / 8) * K + r + thread % 8] = total;
        }
        sync_block();  // nobody needs these sums any more
    }
}

// Elsewhere a warp has 4 x 4 of them, and its lanes take words of j in turn.
template <class T>
__global__ void __launch_bounds__(kPanelThreads, 1) small_product_kernel(Large<T> w, int panel, int panels) {
    constexpr int side = K / 4, wide = Word<T>::kCount;
    wait_for_launch();
    if constexpr (sizeof(T) == 4) {
        if (kTensorCores) return multiply_small(w, panel, panels);
    }
    const int lane = int(threadIdx.x) % kWarp, later = panels - panel;
    const Index warp = first_item() / kWarp, warps = item_step() / kWarp;
    for (Index e = warp; e < w.g.batch * later * w.chunks * side * side; e += warps) {
        const int r = int(e % side) * 4, q = int(e / side % side) * 4;
        const Index place = e / (side * side), chunk = place % w.chunks, b = panel + place / w.chunks % later;
        const Index p = place / w.chunks / later;
        if ((b == panel && r / Pivots<T>::kBlock > q / Pivots<T>::kBlock) || w.skipped(p))
            continue;  // for a whole warp
        const T* v = w.v + (p * w.side + panel * K + q) * w.pitch;
        const T* y = w.y + (p * w.side + b * K + r) * w.pitch;
        const Index last = smaller(w.pitch, (chunk + 1) * w.chunk);
        T sum[4][4] = {};
#pragma unroll(sizeof(T) == 4 ? 4 : 2)
        for (Index j = chunk * w.chunk + lane * wide; j < last; j += kWarp * wide) {
            Word<T> at_y[4];
#pragma unroll
            for (int c = 0; c < 4; ++c) at_y[c] = *reinterpret_cast<const Word<T>*>(y + c * w.pitch + j);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const Word<T> x = *reinterpret_cast<const Word<T>*>(v + i * w.pitch + j);
#pragma unroll
                for (int c = 0; c < 4; ++c)
#pragma unroll
                    for (int f = 0; f < wide; ++f) sum[i][c] = multiply_add(x.at[f], at_y[c].at[f], sum[i][c]);
            }
        }
        T* to = w.s + ((p * w.panels + b) * w.chunks + chunk) * K * K + q * K + r;
        // sums of all lanes: in each step a lane keeps half of its sums, and its partner the others
#pragma unroll
        for (int step = 0; step < 4; ++step) {
            const int half = 8 >> step;
            const bool upper = lane & 2 * half;
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                if (i >= half) continue;
                T &low = sum[i / 4][i % 4], &high = sum[(i + half) / 4][(i + half) % 4];
                const T sent = upper ? low : high, kept = upper ? high : low;
                low = kept + shuffle_xor(sent, 2 * half);
            }
        }
        const T total = sum[0][0] + shuffle_xor(sum[0][0], 1);
        if (lane % 2 == 0) to[lane / 8 * K + lane / 2 % 4] = total;
    }
}

}  // namespace mtz::cuda
