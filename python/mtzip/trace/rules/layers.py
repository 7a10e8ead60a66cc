"""Layers: products with a stored weight, embedding tables, recurrent layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import fx

from ..axes import Dim
from .attention import product
from .registry import argument, name_of, rule

if TYPE_CHECKING:
    from ..analysis import Analysis


@rule("linear")
def linear(analysis: Analysis, node: fx.Node) -> list[Dim]:
    """Reads the last dimension, writes a new one."""
    dims = analysis.dims(node.args[0])
    rows = analysis.layer(node, "linear", dict(input=0, weight=1, bias=2), reads=dims[-1])
    return [*dims[:-1], *([rows] if len(analysis.shape(node.args[1])) == 2 else [])]


@rule("mm", "matmul", "addmm")
def matmul(analysis: Analysis, node: fx.Node) -> list[Dim]:
    """A linear layer whose weight is stored [in, out], or a product of two tensors."""
    places = dict(input=1, weight=2, bias=0) if name_of(node) == "addmm" else dict(input=0, weight=1, bias=2)
    x, weight = node.args[places["input"]], node.args[places["weight"]]
    plain = argument(node, 3, "beta", 1) == 1 == argument(node, 4, "alpha", 1)
    one_bias = name_of(node) != "addmm" or len(analysis.shape(node.args[0])) == 1
    if analysis.is_parameter(weight) and len(analysis.shape(weight)) == 2 and plain and one_bias:
        dims = analysis.dims(x)
        rows = analysis.layer(node, "linear", places, reads=dims[-1], transposed=True)
        return [*dims[:-1], rows]
    return product(analysis, node)


@rule("conv1d", "conv2d", "conv3d")
def conv(analysis: Analysis, node: fx.Node) -> list[Dim]:
    """Reads dimension 1, writes a new one. Groups move as wholes; a depthwise convolution writes the axis it reads."""
    dims = analysis.dims(node.args[0])
    places = dict(input=0, weight=1, bias=2)
    rows = analysis.layer(node, name_of(node), places, reads=dims[1], groups=argument(node, 6, "groups", 1))
    return [dims[0], rows, *_positions(analysis, node, dims[2:])]


def _positions(analysis: Analysis, node: fx.Node, dims: list[Dim]) -> list[Dim]:
    """Spatial dimensions: a kernel of one position leaves them alone, any other runs along them."""
    same = analysis.shape(node)[2:] == analysis.shape(node.args[0])[2:]
    if same and all(size == 1 for size in analysis.shape(node.args[1])[2:]):
        return dims
    for dim in dims:
        analysis.pin(dim, node, "runs along it")
    return [None] * len(dims)


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def conv_transpose(analysis: Analysis, node: fx.Node) -> list[Dim]:
    """As a convolution; its weight is stored [in, out / groups, ...]."""
    dims = analysis.dims(node.args[0])
    places, groups = dict(input=0, weight=1, bias=2), argument(node, 6, "groups", 1)
    rows = analysis.layer(node, name_of(node), places, reads=dims[1], groups=groups, transposed=True)
    return [dims[0], rows, *_positions(analysis, node, dims[2:])]


@rule("embedding", "embedding_bag")
def embedding(analysis: Analysis, node: fx.Node) -> list[Dim]:
    """Rows of the table are looked up by number; its columns are an axis."""
    table, columns = node.args[0], analysis.dims(node.args[0])[1]
    analysis.use(table, 0, None)
    if analysis.is_parameter(table):
        analysis.tables.add(analysis.exported.tensors[table.name])
    if name_of(node) == "embedding_bag":
        return [[None, columns], *([None] * len(value.shape) for value in node.meta["val"][1:])]
    return [*analysis.dims(node.args[1]), columns]


@rule("_weight_norm", "_weight_norm_interface")
def weight_norm(analysis: Analysis, node: fx.Node) -> list[Dim]:
    """A direction scaled to a length, along one dimension."""
    direction, length = node.args[:2]
    dims, at = analysis.dims(direction), argument(node, 2, "dim", 0)
    analysis.use(length, at, dims[at])
    return [dims, [None] * len(dims)] if name_of(node) == "_weight_norm_interface" else dims


@rule("lstm", "gru", "rnn_tanh", "rnn_relu")
def recurrent(analysis: Analysis, node: fx.Node) -> list[list[Dim]] | list[Dim]:
    """Stays as it is; what its first layer reads may be reordered."""
    packed = not isinstance(node.args[2], (list, tuple))
    weights = node.args[3] if packed else node.args[2]
    owner = analysis.exported.tensors.get(weights[0].name, node.name).rpartition(".")[0] or name_of(node)
    analysis.note(owner, "a recurrent layer is not shared")
    analysis.unshared.update(analysis.exported.tensors.get(weight.name, "") for weight in weights)
    first = analysis.dims(node.args[0])[-1]
    settings = node.args[4 if packed else 3 :]  # has_biases, num_layers, dropout, train, bidirectional
    directions = 2 if settings[4] else 1
    each = len(weights) // (settings[1] * directions)
    for at, weight in enumerate(weights):
        if at % each == 0 and at < each * directions:
            analysis.use(weight, 1, first)
    for dim in analysis.dims(node.args[0])[:-1]:
        analysis.pin(dim, node, "runs along it")
    states = node.args[2 if packed else 1]
    for state in states if isinstance(states, (list, tuple)) else [states]:
        for dim in analysis.dims(state):
            analysis.pin(dim, node, "is recurrent and reads it as its state")
    return [[None] * len(value.shape) for value in node.meta["val"]]
