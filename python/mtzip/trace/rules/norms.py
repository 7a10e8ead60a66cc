"""Normalisation layers: what their statistics are taken over may be in any order."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import fx

from ..axes import Dim
from .registry import name_of, rule, where

if TYPE_CHECKING:
    from ..analysis import Analysis


@rule("batch_norm", "instance_norm")
def channel_norm(analysis: Analysis, node: fx.Node) -> list[Dim]:
    """Statistics and affine of every channel by itself."""
    dims = list(analysis.dims(node.args[0]))
    for parameter in node.args[1:5]:
        if isinstance(parameter, fx.Node):
            analysis.use(parameter, 0, dims[1])
            dims[1] = dims[1] or analysis.dims(parameter)[0]
    if name_of(node) == "batch_norm":
        analysis.add_norm(node)
    return dims


@rule("layer_norm", "rms_norm")
def layer_norm(analysis: Analysis, node: fx.Node) -> list[Dim]:
    """Statistics over the last dimensions do not depend on their order; the affine lies on them."""
    dims = analysis.dims(node.args[0])
    count = len(node.args[1])
    for parameter in node.args[2:4]:
        if isinstance(parameter, fx.Node):
            for position in range(count):
                analysis.use(parameter, position, dims[len(dims) - count + position])
    return dims


@rule("group_norm")
def group_norm(analysis: Analysis, node: fx.Node) -> list[Dim]:
    """Groups may change places as wholes; one group, or one channel to a group, allows any order."""
    dims, groups = analysis.dims(node.args[0]), node.args[1]
    channels = analysis.shape(node.args[0])[1]
    if dims[1] is not None and 1 < groups < channels:
        blocks = analysis.axes.multiply(analysis.axes.new(groups), 1, channels // groups)
        analysis.axes.unify(dims[1], blocks, where(node))
    for parameter in node.args[2:4]:
        if isinstance(parameter, fx.Node):
            analysis.use(parameter, 0, dims[1])
    return dims
