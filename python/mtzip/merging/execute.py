"""Runs an exported graph node by node over all calibration chunks, the original and the zipped network side by side.

Only values that are still to be read are kept, on disk where memory has no room (:mod:`mtzip.merging.spill`). As long
as nothing upstream has changed the zipped network's values are the original's, and are not computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

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
        lets_go: arguments, each with its side, that nobody reads any more.
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
        self._next = 0
        self._layers = {layer.node.name: layer for layer in analysis.layers.values()}
        self._open: fx.Node | None = None  # finished, but its zipped value is not computed yet
        # Position of the last node that reads a value.
        self._until = {arg.name: at for at, node in enumerate(self._nodes) for arg in node.all_input_nodes}
        leaves = [pytree.tree_leaves((batch.args, batch.kwargs)) for batch in batches]
        for at, name in enumerate(analysis.exported.inputs):
            self.original[name] = self.zipped[name] = [values[at] for values in leaves]

    @property
    def chunk_count(self) -> int:
        return len(self.batches)

    def is_changed(self, node: fx.Node) -> bool:
        """True if the zipped network's value at ``node`` differs from the original's."""
        return node.name in self._changed

    def input_changed(self, layer: Layer) -> bool:
        """True if what ``layer`` reads differs from the original's."""
        return self.is_changed(layer.input)

    def inputs(self, layer: Layer) -> list[Tensor]:
        """What ``layer`` reads in the zipped network."""
        return self.zipped[layer.input.name]

    def advance(self, until: fx.Node | None, visits: Mapping[str, Callable[[], bool]] | None = None) -> None:
        """Runs both networks up to ``until``, whose original value is computed and its zipped one not.

        Args:
            until: a layer's call; None runs to the end.
            visits: by the name of a node, what to do when its original value is there and its zipped one is not; it
                returns True if it changed what the node computes.
        """
        visits = visits or {}
        while True:
            stop = self._next
            while stop < len(self._nodes) and self._nodes[stop] is not until and self._nodes[stop].name not in visits:
                stop += 1
            self._run(stop, self._nodes[stop : stop + 1])
            if stop == len(self._nodes) or self._nodes[stop] is until:
                return
            self.finish(self._nodes[stop], visits[self._nodes[stop].name]())

    def finish(self, node: fx.Node, changed: bool) -> None:
        """Goes on behind the node that :meth:`advance` stopped at; its zipped value is computed with those of the next.

        Args:
            node: the one.
            changed: whether what it computes is no longer what the original's does.
        """
        self._note(node, changed)
        self._open = node
        self._next += 1

    def _note(self, node: fx.Node, changed: bool = False) -> None:
        if changed or any(arg.name in self._changed for arg in node.all_input_nodes) or self._reads_reordered(node):
            self._changed.add(node.name)

    def _run(self, stop: int, last: Sequence[fx.Node] = ()) -> None:
        """Computes all nodes before position ``stop``, and the original values of those of ``last``.

        Chunk by chunk: what one node puts out is still in the cache when the next one reads it, and values that nobody
        reads later are let go of at once.
        """
        nodes = self._nodes[self._next : stop]
        for node in nodes:
            self._note(node)
        if self._open is not None:
            nodes.insert(0, self._open)
        self._open, self._next = None, stop
        steps: list[Step] = []
        for node in (*nodes, *last):
            if node.name not in self.original:
                steps.append(Step(self.original, node, self._call(node, self.analysis.exported.network)))
            if node.name in self._changed and node not in last:
                steps.append(Step(self.zipped, node, self._call(node, self.network)))
        seen = set()
        for step in reversed(steps):
            step.kept = self._until.get(step.node.name, -1) >= stop or step.node in last
            keys = [(self._side(step.side, arg), arg.name) for arg in step.node.all_input_nodes]
            step.lets_go = [
                (side, name) for side, name in keys if self._until[name] < stop and (id(side), name) not in seen
            ]
            seen |= {(id(side), name) for side, name in keys}
        found = {id(step): Values(self._store, self._until.get(step.node.name, stop)) for step in steps if step.kept}
        with torch.no_grad():
            for chunk in range(self.chunk_count if steps else 0):
                self._run_chunk(steps, chunk, found)
        for step in steps:
            if step.kept:
                step.side[step.node.name] = found[id(step)]
        for node in nodes:
            for name in (node.name, *(arg.name for arg in node.all_input_nodes)):
                if self._until.get(name, -1) < stop:
                    self.original.pop(name, None)
                    self.zipped.pop(name, None)
            if node.name in self.original and node.name not in self._changed:
                self.zipped[node.name] = self.original[node.name]  # nothing has changed

    def _run_chunk(self, steps: Sequence[Step], chunk: int, found: Mapping[int, Values]) -> None:
        """Computes some nodes for one chunk and appends those values to ``found`` that are kept."""
        here: dict[tuple[int, str], Any] = {}
        for step in steps:

            def value(arg: fx.Node, side: Side = step.side) -> Any:
                side = self._side(side, arg)
                return here[id(side), arg.name] if (id(side), arg.name) in here else side[arg.name][chunk]

            here[id(step.side), step.node.name] = result = step.call(value)
            if step.kept:
                found[id(step)].append(result)
            for side, name in step.lets_go:
                if here.pop((id(side), name), None) is None and isinstance(side.get(name), Values):
                    side[name].drop(chunk)

    def _side(self, side: Side, node: fx.Node) -> Side:
        """Where a node's value is: the zipped network's are the original's where nothing has changed."""
        return side if node.name in self._changed else self.original

    def reorder(self, orders: dict[int, Tensor]) -> None:
        """Reorders axes of the zipped network: atom to order [n]."""
        if self._open is not None:  # is computed with the tensors as they are
            self._run(self._next)
        axes = self.analysis.axes
        permute_(self.network, self.analysis, orders)
        for path, dims in self.analysis.uses.items():
            if any(axes.index(dim, orders) is not None for dim in dims.values()):
                self._reordered.add(path)

    def _reads_reordered(self, node: fx.Node) -> bool:
        tensors = self.analysis.exported.tensors
        return any(tensors.get(arg.name) in self._reordered for arg in node.all_input_nodes)

    def call(self, layer: Layer, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """What ``layer`` would put out for ``x`` with weight [r, d] and bias [r]."""
        shape = layer.node.args[1].meta["val"].shape
        args = [x, weight.to(x.dtype).view(shape), bias.to(x.dtype), *layer.node.args[3:]]
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
