"""BatchNorm in a zip: folded into the layer before it for matching, then re-estimated and refitted for each task."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..distributed import total
from ..trace.analysis import Analysis, Norm
from .moments import at_least_float32


def folded_affine(analysis: Analysis, norm: Norm) -> tuple[Tensor, Tensor]:
    """Scale and shift [n] float64 that the original's BatchNorm applies in evaluation mode."""
    mean, variance = (analysis.exported.tensor(path).double() for path in (norm.mean, norm.variance))
    scale = (variance + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * analysis.exported.tensor(norm.weight).double()
    shift = -mean * scale
    if norm.bias is not None:
        shift = shift + analysis.exported.tensor(norm.bias).double()
    return scale, shift


def refit_norm_(
    analysis: Analysis, norm: Norm, network: nn.Module, mean: Tensor, variance: Tensor, slope: Tensor, target: Tensor
) -> None:
    """Sets statistics and affine of a BatchNorm of ``network`` so that it outputs the least-squares fit of a target.

    Args:
        mean, variance: of its input in the zipped network, [n].
        slope: covariance of its input with the target over the variance of its input, [n].
        target: mean of the target, [n].

    A channel whose input never varies keeps its scale.
    """
    with torch.no_grad():
        set_statistics_(analysis, norm, network, mean, variance)
        if norm.weight is not None:
            weight = analysis.exported.tensor(norm.weight, network)
            fitted = slope * (variance + norm.eps).sqrt()
            weight.copy_(torch.where(variance > 0, fitted, weight.double()))
        if norm.bias is not None:
            analysis.exported.tensor(norm.bias, network).copy_(target)


def set_statistics_(analysis: Analysis, norm: Norm, network: nn.Module, mean: Tensor, variance: Tensor) -> None:
    """Sets the running mean and variance [n] of a BatchNorm of ``network``."""
    with torch.no_grad():
        analysis.exported.tensor(norm.mean, network).copy_(mean)
        analysis.exported.tensor(norm.variance, network).copy_(variance)


def channel_statistics(inputs: list[Tensor], targets: list[Tensor] | None = None):
    """Mean and variance of every channel of chunks [N, C, ...], slope on and mean of a target. All [C] float64."""

    def rows(x: Tensor) -> Tensor:
        return at_least_float32(x).movedim(1, -1).reshape(-1, x.shape[1])

    count = total(sum(x.numel() // x.shape[1] for x in inputs))
    mean = total(sum(rows(x).sum(0, dtype=torch.float64) for x in inputs)) / count
    centred = [(x := rows(chunk)) - mean.to(x.dtype) for chunk in inputs]
    variance = total(sum(x.square().sum(0, dtype=torch.float64) for x in centred)) / count
    if targets is None:
        return mean, variance, None, None
    target = total(sum(rows(z).sum(0, dtype=torch.float64) for z in targets)) / count
    cross = total(sum((x * rows(z)).sum(0, dtype=torch.float64) for x, z in zip(centred, targets, strict=True))) / count
    slope = cross / torch.where(variance > 0, variance, torch.ones_like(variance))
    return mean, variance, slope, target
