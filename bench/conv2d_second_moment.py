"""conv2d_second_moment against unfolding and one product."""

from __future__ import annotations

import argparse
from unittest import mock

import torch
import torch.nn.functional as F

import mtz_ext
from bench import timer
from mtz_ext import reference
from tests import cases

NAME = "conv2d_second_moment"
HELP = "second moment of a convolution's input: against unfold + product"
ORDER = 3

# samples, channels, image side, kernel, stride, padding
SHAPES = [
    (64, 64, 32, 3, 1, 1),
    (128, 128, 16, 3, 1, 1),
    (128, 256, 8, 3, 1, 1),
    (64, 512, 8, 3, 1, 1),
    (64, 64, 32, 3, 2, 1),
    (16, 3, 64, 7, 2, 3),
]


def unfold(x: torch.Tensor, kernel: int, stride: int, padding: int) -> torch.Tensor:
    """All patches side by side, times their transpose."""
    patches = F.unfold(x, kernel, 1, padding, stride).transpose(0, 1).flatten(1)
    return patches @ patches.mT


def workspace(x: torch.Tensor, *arguments: int) -> int:
    """Bytes that mtz_ext takes beside the result."""
    taken = []

    def empty(*size: object, **settings: object) -> torch.Tensor:
        out = real(*size, **settings)
        taken.append(out.nbytes if out.dtype == torch.uint8 else 0)
        return out

    real = torch.empty
    with mock.patch.object(torch, "empty", empty):
        mtz_ext.conv2d_second_moment(x, *arguments)
    return sum(taken)


def run(options: argparse.Namespace) -> list[timer.Row]:
    """Time, error relative to the diagonal, working memory relative to the input."""
    rows, check = [], not timer.on_gpu(options)  # a check waits for the device
    for n, c, side, *arguments in [(16, 64, 16, 3, 1, 1), (32, 128, 8, 3, 1, 1)] if options.quick else SHAPES:
        x = cases.randn(n, c, side, side, device=options.device)
        ways = {
            "mtz_ext": lambda x=x, a=arguments: mtz_ext.conv2d_second_moment(x, *a, check=check),
            "unfold + product": lambda x=x, a=arguments: unfold(x, *a),
        }
        few = x[:4]
        exact = reference.conv2d_second_moment(few, *arguments)
        scale = exact.abs().max()
        wrong = {
            "mtz_ext": ((mtz_ext.conv2d_second_moment(few, *arguments) - exact).abs().max() / scale).item(),
            "unfold + product": ((unfold(few, *arguments) - exact[0]).abs().max() / scale).item(),
        }
        kernel, stride, padding = arguments
        out = (side + 2 * padding - kernel) // stride + 1
        flops = 2.0 * n * out**2 * (c * kernel**2) ** 2
        share = workspace(x, *arguments) / x.nbytes
        case = f"{n} x {c} x {side} x {side}, {kernel} x {kernel} / {stride}, memory {share:.1f} x input"
        target = {"unfold + product": "ratio must 3, aim 6" if (kernel, stride) == (3, 1) else ""}
        rows += timer.rows_of(NAME, case, ways, timer.Work(flops), options, wrong, target)
    return timer.report(rows, options)
