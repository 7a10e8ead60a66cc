"""In-place operators made plain: running the graph changes no value that it still needs.

``relu_`` becomes ``relu``, and who read its input afterwards reads its output. What is written into a view
(``x[:, 0] = 0``) is written back into a new value of the tensor it is a view of, and views made before and read
afterwards are taken again.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx

aten = torch.ops.aten

_RESHAPES = ("view", "_unsafe_view", "unsqueeze", "squeeze", "unflatten", "flatten", "reshape", "view_as")
_ALIASES = ("alias", "detach", "contiguous", "dropout", "to")
_PIECES = ("split", "split_with_sizes", "chunk", "unbind")


def name_of(node: fx.Node) -> str:
    """Name of an ATen operator; empty for anything else."""
    return node.target._schema.name.split("::")[-1] if isinstance(node.target, torch._ops.OpOverload) else ""


@dataclass
class View:
    """How a node shows a tensor: ``reading`` a new base again, and ``writing`` a new value back into it."""

    base: fx.Node
    reading: tuple  # target and arguments behind the base; None shows all of it as it is
    writing: tuple  # target and arguments behind base and value; of an exchange, behind the value


def view_of(node: fx.Node) -> View | None:
    """What ``node`` is a view of; None for a tensor of its own, or one whose views are not understood."""
    name, args = name_of(node), node.args
    if node.target is operator.getitem:
        return _piece(node)
    if not args or not isinstance(args[0], fx.Node):
        return None
    base, rest = args[0], (*args[1:], *node.kwargs.values())
    if name == "select":
        return View(base, (node.target, rest), ("scatter", aten.select_scatter.default, rest))
    if name == "slice":
        return View(base, (node.target, rest), ("scatter", aten.slice_scatter.default, rest))
    if name in ("transpose", "t"):
        return View(base, (node.target, rest), ("turn", node.target, rest))
    if name == "permute":
        inverse = [[at % len(rest[0]) for at in rest[0]].index(at) for at in range(len(rest[0]))]
        return View(base, (node.target, rest), ("turn", aten.permute.default, (inverse,)))
    if name in _RESHAPES:
        return View(base, (node.target, rest), ("shape", aten.view_as.default, ()))
    if name in _ALIASES and _same_memory(node, base):
        return View(base, (node.target, rest), ("as it is", None, ()))
    return None


def _same_memory(node: fx.Node, base: fx.Node) -> bool:
    """True if an operator that copies only where it must gave back its input."""
    a, b = node.meta["val"], base.meta["val"]
    if not isinstance(b, Tensor) or (a.dtype, a.device) != (b.dtype, b.device):
        return False
    steps = [*a.stride(), *b.stride()]
    if any(isinstance(step, torch.SymInt) and step.node.hint is None for step in steps):
        return False  # sizes that depend on values: their strides cannot be compared
    return a.stride() == b.stride()


def _piece(node: fx.Node) -> View | None:
    """One of the pieces a tensor was split into."""
    whole, index = node.args
    if name_of(whole) not in _PIECES:
        return None
    base = whole.args[0]
    if name_of(whole) == "unbind":
        dim = whole.args[1] if len(whole.args) > 1 else 0
        return View(base, (aten.select.int, (dim, index)), ("scatter", aten.select_scatter.default, (dim, index)))
    dim = whole.args[2] if len(whole.args) > 2 else whole.kwargs.get("dim", 0)
    sizes = [piece.shape[dim] for piece in whole.meta["val"]]
    start = sum(sizes[:index])
    where = (dim, start, start + sizes[index])
    return View(base, (aten.slice.Tensor, where), ("scatter", aten.slice_scatter.default, where))


class Functionaliser:
    """Replaces the in-place operators of one graph."""

    def __init__(self, graph: fx.Graph):
        self.graph = graph
        self.order = {node: at for at, node in enumerate(graph.nodes)}
        self.views: dict[fx.Node, View | None] = {node: view_of(node) for node in graph.nodes}

    def run(self) -> None:
        """Replaces all that have a twin."""
        for node in list(self.graph.nodes):
            if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.is_mutable:
                continue
            name = name_of(node)
            twin = getattr(aten, name[:-1], None) if name.endswith("_") else None
            twin = getattr(twin, node.target._overloadname, None)
            if twin is not None and node.args:
                node.target = twin
                self.views[node] = None
                self._replace(node.args[0], node, node)

    def _later(self, node: fx.Node, write: fx.Node) -> list[fx.Node]:
        """Users of ``node`` that the graph had from the start and that come after ``write``."""
        return [user for user in node.users if self.order.get(user, -1) > self.order[write]]

    def _redirect(self, old: fx.Node, new: fx.Node, write: fx.Node) -> None:
        """Who reads ``old`` after ``write`` reads ``new``; what is a view of it then is a view of ``new``."""
        for user in self._later(old, write):
            user.replace_input_with(old, new)
            for node in (user, *user.users):  # pieces are views of what their split reads
                view = self.views.get(node)
                if view is not None and view.base is old:
                    view.base = new

    def _replace(self, old: fx.Node, new: fx.Node, write: fx.Node) -> None:
        """From ``write`` on ``new`` is the value of ``old``: of its readers, of its views, of what it is a view of."""
        view, child = self.views.get(old), old
        self._redirect(old, new, write)
        self._take_again(old, new, write, but=None)
        while view is not None:
            base = self._write_back(view, new)
            self.views[new] = View(base, view.reading, view.writing)
            self._redirect(view.base, base, write)
            self._take_again(view.base, base, write, but=child)
            child, new, view = view.base, base, self.views.get(view.base)
        self.views.setdefault(new, None)

    def _views_on(self, base: fx.Node) -> Iterator[tuple[fx.Node, View]]:
        for node, view in list(self.views.items()):
            if view is not None and view.base is base:
                yield node, view

    def _take_again(self, old: fx.Node, new: fx.Node, write: fx.Node, but: fx.Node | None) -> None:
        """Views of ``old`` that are still read show ``new``."""
        for node, view in self._views_on(old):
            if node is but or self.order.get(node, -1) > self.order[write] or not self._is_read(node, write):
                continue
            target, args = view.reading
            with self.graph.inserting_before(new.next):
                fresh = self.graph.call_function(target, (new, *args))
            fresh.meta["val"] = node.meta["val"]
            self.views[fresh] = View(new, view.reading, view.writing)
            self._redirect(node, fresh, write)
            self._take_again(node, fresh, write, but=None)

    def _is_read(self, node: fx.Node, write: fx.Node) -> bool:
        return bool(self._later(node, write)) or any(self._is_read(other, write) for other, _ in self._views_on(node))

    def _write_back(self, view: View, value: fx.Node) -> fx.Node:
        """The base with the elements that the view shows replaced by ``value``."""
        kind, target, args = view.writing
        if kind == "as it is":
            return value
        before = {"scatter": (view.base, value), "turn": (value,), "shape": (value, view.base)}[kind]
        with self.graph.inserting_before(value.next):
            new = self.graph.call_function(target, (*before, *args))
        new.meta["val"] = view.base.meta["val"]
        return new


def functionalise(graph: fx.Graph) -> None:
    """Replaces every in-place operator by its twin."""
    Functionaliser(graph).run()
