"""Runs an exported graph node by node over all calibration chunks, the original and the zipped network side by side.

A chunk is run when somebody asks for its values, as far as the networks are known by then: a layer that takes its
moments over the first samples leaves the others behind, and they run on without a stop once they are needed. Only
values that are still to be read are kept, on disk where memory has no room (:mod:`mtzip.merging.spill`). As long as
nothing upstream has changed the zipped network's values are the original's, and are not computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakMethod

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ..inputs import Batch
from ..network.leaf import SharedLayer
from ..trace.analysis import Analysis, Layer
from ..trace.permute import permute_
from .spill import Store, Values

Chunks = Sequence[Any]

#: Name of a node to its values, of one of the two networks.
Side = dict[str, Chunks]

#: Computes a node from a function that gives its arguments.
Call = Callable[[Callable[[fx.Node], Any]], Any]


@dataclass
class Step:
    """One node to compute for one of the networks.

    Args:
        side: of the network.
        node, call: what to compute.
        kept: whether it is read later.
        lets_go: arguments, each with its side, that no later step reads.
    """

    side: Side
    node: fx.Node
    call: Call
    kept: bool = False
    lets_go: list[tuple[Side, str]] = field(default_factory=list)


class Execution:
    """One task's original and zipped network on its calibration inputs.

    Args:
        analysis: axis analysis of the original.
        network: the network being zipped: a copy that the caller changes as the sweep goes on.
        batches: calibration chunks.
        store: that keeps the values; None keeps all in memory.
    """

    def __init__(self, analysis: Analysis, network: nn.Module, batches: list[Batch], store: Store | None = None):
        self._store = store or Store()
        self.analysis, self.network, self.batches = analysis, network, batches
        self.original: Side = {}
        self.zipped: Side = {}
        self._changed: set[str] = set()
        self._reordered: set[str] = set()
        self._nodes = [node for node in analysis.exported.graph.nodes if node.op == "call_function"]
        self._layers = {layer.node.name: layer for layer in analysis.layers.values()}
        # Nodes that may be computed of the original and of the zipped network, and those that are of every chunk.
        self._reach = 0, 0
        self._done = [self._reach for _ in batches]
        self._known: dict[tuple[int, int], list[Step]] = {}  # from where to where they lead as things stand
        # Position of the last node that reads a value; its own where none does.
        self._until = {node.name: at for at, node in enumerate(self._nodes)}
        self._until |= {arg.name: at for at, node in enumerate(self._nodes) for arg in node.all_input_nodes}
        leaves = [pytree.tree_leaves((batch.args, batch.kwargs)) for batch in batches]
        for at, name in enumerate(analysis.exported.inputs):
            self.original[name] = self.zipped[name] = [values[at] for values in leaves]

    def is_changed(self, node: fx.Node) -> bool:
        """True if the zipped network's value at ``node`` differs from the original's."""
        return node.name in self._changed

    def input_changed(self, layer: Layer) -> bool:
        """True if what ``layer`` reads differs from the original's."""
        return self.is_changed(layer.input)

    def inputs(self, layer: Layer) -> Sequence[Tensor]:
        """What ``layer`` reads in the zipped network; a chunk is run when it is taken."""
        return self.zipped[layer.input.name]

    def advance(self, until: fx.Node | None, visits: Mapping[str, Callable[[], bool]] | None = None) -> None:
        """Lets both networks run up to ``until``, the original through it.

        Args:
            until: a layer's call; None for the end.
            visits: by the name of a node, what to do when the original runs through it and the zipped network up to
                it; it returns True if it changed what the node computes.
        """
        visits = visits or {}
        while True:
            start = stop = self._reach[1]
            while stop < len(self._nodes) and self._nodes[stop] is not until and self._nodes[stop].name not in visits:
                self._note(self._nodes[stop])
                stop += 1
            self._let_run(min(stop + 1, len(self._nodes)), stop)
            for node in self._nodes[start : stop + 1]:
                if self._until[node.name] >= stop:
                    self.original[node.name] = self._values(node)
            for node in self._nodes[start:stop]:
                self._zipped_values(node)
            if stop == len(self._nodes) or self._nodes[stop] is until:
                return
            self.finish(self._nodes[stop], visits[self._nodes[stop].name]())

    def finish(self, node: fx.Node, changed: bool) -> None:
        """Lets the zipped network run through the node that :meth:`advance` stopped at.

        Args:
            node: the one.
            changed: whether what it computes is no longer what the original's does.
        """
        self._note(node, changed)
        self._zipped_values(node)
        self._let_run(self._reach[0], self._reach[0])

    def _note(self, node: fx.Node, changed: bool = False) -> None:
        if changed or any(arg.name in self._changed for arg in node.all_input_nodes) or self._reads_reordered(node):
            self._changed.add(node.name)

    def _values(self, node: fx.Node) -> Values:
        # Weakly: values are let go of with the execution, not when cycles are looked for.
        return Values(self._store, self._until[node.name], len(self.batches), WeakMethod(self._catch_up))

    def _zipped_values(self, node: fx.Node) -> None:
        if node.name in self.original:
            changed = node.name in self._changed
            self.zipped[node.name] = self._values(node) if changed else self.original[node.name]

    def _let_run(self, original: int, zipped: int) -> None:
        self._reach = original, zipped
        self._known = {}

    def _catch_up(self, chunk: int) -> None:
        """Runs one chunk as far as the networks may run."""
        start, reach = self._done[chunk], self._reach
        if start == reach:
            return
        if start not in self._known:
            self._known[start] = self._steps(start)
        self._done[chunk] = reach
        with torch.no_grad():
            self._run(self._known[start], chunk)
        for side in (self.original, self.zipped):
            for name, values in side.items():
                if isinstance(values, Values) and self._until[name] < reach[1]:
                    values.drop(chunk)

    def _steps(self, start: tuple[int, int]) -> list[Step]:
        """What to compute of a chunk that was run as far as ``start``.

        Node by node, both networks: what one node puts out is still in the cache when the next one reads it, and values
        that nobody reads later are let go of at once.
        """
        steps: list[Step] = []
        for at in range(min(start), self._reach[0]):
            node = self._nodes[at]
            if at >= start[0]:
                steps.append(Step(self.original, node, self._call(node, self.analysis.exported.network)))
            if start[1] <= at < self._reach[1] and node.name in self._changed:
                steps.append(Step(self.zipped, node, self._call(node, self.network)))
        seen = set()
        for step in reversed(steps):
            step.kept = self._until[step.node.name] >= self._reach[1]
            keys = [(self._side(step.side, arg), arg.name) for arg in step.node.all_input_nodes]
            step.lets_go = [
                (side, name)
                for side, name in keys
                if self._until[name] < self._reach[1] and (id(side), name) not in seen
            ]
            seen |= {(id(side), name) for side, name in keys}
        return steps

    def _run(self, steps: Sequence[Step], chunk: int) -> None:
        """Computes some nodes for one chunk and keeps those values that are read later."""
        here: dict[tuple[int, str], Any] = {}
        for step in steps:

            def value(arg: fx.Node, side: Side = step.side) -> Any:
                side = self._side(side, arg)
                return here[id(side), arg.name] if (id(side), arg.name) in here else side[arg.name][chunk]

            here[id(step.side), step.node.name] = result = step.call(value)
            if step.kept:
                step.side[step.node.name].put(chunk, result)
            for side, name in step.lets_go:
                if here.pop((id(side), name), None) is None and isinstance(side.get(name), Values):
                    side[name].drop(chunk)

    def _side(self, side: Side, node: fx.Node) -> Side:
        """Where a node's value is: the zipped network's are the original's where nothing has changed."""
        return side if node.name in self._changed else self.original

    def reorder(self, orders: dict[int, Tensor]) -> None:
        """Reorders axes of the zipped network: atom to order [n]."""
        axes = self.analysis.axes
        moved = {
            path
            for path, dims in self.analysis.uses.items()
            if any(axes.index(dim, orders) is not None for dim in dims.values())
        }
        tensors = self.analysis.exported.tensors
        first = min((zipped for _, zipped in self._done), default=0)
        behind = self._nodes[first : self._reach[1]]
        if any(tensors.get(arg.name) in moved for node in behind for arg in node.all_input_nodes):
            for chunk in range(len(self.batches)):  # is computed with the tensors as they are
                self._catch_up(chunk)
        permute_(self.network, self.analysis, orders)
        self._reordered |= moved

    def _reads_reordered(self, node: fx.Node) -> bool:
        tensors = self.analysis.exported.tensors
        return any(tensors.get(arg.name) in self._reordered for arg in node.all_input_nodes)

    def call(self, layer: Layer, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """What ``layer`` would put out for ``x`` with another weight of its shape and a bias [r]."""
        args = [x, weight.to(x.dtype), bias.to(x.dtype), *layer.node.args[3:]]
        with torch.no_grad():
            return layer.node.target(*args)

    def _call(self, node: fx.Node, network: nn.Module) -> Call:
        """What a node computes with the tensors of ``network``, from a function that gives its other arguments."""
        exported = self.analysis.exported
        stored: dict[str, Any] = {}
        for arg in node.all_input_nodes:
            if arg.name in exported.tensors:
                stored[arg.name] = exported.tensor(exported.tensors[arg.name], network)
            elif arg.name in exported.constants:
                stored[arg.name] = exported.constants[arg.name]
        args = list(node.args)
        layer = self._layers.get(node.name)
        if layer is not None and network is self.network and layer.bias is None:
            # A leaf may have got a bias that the traced layer had not.
            owner = network.get_submodule(layer.weight.rpartition(".")[0])
            if isinstance(owner, SharedLayer) and owner.layout.bias is not None:
                args[2:3] = [owner.assembled_bias()]

        def call(value: Callable[[fx.Node], Any]) -> Any:
            taken = fx.node.map_arg(
                (tuple(args), node.kwargs), lambda arg: stored[arg.name] if arg.name in stored else value(arg)
            )
            return node.target(*taken[0], **taken[1])

        return call
