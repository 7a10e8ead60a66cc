"""Runs an exported graph node by node over all calibration chunks, the original and the zipped network side by side.

Only values that are still to be read are kept, on disk where memory has no room (:mod:`mtzip.merging.spill`). As long
as nothing upstream has changed the zipped network's values are the original's, and are not computed again.
"""

from __future__ import annotations

from collections.abc import Sequence
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
        self.original: dict[str, Chunks] = {}
        self.zipped: dict[str, Chunks] = {}
        self._changed: set[str] = set()
        self._reordered: set[str] = set()
        self._nodes = [node for node in analysis.exported.graph.nodes if node.op == "call_function"]
        self._next = 0
        self._layers = {layer.node.name: layer for layer in analysis.layers.values()}
        self._last_use: dict[str, str] = {}
        self._until: dict[str, int] = {}  # the same as a position
        for at, node in enumerate(self._nodes):
            for arg in node.all_input_nodes:
                self._last_use[arg.name], self._until[arg.name] = node.name, at
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

    def advance(self, until: fx.Node | None, visit) -> None:
        """Runs both networks up to ``until``, whose original value is computed and its zipped one not.

        Args:
            until: a layer's call; None runs to the end.
            visit: called with (execution, node) for every other node when its original value is there and its zipped
                one is not; returns True if it changed what the node computes.
        """
        while self._next < len(self._nodes):
            node = self._nodes[self._next]
            if node.name not in self.original:
                self.original[node.name] = self._evaluate(node, self.original, self.analysis.exported.network)
            if node is until:
                return
            self.finish(node, visit(self, node))

    def finish(self, node: fx.Node, changed: bool) -> None:
        """Computes the zipped value of the node that is next, and lets go of what nobody reads any more."""
        if changed or any(arg.name in self._changed for arg in node.all_input_nodes) or self._reads_reordered(node):
            self._changed.add(node.name)
            self.zipped[node.name] = self._evaluate(node, self.zipped, self.network)
        else:
            self.zipped[node.name] = self.original[node.name]
        self._next += 1
        for arg in (*node.all_input_nodes, node):
            if self._last_use.get(arg.name, node.name) == node.name:
                self.original.pop(arg.name, None)
                self.zipped.pop(arg.name, None)

    def reorder(self, orders: dict[int, Tensor]) -> None:
        """Reorders axes of the zipped network: atom to order [n]."""
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

    def _evaluate(self, node: fx.Node, values: dict[str, Chunks], network: nn.Module) -> Chunks:
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

        def run(chunk: int):
            def look_up(arg: fx.Node):
                return stored[arg.name] if arg.name in stored else values[arg.name][chunk]

            taken = fx.node.map_arg((tuple(args), node.kwargs), look_up)
            return node.target(*taken[0], **taken[1])

        found = Values(self._store, self._until.get(node.name, 0))
        with torch.no_grad():
            for chunk in range(self.chunk_count):
                found.append(run(chunk))
        return found
