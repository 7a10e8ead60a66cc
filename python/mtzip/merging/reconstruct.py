"""Activation-aware targets: fit what the next layer sees, not the pre-activation itself.

Behind a ReLU a negative pre-activation may be anything negative, and behind a max-pooling only the winner counts. The
squared error after the activation is majorised at the current output y: where the original's z is what passes, the
target is z; elsewhere anything up to what does pass costs nothing, so the target is y itself, cut off there. Each
substitution is one more least-squares problem with the same matrix (majorise-minimise: never does the bound rise that
it minimises, the error of what passed in the original plus what exceeds it elsewhere, but for damping; the error after
the activation is no larger).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from ..distributed import total
from ..trace import rules
from ..trace.analysis import Analysis
from .moments import Moment, Target, View, at_least_float32

_POOLS = {"max_pool1d": 1, "max_pool2d": 2, "max_pool3d": 3}


@dataclass(frozen=True)
class Follow:
    """What comes behind a layer: a ReLU, and a max-pooling over windows that do not overlap (its window, else None)."""

    relu: bool
    window: tuple[int, ...] | None

    def __bool__(self) -> bool:
        return self.relu or self.window is not None


def following(analysis: Analysis, node: fx.Node) -> Follow:
    """Reads what follows ``node``, the output of a layer or of its BatchNorm, as long as nothing else reads it."""
    relu, window = False, None
    while len(node.users) == 1:
        node = next(iter(node.users))
        name = rules.name_of(node)
        if name == "relu" and not relu:
            relu = True
        elif name in _POOLS and window is None and (found := _window(node, _POOLS[name])) is not None:
            window = found
        elif name != "dropout":
            break
    return Follow(relu, window)


def _window(node: fx.Node, dimensions: int) -> tuple[int, ...] | None:
    def value(at: int, default):
        got = node.args[at] if len(node.args) > at else default
        got = [got] if isinstance(got, int) else list(got)
        return tuple(got * dimensions if len(got) == 1 else got)

    kernel = value(1, 1)
    plain = value(2, kernel) in (kernel, ()) and value(3, 0) == (0,) * dimensions and value(4, 1) == (1,) * dimensions
    return kernel if plain and not (len(node.args) > 5 and node.args[5]) else None


def substitute(y: Tensor, z: Tensor, follow: Follow) -> Tensor:
    """Targets for a layer whose output is now ``y`` and was ``z`` in the original, both [N, C, ...] or [..., C]."""
    passes = torch.ones_like(z, dtype=torch.bool)
    cap = torch.zeros_like(z) if follow.relu else torch.full_like(z, torch.inf)
    if follow.window is not None:
        dimensions = len(follow.window)
        pooled, where = getattr(F, f"max_pool{dimensions}d")(z, follow.window, return_indices=True)
        flat = torch.zeros(z.shape[:2] + (z[0, 0].numel(),), dtype=torch.bool, device=z.device)
        passes = flat.scatter_(2, where.flatten(2), True).view_as(z)
        top = pooled.clamp_min(0) if follow.relu else pooled
        for at, size in enumerate(follow.window):
            top = top.repeat_interleave(size, 2 + at)
        # Positions behind the last whole window are read by nobody: anything may stand there.
        cap = torch.full_like(z, torch.inf)
        cap[tuple(slice(0, size) for size in top.shape)] = top
    if follow.relu:
        passes &= z > 0
    return torch.where(passes, z, torch.minimum(y, cap))


def correction(
    view: View, inputs: Iterable[Tensor], outputs: Iterable[Tensor], targets: Iterable[Tensor], follow: Follow
) -> tuple[Tensor, Tensor, Tensor]:
    """Change of the target's moments by one substitution, from some chunks.

    Args:
        view: of the layer.
        inputs: what the layer reads in the zipped network.
        outputs: what it puts out now.
        targets: what it put out in the original.
        follow: what comes behind it.

    Returns:
        Change of the cross moment about zero, E[x (t - z)^T] [d, r], of the mean [r] and of the second moment [r].
    """
    count, cross, mean, square = 0, 0, 0, 0
    for x, y, z in zip(inputs, outputs, targets, strict=True):
        x, y, z = (at_least_float32(value) for value in (x, y, z))
        t = substitute(y, z, follow)
        change = t - z
        count += view.positions(x)
        cross = cross + view.cross_moment(x, change).double()
        mean = mean + view.rows(change).sum(0, dtype=torch.float64)
        square = square + view.rows(t.square() - z.square()).sum(0, dtype=torch.float64)
    count = total(count)
    return total(cross) / count, total(mean) / count, total(square) / count


def corrected(target: Target, moment: Moment, cross: Tensor, mean: Tensor, square: Tensor) -> Target:
    """A target whose moments have changed as :func:`correction` says; feature space."""
    new_mean = target.mean + mean
    variance = (target.variance + target.mean.square() + square - new_mean.square()).clamp_min(0)
    return Target(new_mean, variance, cross=target.cross + cross - torch.outer(moment.mean, mean))
