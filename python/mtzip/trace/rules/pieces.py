"""Pieces: dimensions that are cut, put together, or picked from. A channel dimension becomes the axes of its pieces."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import fx

from ..axes import Dim
from .registry import argument, name_of, rule, where

if TYPE_CHECKING:
    from ..analysis import Analysis


def _between(analysis: Analysis, node: fx.Node, dim: Dim, start: int, end: int) -> Dim:
    """Elements ``start`` to ``end`` of a dimension."""
    piece = analysis.axes.cut(dim, end, where(node))[0]
    return analysis.axes.cut(piece, start, where(node))[1]


@rule("slice", "narrow", "slice_copy")
def cut(analysis: Analysis, node: fx.Node) -> list[Dim]:
    """Some neighbouring elements of a dimension; every second one fixes its order."""
    dims, sizes = list(analysis.dims(node.args[0])), analysis.shape(node.args[0])
    at = argument(node, 1, "dim", 0) % len(dims)
    length = analysis.shape(node)[at]
    if dims[at] is None or length == sizes[at]:
        return dims
    start, step = argument(node, 2, "start"), argument(node, 4, "step", 1)
    if analysis.axes.is_uniform(dims[at]):
        dims[at] = analysis.uniform(node, at)
    elif isinstance(start, fx.Node) or (name_of(node) != "narrow" and step != 1):
        analysis.pin(dims[at], node, "takes some of it")
        dims[at] = None
    else:
        start = min(max(0, start + sizes[at] if (start or 0) < 0 else start or 0), sizes[at])
        dims[at] = _between(analysis, node, dims[at], start, start + length)
    return dims


@rule("select", "select_copy")
def select(analysis: Analysis, node: fx.Node) -> list[Dim]:
    """One element of a dimension, which can then not change places with the others."""
    dims = list(analysis.dims(node.args[0]))
    at, index = node.args[1] % len(dims), node.args[2]
    if not node.users:
        pass  # of no consequence
    elif isinstance(index, int) and dims[at] is not None:
        index %= analysis.shape(node.args[0])[at]
        _between(analysis, node, dims[at], index, index + 1)
    else:
        analysis.pin(dims[at], node, "selects from it")
    return dims[:at] + dims[at + 1 :]


@rule("select_scatter", "slice_scatter")
def scatter(analysis: Analysis, node: fx.Node) -> list[Dim]:
    """A tensor with a piece of it replaced: what ``x[:, 2:5] = y`` leaves in x."""
    whole, piece = list(analysis.dims(node.args[0])), list(analysis.dims(node.args[1]))
    at = argument(node, 2, "dim", 0) % len(whole)
    size = analysis.shape(node)[at]
    if name_of(node) == "select_scatter":
        start, length, step, inside = node.args[3], 1, 1, None
        start = start + size if isinstance(start, int) and start < 0 else start
    else:
        start, step = argument(node, 3, "start") or 0, argument(node, 5, "step", 1)
        length, inside = analysis.shape(node.args[1])[at], piece.pop(at)
    own = whole.pop(at)
    out = [analysis.join(first, second, node) for first, second in zip(whole, piece, strict=True)]
    if own is not None and (isinstance(start, fx.Node) or (step != 1 and length < size)):
        analysis.pin(own, node, "writes into some of it")
        analysis.pin(inside, node, "is written into a part")
        own = None
    elif own is None:
        analysis.pin(inside, node, "joins it with a tensor of unknown order")
    elif length == size:
        own = analysis.join(inside, own, node) if inside is not None else own
    else:
        start = min(max(0, start + size if start < 0 else start), size)
        middle = _between(analysis, node, own, start, start + length)
        if name_of(node) == "slice_scatter":
            analysis.join(middle, inside, node)
    return [*out[:at], own, *out[at:]]


@rule("split", "split_with_sizes", "chunk", "unsafe_chunk", "unsafe_split", "tensor_split", "unbind")
def split(analysis: Analysis, node: fx.Node) -> list[list[Dim]]:
    """Pieces one behind the other."""
    dims = list(analysis.dims(node.args[0]))
    unbind = name_of(node) == "unbind"
    at = argument(node, 1 if unbind else 2, "dim", 0) % len(dims)
    outputs, rest = [], dims[at]
    for value in node.meta["val"]:
        length = 1 if unbind else value.shape[at]
        if rest is not None and not isinstance(length, int):
            analysis.pin(rest, node, "splits it")
            rest = None
        piece, rest = analysis.axes.cut(rest, length, where(node)) if rest is not None else (None, None)
        outputs.append([*dims[:at], *([] if unbind else [piece]), *dims[at + 1 :]])
    return outputs


@rule("glu")
def glu(analysis: Analysis, node: fx.Node) -> list[Dim]:
    """The first half of a dimension times a function of the second."""
    dims = list(analysis.dims(node.args[0]))
    at = argument(node, 1, "dim", -1) % len(dims)
    halves = analysis.axes.cut(dims[at], analysis.shape(node)[at], where(node))
    dims[at] = analysis.join(*halves, node)
    return dims


@rule("cat", "concat", "concatenate")
def cat(analysis: Analysis, node: fx.Node) -> list[Dim]:
    """One axis behind the other along ``dim``; the other dimensions are unified."""
    operands = [arg for arg in node.args[0] if analysis.shape(arg) != [0]]
    parts = [analysis.dims(arg) for arg in operands]
    at = argument(node, 1, "dim", 0) % len(parts[0])
    out: list[Dim] = []
    for position, meeting in enumerate(zip(*parts, strict=True)):
        if position == at:
            out.append(_chain(analysis, node, operands, meeting, at))
            continue
        joined = meeting[0]
        for dim in meeting[1:]:
            joined = analysis.join(joined, dim, node)
        out.append(joined)
    return out


def _chain(analysis: Analysis, node: fx.Node, operands: list[fx.Node], meeting: tuple[Dim, ...], at: int) -> Dim:
    if all(dim is None or not analysis.axes.is_free(dim) for dim in meeting):
        known = all(dim is not None for dim in meeting)
        return tuple(segment for dim in meeting for segment in dim) if known else None
    out: tuple = ()
    for operand, dim in zip(operands, meeting, strict=True):
        fixed = f"{where(node)} joins it with a tensor of unknown order"
        out += analysis.axes.new(analysis.shape(operand)[at], pinned=fixed) if dim is None else dim
    return out


@rule("stack")
def stack(analysis: Analysis, node: fx.Node) -> list[Dim]:
    """A new dimension over tensors that are unified."""
    parts = [analysis.dims(arg) for arg in node.args[0]]
    out: list[Dim] = []
    for meeting in zip(*parts, strict=True):
        joined = meeting[0]
        for dim in meeting[1:]:
            joined = analysis.join(joined, dim, node)
        out.append(joined)
    at = argument(node, 1, "dim", 0) % (len(out) + 1)
    return [*out[:at], None, *out[at:]]


@rule("index", "_unsafe_index")
def index(analysis: Analysis, node: fx.Node) -> list[Dim]:
    """Looked up by numbers: what is looked up along has a given order, what is not keeps its own."""
    dims = analysis.dims(node.args[0])
    kept, new_at, adjacent, position = [], None, True, 0
    previous = None
    for entry in node.args[1]:
        if entry is None:
            kept.append(dims[position])
            position += 1
            continue
        width = len(analysis.shape(entry)) if entry.meta["val"].dtype in (torch.bool, torch.uint8) else 1
        for dim in dims[position : position + width]:
            analysis.pin(dim, node, "looks up elements of it")
        adjacent &= previous is None or previous == position
        new_at = len(kept) if new_at is None else new_at
        position += width
        previous = position
    kept += dims[position:]
    new_at = new_at if adjacent and new_at is not None else 0
    fresh = [None] * (len(analysis.shape(node)) - len(kept))
    return [*kept[:new_at], *fresh, *kept[new_at:]]


@rule("index_select")
def index_select(analysis: Analysis, node: fx.Node) -> list[Dim]:
    """Looked up along one dimension."""
    dims = list(analysis.dims(node.args[0]))
    at = node.args[1] % len(dims)
    analysis.pin(dims[at], node, "looks up elements of it")
    dims[at] = None
    return dims


@rule("getitem")
def item(analysis: Analysis, node: fx.Node) -> list[Dim]:
    """One output of an operator with several."""
    return analysis.outputs(node.args[0])[node.args[1]]
