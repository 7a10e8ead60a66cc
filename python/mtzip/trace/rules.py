"""One rule per ATen operator: what it does to the axes of its inputs.

A rule takes the analysis and a node and returns the dimensions of the node's output. An operator without a rule pins
the atoms of its inputs, so that the layers around it stay private, and is noted: never an error, never a silent guess.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import fx

from .axes import Dim, Segment

if TYPE_CHECKING:
    from .analysis import Analysis

aten = torch.ops.aten
Rule = Callable[["Analysis", fx.Node], list[Dim]]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers a rule for ATen operators by name, overloads together."""

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
        return function

    return register


def name_of(node: fx.Node) -> str:
    """``conv2d`` for aten.conv2d.default; the printed target for anything that is not an ATen operator."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[-1]
    return getattr(target, "__name__", str(target))


def find(node: fx.Node) -> Rule | None:
    """The rule for a node: by name, or the element-wise one for every operator that torch tags as such."""
    named = RULES.get(name_of(node))
    if named is None and isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags:
        return pointwise
    return named


# -- element-wise --------------------------------------------------------------------------------------------------


@rule(
    "dropout",
    "feature_dropout",
    "alpha_dropout",
    "feature_alpha_dropout",
    "contiguous",
    "clone",
    "detach",
    "alias",
    "to",
    "_to_copy",
)
@rule("softmax", "log_softmax", "_softmax", "_log_softmax", "cumsum", "celu", "selu", "lift_fresh_copy")
@rule("hardswish_", "relu_", "silu_", "leaky_relu_", "hardtanh_", "elu_", "sigmoid_", "tanh_", "relu6", "relu6_")
@rule("hardswish", "zeros_like", "ones_like", "full_like", "empty_like")
@rule("celu_", "selu_", "hardsigmoid_", "mish_", "threshold_", "rrelu", "log_sigmoid", "softplus", "hardtanh")
def same_shape(analysis: Analysis, node: fx.Node) -> list[Dim]:
    """Output ordered as the first input."""
    return analysis.dims(node.args[0])


@rule("new_zeros", "new_ones", "new_full", "new_empty")
def constant(analysis: Analysis, node: fx.Node) -> list[Dim]:
    """Takes the type of its input and none of its values."""
    return [None] * len(analysis.shape(node))


def pointwise(analysis: Analysis, node: fx.Node) -> list[Dim]:
    """Element-wise with broadcasting: dimensions that meet are one axis."""
    operands = [arg for arg in node.all_input_nodes if analysis.shape(arg) is not None]
    shape = analysis.shape(node)
    where = f"{name_of(node)} ({node.name})"
    out: list[Dim] = []
    for position in range(-len(shape), 0):
        known: list[Dim] = []
        unknown = False
        for arg in operands:
            their = analysis.shape(arg)
            if -position > len(their) or (their[position] == 1 and shape[position] != 1):
                continue  # broadcast: every channel gets the same
            if analysis.is_parameter(arg):
                known.append(analysis.parameter_dim(arg, len(their) + position))
                continue
            dim = analysis.dims(arg)[position]
            unknown |= dim is None
            known += [dim] if dim is not None else []
        streams = [dim for dim in known if dim != ()]
        if not streams:
            out.append(None)
            continue
        joined = streams[0]
        for dim in streams[1:]:
            joined = analysis.axes.unify(joined, dim, where)
        if unknown:
            analysis.axes.pin(joined, f"{where} joins it with a tensor of unknown order")
        for arg in operands:
            their = analysis.shape(arg)
            if analysis.is_parameter(arg) and -position <= len(their) and their[position] == shape[position]:
                analysis.use(arg, len(their) + position, joined)
        out.append(joined)
    return out


@rule("prelu")
def prelu(analysis: Analysis, node: fx.Node) -> list[Dim]:
    """A slope per channel (dimension 1), or one for all."""
    dims = analysis.dims(node.args[0])
    if analysis.shape(node.args[1]) != [1]:
        analysis.use(node.args[1], 0, dims[1])
    return dims


# -- normalisation -------------------------------------------------------------------------------------------------


@rule("batch_norm", "instance_norm")
def channel_norm(analysis: Analysis, node: fx.Node) -> list[Dim]:
    """Statistics and affine of every channel by itself."""
    dims = analysis.dims(node.args[0])
    for parameter in node.args[1:5]:
        if parameter is not None:
            analysis.use(parameter, 0, dims[1])
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
                if dims[len(dims) - count + position] is not None:
                    analysis.use(parameter, position, dims[len(dims) - count + position])
    return dims


# -- layers --------------------------------------------------------------------------------------------------------


@rule("linear")
def linear(analysis: Analysis, node: fx.Node) -> list[Dim]:
    """Reads the last dimension, writes a new one."""
    dims = analysis.dims(node.args[0])
    out = analysis.layer(node, reads=dims[-1], features=analysis.shape(node.args[0])[-1])
    return [*dims[:-1], out]


@rule("conv1d", "conv2d", "conv3d")
def conv(analysis: Analysis, node: fx.Node) -> list[Dim]:
    """Reads dimension 1, writes a new one; a depthwise one passes its axis through."""
    dims = analysis.dims(node.args[0])
    channels = analysis.shape(node.args[0])[1]
    groups = node.args[6] if len(node.args) > 6 else node.kwargs.get("groups", 1)
    out_channels = analysis.shape(node.args[1])[0]
    rest: list[Dim] = [None] * (len(dims) - 2)
    if groups == 1:
        return [dims[0], analysis.layer(node, reads=dims[1], features=channels), *rest]
    if groups == channels == out_channels and dims[1] is not None:
        for parameter in node.args[1:3]:
            if parameter is not None:
                analysis.use(parameter, 0, dims[1])
        analysis.note(node, "a depthwise convolution is not shared")
        return [dims[0], dims[1], *rest]
    analysis.pin(dims[1], node, "is a grouped convolution and fixes its order")
    analysis.note(node, "a grouped convolution is not shared")
    return [dims[0], analysis.axes.new(out_channels, pinned=f"written by grouped convolution {node.name}"), *rest]


# -- pooling and reduction -----------------------------------------------------------------------------------------


@rule("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d")
@rule("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "_adaptive_avg_pool2d")
@rule("adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d", "upsample_nearest2d", "upsample_bilinear2d")
def pool(analysis: Analysis, node: fx.Node) -> list[Dim]:
    """Channel by channel; spatial dimensions carry no axis."""
    dims = analysis.dims(node.args[0])
    return [dims[0], dims[1], *[None] * (len(dims) - 2)]


@rule("mean", "sum", "amax", "amin", "logsumexp", "var", "std")
def reduce(analysis: Analysis, node: fx.Node) -> list[Dim]:
    """Reducing a dimension does not depend on its order."""
    dims = analysis.dims(node.args[0])
    which = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    if which is None or which == [] or isinstance(which, bool):  # var(x, unbiased) reduces everything
        return [None] * len(analysis.shape(node))
    which = {at % len(dims) for at in ([which] if isinstance(which, int) else which)}
    keep = len(analysis.shape(node)) == len(dims)
    return [None if at in which else dim for at, dim in enumerate(dims) if keep or at not in which]


@rule("max", "min")
def extreme(analysis: Analysis, node: fx.Node) -> list[Dim]:
    """Of everything, along one dimension (values and indices), or of two tensors."""
    if len(node.args) < 2:
        return [None] * len(analysis.shape(node))
    if isinstance(node.args[1], fx.Node):
        return pointwise(analysis, node)
    dims = analysis.dims(node.args[0])
    at = node.args[1] % len(dims)
    keep = len(node.args) > 2 and node.args[2]
    return [*dims[:at], *([None] if keep else []), *dims[at + 1 :]]


@rule("constant_pad_nd", "pad")
def pad(analysis: Analysis, node: fx.Node) -> list[Dim]:
    """Constants before and behind: on an axis, segments of their own that may be in any order."""
    dims = list(analysis.dims(node.args[0]))
    widths = list(node.args[1])
    constant = name_of(node) == "constant_pad_nd" or (node.args[2:3] or [node.kwargs.get("mode", "constant")])[0] == (
        "constant"
    )
    for at in range(len(widths) // 2):
        before, after = widths[2 * at : 2 * at + 2]
        position = len(dims) - 1 - at
        dim = dims[position]
        if dim is None or (before == 0 and after == 0):
            continue
        if not constant or not all(isinstance(width, int) for width in (before, after)):
            analysis.pin(dim, node, "pads it")
            dims[position] = None
            continue
        where = f"{name_of(node)} ({node.name})"
        if before < 0:
            dim = analysis.axes.cut(dim, -before, where)[1]
        if after < 0:
            dim = analysis.axes.cut(dim, analysis.axes.size(dim) + after, where)[0]
        parts = [analysis.axes.new(width, uniform=True) if width > 0 else () for width in (before, after)]
        dims[position] = (*parts[0], *dim, *parts[1])
    return dims


# -- shape ---------------------------------------------------------------------------------------------------------


@rule("view", "reshape", "_unsafe_view", "flatten", "squeeze", "unsqueeze", "unflatten", "view_copy")
def reshape(analysis: Analysis, node: fx.Node) -> list[Dim]:
    """Merges and splits neighbouring dimensions; a product of one axis with positions keeps the axis."""
    dims = analysis.dims(node.args[0])
    before, after = analysis.shape(node.args[0]), analysis.shape(node)
    out: list[Dim] = [None] * len(after)
    for ins, outs in _groups(before, after):
        wide_in = [at for at in ins if before[at] != 1]
        wide_out = [at for at in outs if after[at] != 1]
        if len(wide_in) == 1 and len(wide_out) == 1:
            out[wide_out[0]] = dims[wide_in[0]]
        elif not wide_in and len(ins) == 1 and len(outs) == 1:
            out[outs[0]] = dims[ins[0]]
        elif len(wide_out) == 1 and 0 not in ins:
            out[wide_out[0]] = _product(analysis, [(dims[at], before[at]) for at in wide_in], node)
        else:
            for at in wide_in:
                analysis.pin(dims[at], node, "reshapes it")
    return out


def _groups(before: Sequence[int], after: Sequence[int]):
    """Neighbouring dimensions of ``before`` and ``after`` with equal products, as pairs of index lists."""
    i = j = 0
    while i < len(before) or j < len(after):
        ins, outs = [], []
        left = right = 1
        if i < len(before):
            ins, left, i = [i], before[i], i + 1
        if j < len(after):
            outs, right, j = [j], after[j], j + 1
        while left != right and (i < len(before) or j < len(after)):
            if (left < right and i < len(before)) or j >= len(after):
                left, i = left * before[i], i + 1
                ins.append(i - 1)
            else:
                right, j = right * after[j], j + 1
                outs.append(j - 1)
        yield ins, outs


def _product(analysis: Analysis, factors: list[tuple[Dim, int]], node: fx.Node) -> Dim:
    axes = analysis.axes
    free = [at for at, (dim, _) in enumerate(factors) if axes.is_free(dim)]
    if not free:
        return _fixed_product(analysis, factors)
    if len(free) > 1:
        for dim, _ in factors:
            analysis.pin(dim, node, "multiplies two axes")
        return None
    at = free[0]
    outer = inner = 1
    for position, (_, size) in enumerate(factors):
        outer *= size if position < at else 1
        inner *= size if position > at else 1
    dim = factors[at][0]
    if len(dim) > 1 and outer > 1:
        analysis.pin(dim, node, "repeats a concatenation")
        return None
    return tuple(Segment(s.atom, s.outer * outer, s.inner * inner) for s in dim)


def _fixed_product(analysis: Analysis, factors: list[tuple[Dim, int]]) -> Dim:
    """A product of dimensions whose order is given: it corresponds between tasks if each factor does."""
    labels, total = [], 1
    for dim, size in factors:
        total *= size
        atom = analysis.axes[dim[0].atom] if dim is not None and len(dim) == 1 else None
        labels.append(atom.label if atom else None)
    if all(dim is None for dim, _ in factors):
        return None
    label = "*".join(f"{name}[{size}]" for name, (_, size) in zip(labels, factors, strict=True))
    known = any(labels)
    return analysis.axes.new(total, label if known else None, "its order is given by the input")


@rule("permute", "transpose", "t", "numpy_T", "movedim")
def permute(analysis: Analysis, node: fx.Node) -> list[Dim]:
    """Dimensions change places."""
    dims = list(analysis.dims(node.args[0]))
    name = name_of(node)
    if name == "permute":
        return [dims[at] for at in node.args[1]]
    if name in ("t", "numpy_T"):
        return dims[::-1]
    if name == "movedim":
        return [analysis.pin(dim, node, "moves it") for dim in dims]
    first, second = node.args[1], node.args[2]
    dims[first], dims[second] = dims[second], dims[first]
    return dims


@rule("slice", "select")
def cut(analysis: Analysis, node: fx.Node) -> list[Dim]:
    """A piece of a spatial dimension; a piece of an axis fixes its order."""
    dims = list(analysis.dims(node.args[0]))
    at = (node.args[1] if len(node.args) > 1 else 0) % len(dims)
    if name_of(node) == "select":
        analysis.pin(dims[at], node, "selects from it")
        return dims[:at] + dims[at + 1 :]
    if analysis.shape(node.args[0])[at] != analysis.shape(node)[at]:
        analysis.pin(dims[at], node, "slices it")
        dims[at] = None
    return dims


@rule("split", "split_with_sizes", "chunk", "unsafe_chunk", "unbind")
def split(analysis: Analysis, node: fx.Node) -> list[Dim]:
    """Pieces of a spatial dimension; pieces of an axis fix its order."""
    dims = list(analysis.dims(node.args[0]))
    unbind = name_of(node) == "unbind"
    at = 1 if unbind else 2
    at = (node.args[at] if len(node.args) > at else node.kwargs.get("dim", 0)) % len(dims)
    analysis.pin(dims[at], node, "splits it")
    return [*dims[:at], *([] if unbind else [None]), *dims[at + 1 :]]


@rule("getitem")
def item(analysis: Analysis, node: fx.Node) -> list[Dim]:
    """One output of an operator with several: found when that was visited."""
    return analysis.dims(node)


@rule("cat", "concat", "concatenate")
def cat(analysis: Analysis, node: fx.Node) -> list[Dim]:
    """One axis behind the other along ``dim``; the other dimensions are unified."""
    parts = [analysis.dims(arg) for arg in node.args[0]]
    at = (node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)) % len(parts[0])
    out: list[Dim] = []
    for position, meeting in enumerate(zip(*parts, strict=True)):
        if position == at:
            if any(dim is None for dim in meeting):
                for dim in meeting:
                    analysis.pin(dim, node, "concatenates it with a tensor of unknown order")
                out.append(None)
            else:
                out.append(tuple(segment for dim in meeting for segment in dim))
            continue
        joined = meeting[0]
        for dim in meeting[1:]:
            if joined is not None or dim is not None:
                joined = analysis.axes.unify(joined, dim, node.name)
        out.append(joined)
    return out
