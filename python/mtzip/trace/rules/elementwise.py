"""Element-wise operators, constants, and everything that leaves shape and order as they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import fx

from ..axes import Dim
from .registry import argument, rule, several, where

if TYPE_CHECKING:
    from ..analysis import Analysis


@rule("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "native_dropout")
@rule("contiguous", "clone", "detach", "alias", "to", "type_as", "_to_copy", "lift_fresh_copy", "float", "half")
@rule("softmax", "log_softmax", "_softmax", "_log_softmax", "celu", "selu", "hardswish", "hardtanh", "log_sigmoid")
@rule("hardswish_", "relu_", "silu_", "leaky_relu_", "hardtanh_", "elu_", "sigmoid_", "tanh_", "relu6", "relu6_")
@rule("celu_", "selu_", "hardsigmoid_", "mish_", "threshold_", "rrelu", "softplus", "softmin", "detach_")
def same_shape(analysis: Analysis, node: fx.Node) -> list[Dim]:
    """Output ordered as the first input."""
    return analysis.dims(node.args[0])


@rule(
    "zeros", "ones", "full", "zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full"
)
@rule("empty", "new_empty", "scalar_tensor", "fill", "zero")
def constant(analysis: Analysis, node: fx.Node) -> list[Dim]:
    """The same value everywhere: any order of it is as good."""
    return [analysis.uniform(node, at) for at in range(len(analysis.shape(node)))]


@rule("cumsum", "cumprod", "logcumsumexp", "cummax", "cummin", "flip", "roll", "tril", "triu")
def ordered(analysis: Analysis, node: fx.Node) -> list[Dim]:
    """Of the same shape, and fixes the order of the dimensions it runs along."""
    from .registry import name_of

    dims, name = list(analysis.dims(node.args[0])), name_of(node)
    if name in ("tril", "triu"):
        along = [len(dims) - 2, len(dims) - 1]
    elif name == "roll":
        along = several(argument(node, 2, "dims"), len(dims))
    else:
        along = several(argument(node, 1, "dims" if name == "flip" else "dim"), len(dims))
    for at in along:
        analysis.pin(dims[at], node, "depends on its order")
        dims[at] = None
    return [dims, dims] if name in ("cummax", "cummin") else dims


@rule("where", "addcmul", "addcdiv", "lerp", "masked_fill", "clamp", "fmod", "remainder", "bitwise_and", "logical_and")
def pointwise(analysis: Analysis, node: fx.Node) -> list[Dim]:
    """Element-wise with broadcasting: dimensions that meet are one axis."""
    operands = [arg for arg in node.all_input_nodes if analysis.shape(arg) is not None]
    return meet(analysis, node, [(analysis.shape(arg), analysis.dims(arg)) for arg in operands], analysis.shape(node))


def meet(analysis: Analysis, node: fx.Node, operands: list[tuple[list[int], list[Dim]]], shape: list[int]) -> list[Dim]:
    """Dimensions of the broadcast of operands, each given by its sizes and dimensions."""
    out: list[Dim] = []
    for position in range(-len(shape), 0):
        meeting = [
            dims[position]
            for sizes, dims in operands
            # a broadcast one gives every channel the same
            if -position <= len(sizes) and (sizes[position] != 1 or shape[position] == 1)
        ]
        joined = meeting[0] if meeting else None
        for dim in meeting[1:]:
            if shape[position] == 1:
                joined = joined or dim
            elif joined is not None or dim is not None:
                joined = analysis.axes.unify(joined, dim, where(node))
        out.append(joined)
    return out


@rule("copy")
def copy(analysis: Analysis, node: fx.Node) -> list[Dim]:
    """Takes the shape of its first tensor and the values of its second."""
    shape, values = analysis.shape(node), node.args[1]
    sizes = analysis.shape(values)
    fresh = len(shape) - len(sizes)
    return [
        analysis.dims(values)[at - fresh] if at >= fresh and sizes[at - fresh] == size else analysis.uniform(node, at)
        for at, size in enumerate(shape)
    ]


@rule("prelu", "_prelu_kernel")
def prelu(analysis: Analysis, node: fx.Node) -> list[Dim]:
    """A slope per channel (dimension 1), or one for all."""
    dims, slopes = analysis.dims(node.args[0]), analysis.shape(node.args[1])
    if slopes != [1]:
        analysis.use(node.args[1], len(slopes) - 1 if len(slopes) == 1 else 1, dims[min(1, len(dims) - 1)])
    return dims
