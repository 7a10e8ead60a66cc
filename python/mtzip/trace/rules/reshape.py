"""Views: dimensions that are merged, split, exchanged, repeated or padded."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from torch import fx

from ..axes import Dim
from .registry import argument, name_of, rule, where

if TYPE_CHECKING:
    from ..analysis import Analysis


@rule("view", "reshape", "_unsafe_view", "flatten", "squeeze", "unsqueeze", "unflatten", "view_copy", "view_as")
@rule("reshape_as", "unsqueeze_copy", "squeeze_copy")
def reshape(analysis: Analysis, node: fx.Node) -> list[Dim]:
    """Merges and splits neighbouring dimensions; an axis that is split keeps an order along one of its parts."""
    dims = analysis.dims(node.args[0])
    before, after = analysis.shape(node.args[0]), analysis.shape(node)
    out: list[Dim] = [None] * len(after)
    if 0 in before:
        return out
    if math.prod(before) != math.prod(after):  # a size that depends on values: only what stays at the end is known
        at = 1
        while at <= min(len(before), len(after)) and before[-at] == after[-at]:
            out[-at] = dims[-at]
            at += 1
        for dim in dims[: len(dims) - at + 1]:
            analysis.pin(dim, node, "reshapes it to sizes that depend on values")
        return out
    for ins, outs in _groups(before, after):
        wide_in = [at for at in ins if before[at] != 1] or ins[:1]
        wide_out = [at for at in outs if after[at] != 1] or outs[:1]
        if len(wide_in) == 1 and len(wide_out) == 1:
            out[wide_out[0]] = dims[wide_in[0]]
        elif wide_in and wide_out:
            merged = merge(analysis, node, [(dims[at], before[at]) for at in wide_in], fixed=0 not in ins)
            parts = split(analysis, node, merged, [after[at] for at in wide_out], fixed=0 not in ins)
            for at, part in zip(wide_out, parts, strict=True):
                out[at] = part
    return out


def _groups(before: Sequence[int], after: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
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


def merge(analysis: Analysis, node: fx.Node, factors: list[tuple[Dim, int]], fixed: bool = True) -> Dim:
    """The product of dimensions, given with their sizes; only one of them can keep its order.

    ``fixed``: none of them is the batch, so that where all have a given order, so has the product.
    """
    if len(factors) == 1:
        return factors[0][0]
    free = [at for at, (dim, _) in enumerate(factors) if analysis.axes.is_free(dim)]
    if not free:
        return _fixed_product(analysis, factors) if fixed else None
    # What a layer writes before what is only a parameter's, then the larger one.
    kept = max(free, key=lambda at: (analysis.is_written(factors[at][0]), factors[at][1], -at))
    for at in free:
        if at != kept:
            analysis.pin(factors[at][0], node, "multiplies it with another axis")
    outer = math.prod(size for _, size in factors[:kept])
    inner = math.prod(size for _, size in factors[kept + 1 :])
    return analysis.axes.multiply(factors[kept][0], outer, inner)


def _fixed_product(analysis: Analysis, factors: list[tuple[Dim, int]]) -> Dim:
    """A product of dimensions whose order is given: it corresponds between tasks if each factor does."""
    axes, total = analysis.axes, math.prod(size for _, size in factors)
    if all(axes.is_uniform(dim) for dim, _ in factors):
        return axes.new(total, uniform=True)
    labels = [axes[dim[0].atom].label if dim is not None and len(dim) == 1 else None for dim, _ in factors]
    if not any(labels):
        return None
    label = "*".join(f"{name}[{size}]" for name, (_, size) in zip(labels, factors, strict=True))
    return axes.new(total, label, "its order is given by the input")


def split(analysis: Analysis, node: fx.Node, dim: Dim, sizes: list[int], fixed: bool = True) -> list[Dim]:
    """A dimension as several of the given sizes: one of them keeps an order, the others have a given one."""
    axes = analysis.axes
    if len(sizes) == 1:
        return [dim]
    if dim is None:
        return [None] * len(sizes)
    if axes.is_uniform(dim):
        return [axes.new(size, uniform=True) for size in sizes]
    if axes.is_free(dim):
        return analysis.grid(node, dim, sizes)
    label = axes[dim[0].atom].label if len(dim) == 1 else None
    if label is None or not fixed:
        return [None] * len(sizes)
    names = [f"{label}/{'x'.join(map(str, sizes))}.{at}" for at in range(len(sizes))]
    return [axes.new(size, name, axes.why_pinned(dim)) for size, name in zip(sizes, names, strict=True)]


@rule("permute", "transpose", "t", "numpy_T", "movedim", "swapaxes", "mT", "adjoint")
def permute(analysis: Analysis, node: fx.Node) -> list[Dim]:
    """Dimensions change places."""
    dims = list(analysis.dims(node.args[0]))
    name = name_of(node)
    if name == "permute":
        return [dims[at] for at in node.args[1]]
    if name in ("t", "numpy_T"):
        return dims[::-1]
    if name == "movedim":
        return _moved(dims, *node.args[1:3])
    first, second = node.args[1:3] if name in ("transpose", "swapaxes") else (-2, -1)
    dims[first], dims[second] = dims[second], dims[first]
    return dims


def _moved(dims: list[Dim], source: int | Sequence[int], target: int | Sequence[int]) -> list[Dim]:
    pairs = [(source, target)] if isinstance(source, int) else list(zip(source, target, strict=True))
    places = {to % len(dims): at % len(dims) for at, to in pairs}
    rest = iter(at for at in range(len(dims)) if at not in places.values())
    return [dims[places[to] if to in places else next(rest)] for to in range(len(dims))]


@rule("expand", "expand_as", "broadcast_to", "expand_copy")
def expand(analysis: Analysis, node: fx.Node) -> list[Dim]:
    """Repeats dimensions of size 1, whose elements are then all the same."""
    dims, before, after = analysis.dims(node.args[0]), analysis.shape(node.args[0]), analysis.shape(node)
    new = len(after) - len(before)
    return [
        dims[at - new] if at >= new and before[at - new] == size else analysis.uniform(node, at)
        for at, size in enumerate(after)
    ]


@rule("repeat", "tile")
def repeat(analysis: Analysis, node: fx.Node) -> list[Dim]:
    """Dimensions one behind the other, several times."""
    dims, before, after = analysis.dims(node.args[0]), analysis.shape(node.args[0]), analysis.shape(node)
    new = len(after) - len(before)
    out = [analysis.uniform(node, at) for at in range(new)]
    for at, dim in enumerate(dims):
        if before[at] == 1 and after[new + at] != 1:
            out.append(analysis.uniform(node, new + at))
        else:
            out.append(analysis.axes.multiply(dim, after[new + at] // before[at], 1))
    return out


@rule("repeat_interleave")
def repeat_interleave(analysis: Analysis, node: fx.Node) -> list[Dim]:
    """Every element of a dimension several times: the key and value heads of grouped queries."""
    times, at = argument(node, 1, "repeats"), argument(node, 2, "dim")
    if not isinstance(times, int) or at is None:
        return analysis.unknown(node)
    dims = list(analysis.dims(node.args[0]))
    dims[at] = analysis.axes.multiply(dims[at], 1, times)
    return dims


@rule("pixel_shuffle", "channel_shuffle", "native_channel_shuffle", "pixel_unshuffle", "im2col", "col2im")
def shuffle(analysis: Analysis, node: fx.Node) -> list[Dim]:
    """Channels that become pixels, pixels that become channels, and groups of channels dealt out in turn."""
    dims, before, after = analysis.dims(node.args[0]), analysis.shape(node.args[0]), analysis.shape(node)
    name, at = name_of(node), 1
    if name.endswith("channel_shuffle"):
        sizes = [node.args[1], before[1] // node.args[1]]
        parts = split(analysis, node, dims[1], sizes)
        channels = merge(analysis, node, [(parts[1], sizes[1]), (parts[0], sizes[0])])
        return [dims[0], channels, *dims[2:]]
    at = len(dims) - 3 if name.startswith("pixel") else 1
    if after[at] < before[at]:
        channels, inside = split(analysis, node, dims[at], [after[at], before[at] // after[at]])
        analysis.pin(inside, node, "makes positions of it")
    else:
        channels = analysis.axes.multiply(dims[at], 1, after[at] // before[at])
    return [*dims[:at], channels, *[None] * (len(after) - at - 1)]


@rule("constant_pad_nd", "pad")
def pad(analysis: Analysis, node: fx.Node) -> list[Dim]:
    """Constants before and behind: on an axis, segments of their own that may be in any order."""
    dims, axes = list(analysis.dims(node.args[0])), analysis.axes
    widths = list(node.args[1])
    constant = name_of(node) == "constant_pad_nd" or argument(node, 2, "mode", "constant") == "constant"
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
        if before < 0:
            dim = axes.cut(dim, -before, where(node))[1]
        if after < 0:
            dim = axes.cut(dim, axes.size(dim) + after, where(node))[0]
        parts = [axes.new(width, uniform=True) if width > 0 else () for width in (before, after)]
        dims[position] = (*parts[0], *dim, *parts[1])
    return dims
