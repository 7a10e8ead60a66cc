"""Pooling and reductions: channel by channel, or over dimensions whose order then does not matter."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import fx

from ..axes import Dim
from .elementwise import pointwise
from .registry import argument, name_of, rule, several

if TYPE_CHECKING:
    from ..analysis import Analysis

_SPACES = ("1d", "2d", "3d")


@rule(*(f"{kind}_pool{space}" for kind in ("max", "avg", "adaptive_avg", "_adaptive_avg", "lp") for space in _SPACES))
@rule("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_linear1d", "upsample_bilinear2d")
@rule("upsample_bicubic2d", "upsample_trilinear3d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa")
@rule("_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "grid_sampler", "grid_sampler_2d", "grid_sampler_3d")
@rule("reflection_pad1d", "reflection_pad2d", "replication_pad1d", "replication_pad2d")
def pool(analysis: Analysis, node: fx.Node) -> list[Dim]:
    """Channel by channel; spatial dimensions carry no axis."""
    dims = list(analysis.dims(node.args[0]))
    space = next((int(c) for c in reversed(name_of(node)) if c.isdigit()), len(dims) - 2)
    for at in range(len(dims) - space, len(dims)):
        analysis.pin(dims[at], node, "pools over it")
    return [*dims[: len(dims) - space], *[None] * space]


@rule(*(f"{kind}_pool{space}" for kind in ("adaptive_max", "fractional_max") for space in _SPACES))
@rule("max_pool2d_with_indices", "max_pool3d_with_indices", "max_pool1d_with_indices")
def pool_and_places(analysis: Analysis, node: fx.Node) -> list[list[Dim]]:
    """The same, and where the values were."""
    return [pool(analysis, node)] * 2


def _reduced(analysis: Analysis, node: fx.Node, which: list[int], shape: list[int]) -> list[Dim]:
    dims = analysis.dims(node.args[0])
    keep = len(shape) == len(dims)
    return [None if at in which else dim for at, dim in enumerate(dims) if keep or at not in which]


@rule("mean", "sum", "amax", "amin", "logsumexp", "var", "std", "prod", "any", "all")
@rule("linalg_vector_norm", "norm", "frobenius_norm", "var_mean", "std_mean", "nansum", "nanmean")
def reduce(analysis: Analysis, node: fx.Node) -> list[Dim] | list[list[Dim]]:
    """Reducing a dimension does not depend on its order."""
    dims = analysis.dims(node.args[0])
    which = argument(node, 2 if name_of(node) in ("linalg_vector_norm", "norm") else 1, "dim")
    which = several(None if isinstance(which, bool) else which, len(dims))  # var(x, unbiased) reduces everything
    value = node.meta["val"]
    if isinstance(value, (tuple, list)):
        return [_reduced(analysis, node, which, list(part.shape)) for part in value]
    return _reduced(analysis, node, which, list(value.shape))


@rule("max", "min", "median", "mode")
def extreme(analysis: Analysis, node: fx.Node) -> list[Dim] | list[list[Dim]]:
    """Of everything, along one dimension (values and places), or of two tensors."""
    which = argument(node, 1, "dim")
    if isinstance(which, fx.Node):
        return pointwise(analysis, node)
    if which is None:
        return []
    dims = analysis.dims(node.args[0])
    at = which % len(dims)
    if any(user.args[1] == 1 for user in node.users):
        analysis.pin(dims[at], node, "says where on it")
    return [_reduced(analysis, node, [at], list(value.shape)) for value in node.meta["val"]]


@rule("argmax", "argmin")
def place(analysis: Analysis, node: fx.Node) -> list[Dim]:
    """Where the largest value is depends on the order."""
    dims = analysis.dims(node.args[0])
    which = several(argument(node, 1, "dim"), len(dims))
    for at in which:
        analysis.pin(dims[at], node, "says where on it")
    return _reduced(analysis, node, which, analysis.shape(node))
