"""python -m bench.awkward: every CUDA kernel on sizes that fill no tile, to be run under compute-sanitizer."""

from __future__ import annotations

import torch

import mtz_ext
from tests import cases


def main() -> None:
    """Inputs come from the CPU, so that few kernels but ours run."""
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        for n, m, d in ((19, 7, 24), (132, 130, 33), (5, 3, 1200)):
            a, b = cases.randn(2, n, d, dtype=dtype).cuda(), cases.randn(2, m, d, seed=1, dtype=dtype).cuda()
            mtz_ext.neuron_distances(a, b)
        for channels, kernel, stride in ((5, 3, 2), (61, 3, 1), (72, 3, 1), (40, 5, 1)):
            x = cases.randn(2, channels, 9, 11, dtype=dtype).cuda()
            mtz_ext.conv2d_second_moment(x, kernel, stride, 1, check=False)
    for dtype in (torch.float32, torch.float64):
        for d, k in ((5, 3), (64, 20), (144, 17), (500, 70)):
            inverse = cases.damped_inverse(3, d=d, dtype=dtype).cuda()
            mtz_ext.sherman_morrison_(inverse, cases.randn(3, k, d, seed=1, dtype=dtype).cuda(), check=False)
        mtz_ext.match_neurons(cases.randn(2, 70, 99, dtype=dtype).cuda(), 40, "greedy", check=False)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
