"""Products of tensors: attention, matrix products, einsum. What is summed over is one axis."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import fx

from ..axes import Dim
from .elementwise import meet
from .registry import argument, name_of, rule, where

if TYPE_CHECKING:
    from ..analysis import Analysis


@rule("bmm", "baddbmm", "dot", "mv")
def product(analysis: Analysis, node: fx.Node) -> list[Dim]:
    """A matrix product of two tensors, batches broadcast; ``addmm`` and ``baddbmm`` add a third."""
    added = name_of(node) in ("addmm", "baddbmm")
    first, second = node.args[1:3] if added else node.args[:2]
    a, b = analysis.dims(first), analysis.dims(second)
    sizes_a, sizes_b = analysis.shape(first), analysis.shape(second)
    analysis.join(a[-1], b[-2] if len(b) > 1 else b[0], node)
    shape = analysis.shape(node)
    kept = ([a[-2]] if len(a) > 1 else []) + ([b[-1]] if len(b) > 1 else [])
    batch = shape[: len(shape) - len(kept)]
    out = meet(analysis, node, [(sizes_a[:-2], a[:-2]), (sizes_b[:-2], b[:-2])], batch) + kept
    if added:
        out = meet(analysis, node, [(shape, out), (analysis.shape(node.args[0]), analysis.dims(node.args[0]))], shape)
    return out


@rule("scaled_dot_product_attention")
def attention(analysis: Analysis, node: fx.Node) -> list[Dim]:
    """Heads of query, key and value are one axis; with grouped queries, whole groups of them."""
    axes = analysis.axes
    query, key, value = (list(analysis.dims(arg)) for arg in node.args[:3])
    shapes = [analysis.shape(arg) for arg in node.args[:3]]
    if argument(node, 6, "enable_gqa", False) and shapes[0][-3] != shapes[1][-3]:
        for dims, sizes in ((key, shapes[1]), (value, shapes[2])):
            group = shapes[0][-3] // sizes[-3]
            dims[-3], sizes[-3] = axes.multiply(dims[-3], 1, group), shapes[0][-3]
    analysis.join(query[-1], key[-1], node)
    analysis.join(key[-2], value[-2], node)
    shape = analysis.shape(node)
    operands = [(sizes[:-2], dims[:-2]) for sizes, dims in zip(shapes, (query, key, value), strict=True)]
    batch = meet(analysis, node, operands, shape[:-2])
    if argument(node, 5, "is_causal", False):
        for dim in (query[-2], key[-2]):
            analysis.pin(dim, node, "is causal along it")
    mask = argument(node, 3, "attn_mask")
    if isinstance(mask, fx.Node):
        scores = (shape[:-2] + [shapes[0][-2], shapes[1][-2]], [*batch, query[-2], key[-2]])
        meet(analysis, node, [scores, (analysis.shape(mask), analysis.dims(mask))], scores[0])
    return [*batch, query[-2], value[-1]]


@rule("einsum")
def einsum(analysis: Analysis, node: fx.Node) -> list[Dim]:
    """Dimensions with one letter are one axis; a letter that an operand repeats fixes it."""
    equation, operands = node.args[0].replace(" ", ""), node.args[1]
    left, _, right = equation.partition("->")
    terms = left.split(",")
    if "." in equation or "->" not in equation:
        return analysis.unknown(node)
    known: dict[str, Dim] = {}
    for term, operand in zip(terms, operands, strict=True):
        for letter, size, dim in zip(term, analysis.shape(operand), analysis.dims(operand), strict=True):
            if size == 1:
                known.setdefault(letter, None)
                continue
            if term.count(letter) > 1:
                analysis.pin(dim, node, "takes its diagonal")
            known[letter] = analysis.join(known[letter], dim, node) if letter in known else dim
        if analysis.is_parameter(operand):
            name = analysis.exported.tensors[operand.name]
            analysis.unshared.add(name)
            analysis.note(name.removesuffix(".weight"), f"its weight is used by {where(node)}, not by a layer")
    return [known[letter] for letter in right]
