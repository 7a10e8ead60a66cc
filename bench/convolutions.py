"""Convolutions that train faster on a CPU: channels last, and those of few pixels as products."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

SMALL = 4  # height and width at most; measured on a Xeon with tile registers: 1.7 times the images a second for VGG-16


class CpuConvolutions(TorchFunctionMode):
    """Inside, 3 x 3 convolutions of few pixels on a CPU are one product of patches and weights.

    oneDNN reads all weights again for every image, which takes most of the time where a layer has 2.4 million of them
    and 2 x 2 pixels. Other convolutions get their pixels channels last, as oneDNN likes them: in float32 with AVX2 a
    step of ResNet-20 takes 0.65 to 0.8 of the time, one of VGG-16 at a quarter of the width 0.6 with both.
    """

    def __torch_function__(self, function: Any, types: Any, arguments: tuple = (), keywords: dict | None = None) -> Any:
        if function is F.conv2d and arguments and arguments[0].is_cpu and arguments[0].dim() == 4:
            if not keywords and _small(*arguments[:2], arguments[3:]):
                x, weight, bias = arguments[:3]
                if torch.is_autocast_enabled("cpu"):
                    to = torch.get_autocast_dtype("cpu")
                    x, weight, bias = x.to(to), weight.to(to), None if bias is None else bias.to(to)
                return _Product.apply(x, weight, bias)
            x = arguments[0].contiguous(memory_format=torch.channels_last)
            return function(x, *arguments[1:], **(keywords or {}))
        return function(*arguments, **(keywords or {}))


def _small(x: Tensor, weight: Tensor, settings: tuple) -> bool:
    """Whether it is a 3 x 3 convolution of stride 1 that keeps the size of few pixels."""
    plain = ((1, 1), (1, 1), (1, 1), 1)  # stride, padding, dilation, groups, as nn.Conv2d passes them
    return settings == plain and weight.shape[2:] == (3, 3) and max(x.shape[2:]) <= SMALL


class _Product(torch.autograd.Function):
    """Convolution of [n, C, H, W] with [O, C, 3, 3], padding 1, as a product of [n H W, 9 C] and [9 C, O]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        n, channels, height, width = x.shape
        padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
        patches = padded.unfold(1, 3, 1).unfold(2, 3, 1)  # [n, H, W, C, 3, 3]
        patches = patches.permute(0, 1, 2, 4, 5, 3).reshape(n * height * width, 9 * channels)
        rows = weight.permute(0, 2, 3, 1).reshape(len(weight), -1)
        ctx.save_for_backward(patches, rows)
        ctx.shape, ctx.bias = x.shape, bias is not None
        y = F.linear(patches, rows, bias)
        return y.view(n, height, width, -1).permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        patches, rows = ctx.saved_tensors
        n, channels, height, width = ctx.shape
        gradient = gradient.permute(0, 2, 3, 1).reshape(n * height * width, -1)
        weights = (gradient.T @ patches).view(-1, 3, 3, channels).permute(0, 3, 1, 2)
        to_patches = (gradient @ rows).view(n, height, width, 3, 3, channels)
        to_padded = gradient.new_zeros(n, height + 2, width + 2, channels)
        for down in range(3):
            for right in range(3):
                to_padded[:, down : down + height, right : right + width] += to_patches[:, :, :, down, right]
        return (
            to_padded[:, 1:-1, 1:-1].permute(0, 3, 1, 2),
            weights,
            _summed(gradient) if ctx.bias else None,
        )


def _summed(rows: Tensor) -> Tensor:
    """The sum over rows of half precision without its rounding."""
    return rows.sum(0, dtype=torch.promote_types(rows.dtype, torch.float32)).to(rows.dtype)
