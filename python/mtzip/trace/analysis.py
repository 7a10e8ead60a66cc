"""The axis analysis: walks an exported graph and finds layers, axes, and everything that lies on an axis."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from . import rules
from .axes import Axes, Dim
from .export import Exported
from .layers import OUTPUT, Layer, Norm, Note, settings_of
from .rules.registry import where

__all__ = ["Analysis", "Layer", "Norm", "Note"]

#: Stands for a size that depends on values: no other size is likely to equal it.
_UNKNOWN_SIZE = 4999


class Analysis:
    """Axes, layers and norms of one exported network.

    ``uses`` says for every parameter and buffer which of its dimensions lie on an axis: all that reordering an axis has
    to touch.

    Where a dimension is split, ``view(..., 3, heads, size)``, only one of the parts can keep an order, and which is
    the right one shows later in the graph. The outermost is tried first; if it turns out to be fixed, the graph is
    walked again with the next.
    """

    def __init__(self, exported: Exported):
        self.exported = exported
        self._choices: dict[tuple[str, int], int] = {}
        while True:
            self._walk()
            fixed = {key: self._choices.get(key, 0) + 1 for key, (_, kept) in self._grids.items() if self._fixed(kept)}
            fixed = {key: choice for key, choice in fixed.items() if choice < self._grids[key][0]}
            if not fixed:
                break
            self._choices.update(fixed)
        self._finish()

    def of(self, network: nn.Module) -> Analysis:
        """The analysis of the same graph with the weights of ``network``, a frozen copy in evaluation mode."""
        new = copy.copy(self)
        new.exported = replace(self.exported, network=network)
        return new

    def _walk(self) -> None:
        self.axes = Axes()
        self.layers: dict[str, Layer] = {}
        self.norms: list[Norm] = []
        self.notes: list[Note] = []
        self.uses: dict[str, dict[int, Dim]] = {}
        self.calls: dict[
            str, tuple
        ] = {}  # node of every product with a weight, also where no layer owns it, to its form
        self.tables: set[str] = set()  # weights that are looked up by number
        self.unshared: set[str] = set()  # weights that no layer owns: computed ones, recurrent ones
        self._dims: dict[str, list[Dim] | list[list[Dim]]] = {}
        self._by_weight: dict[str, Layer] = {}
        self._grids: dict[tuple[str, int], tuple[int, Dim]] = {}  # number of possible choices, what the choice kept
        for node in self.exported.graph.nodes:
            self._visit(node)

    # -- what the rules ask ------------------------------------------------------------------------------------

    def shape(self, node: Any) -> list[int] | None:
        """Shape of a tensor node with the example's batch size; None for anything that is not a tensor."""
        value = node.meta.get("val") if isinstance(node, fx.Node) else None
        if not isinstance(value, Tensor):
            return None
        return [size if isinstance(size, int) else _hint(size) for size in value.shape]

    def dims(self, node: Any) -> list[Dim]:
        """Dimensions of a tensor node; those of a parameter are axes of their own until they meet another."""
        if node.name in self._dims:
            return self._dims[node.name]
        shape = self.shape(node) or ()
        if self.is_parameter(node) and node.meta["val"].is_floating_point():
            return [None if size == 1 else self.parameter_dim(node, at) for at, size in enumerate(shape)]
        return [None] * len(shape)

    def outputs(self, node: fx.Node) -> list[list[Dim]]:
        """Dimensions of every output of an operator with several."""
        return self._dims[node.name]

    def is_parameter(self, node: Any) -> bool:
        """True for a parameter or buffer of the network, used as it is."""
        return isinstance(node, fx.Node) and node.name in self.exported.tensors

    def parameter_dim(self, node: fx.Node, position: int) -> Dim:
        """Dimension a parameter or buffer lies on."""
        known = self.uses.setdefault(self.exported.tensors[node.name], {})
        if position not in known:
            known[position] = self.axes.new(self.shape(node)[position])
        return known[position]

    def use(self, node: fx.Node, position: int, dim: Dim) -> None:
        """Notes that dimension ``position`` of a tensor lies on ``dim``; None fixes its order."""
        if not self.is_parameter(node):
            self.axes.unify(self.dims(node)[position], dim, node.name)
            return
        known = self.uses.setdefault(self.exported.tensors[node.name], {})
        if position in known:
            self.axes.unify(known[position], dim, node.name)
        else:
            size = self.shape(node)[position]
            known[position] = self.axes.new(size, pinned="its order is not known") if dim is None else dim

    def join(self, first: Dim, second: Dim, node: fx.Node) -> Dim:
        """Two dimensions that ``node`` makes one."""
        return self.axes.unify(first, second, where(node))

    def uniform(self, node: fx.Node, position: int) -> Dim:
        """A dimension of the output of ``node`` along which all is the same."""
        size = node.meta["val"].shape[position]
        return self.axes.new(size, uniform=True) if isinstance(size, int) and size > 1 else None

    def grid(self, node: fx.Node, dim: Dim, sizes: list[int]) -> list[Dim]:
        """Splits an axis into several dimensions, one of which keeps an order."""
        key = (node.name, len([key for key in self._grids if key[0] == node.name]))
        positions = self.axes.grid_positions(dim, sizes)
        if not positions:
            self.pin(dim, node, "splits it")
            return [None] * len(sizes)
        position = positions[min(self._choices.get(key, 0), len(positions) - 1)]
        parts = self.axes.grid(dim, sizes, position, where(node))
        self._grids[key] = len(positions), parts[position]
        return parts

    def is_written(self, dim: Dim) -> bool:
        """True if a layer visited so far writes an atom of ``dim``."""
        atoms = {segment.atom for layer in self.layers.values() for segment in self.axes.resolve(layer.rows)}
        return any(segment.atom in atoms for segment in self.axes.resolve(dim) or ())

    def size_of(self, layer: Layer) -> int:
        """Parameters of a layer: its weight and its bias."""
        return sum(tensor.numel() for tensor in self.tensors_of(layer))

    def tensors_of(self, layer: Layer, network: nn.Module | None = None) -> list[Tensor]:
        """The weight and the bias, if there is one, of a layer of ``network``; of the traced one if None."""
        return [self.exported.tensor(path, network) for path in (layer.weight, layer.bias) if path is not None]

    def pin(self, dim: Dim, node: fx.Node, what: str) -> None:
        """Fixes the order of ``dim`` because of what ``node`` does."""
        self.axes.pin(dim, f"{where(node)} {what}")

    def note(self, name: str, reason: str) -> None:
        """Notes that something stays private."""
        if not any(note.name == name for note in self.notes):
            self.notes.append(Note(name, reason))

    def add_norm(self, node: fx.Node) -> None:
        """Records a BatchNorm call with stored statistics."""
        weight, bias, mean, variance = (
            self.exported.tensors.get(arg.name) if isinstance(arg, fx.Node) else None for arg in node.args[1:5]
        )
        if mean is not None and variance is not None:
            self.norms.append(Norm(node, weight, bias, mean, variance, node.args[7]))

    def layer(
        self,
        node: fx.Node,
        kind: str,
        places: dict[str, int],
        reads: Dim,
        groups: int = 1,
        transposed: bool = False,
    ) -> Dim:
        """Records a layer call; returns the dimension it writes.

        Args:
            node: the call.
            kind: as of :class:`Layer`.
            places: positions of "input", "weight" and "bias" among its arguments.
            reads: dimension it reads.
            groups: number of groups.
            transposed: the weight is stored [in, out / groups, ...].
        """
        weight = node.args[places["weight"]]
        bias = node.args[places["bias"]] if len(node.args) > places["bias"] else node.kwargs.get("bias")
        sizes = self.shape(weight)
        if len(sizes) == 1:  # a linear function with a single output
            self.use(weight, 0, reads)
            return None
        rows_at, columns_at = (1, 0) if transposed else (0, 1)
        features = sizes[columns_at] * (1 if transposed else groups)
        if reads is None:
            reads = self.axes.new(features, pinned="its order is not known")
        if groups == 1:
            self.use(weight, columns_at, reads)
            rows = self._rows_of(weight, rows_at)
        else:  # groups change places as wholes; inside of them the order stays
            blocks = self.axes.new(groups)
            self.join(reads, self.axes.multiply(blocks, 1, features // groups), node)
            rows = self.axes.multiply(blocks, 1, sizes[rows_at] if transposed else sizes[rows_at] // groups)
            self.use(weight, 0, reads if transposed else rows)
            self.use(weight, 1, None)
        for position in range(2, len(sizes)):
            self.use(weight, position, None)
        if isinstance(bias, fx.Node):
            self.use(bias, 0, rows)
        depthwise = groups > 1 and groups == features
        self.calls[node.name] = (
            kind,
            tuple(sizes[2:]),
            "depthwise" if depthwise else "grouped" if groups > 1 else "full",
        )
        self._record(node, kind, places, weight, bias, reads, rows, groups, transposed)
        return rows

    # -- the walk ----------------------------------------------------------------------------------------------

    def _rows_of(self, weight: fx.Node, position: int) -> Dim:
        if self.is_parameter(weight):
            return self.parameter_dim(weight, position)
        known = self.dims(weight)[position]
        fixed = f"{weight.name} is a computed weight of unknown order"
        return self.axes.new(self.shape(weight)[position], pinned=fixed) if known is None else known

    def _record(self, node, kind, places, weight_node, bias_node, reads, rows, groups, transposed) -> None:
        if not self.is_parameter(weight_node):
            paths = self._sources(weight_node)
            self.unshared.update(paths)
            owner = paths[0].partition(".parametrizations")[0].removesuffix(".weight") if paths else node.name
            self.note(owner, "its weight is computed, not stored")
            return
        weight = self.exported.tensors[weight_node.name]
        known = self._by_weight.get(weight)
        if known is not None:
            known.calls += 1
            known.private = "the same weight is used by several calls"
            return
        bias = self.exported.tensors.get(bias_node.name) if isinstance(bias_node, fx.Node) else None
        path, _, name = weight.rpartition(".")
        path = path if name == "weight" and path not in self.layers else weight
        kernel = tuple(self.shape(weight_node)[2:])
        settings = settings_of(node, kind, kernel)
        layer = Layer(path, node, kind, weight, bias, reads, rows, kernel, settings, None, None, 1, groups, transposed)
        layer.places = places
        if isinstance(bias_node, fx.Node) and bias is None:
            layer.private = "its bias is computed, not stored"
        self.layers[path] = self._by_weight[weight] = layer

    def _sources(self, node: fx.Node) -> list[str]:
        """Paths of the parameters that a tensor is computed from."""
        if self.is_parameter(node):
            return [self.exported.tensors[node.name]]
        return list(dict.fromkeys(path for arg in node.all_input_nodes for path in self._sources(arg)))

    def _visit(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            if node.name in self.exported.inputs and self.shape(node) is not None:
                self._dims[node.name] = self._input(node)
        elif node.op == "output":
            for arg in node.all_input_nodes:
                self._pin_all(arg, OUTPUT)
        elif node.op == "call_function" and not _is_plumbing(node):
            self._dims[node.name] = self._apply(node)

    def _apply(self, node: fx.Node) -> list[Dim] | list[list[Dim]]:
        """Dimensions of a node's output by its rule, if there is one and what it says fits."""
        rule = rules.find(node)
        if rule is None:
            return self.unknown(node)
        try:
            found = rule(self, node)
            values = [node.meta["val"]] if self.shape(node) is not None else node.meta["val"]
            for value, dims in zip(values, [found] if self.shape(node) is not None else found, strict=True):
                self._check(value, dims)
        except (IndexError, KeyError, TypeError, ValueError, AttributeError) as error:
            # Arguments the rule does not foresee: as good as no rule.
            return self.unknown(node, f"operator whose arguments are not understood: {error}")
        return found

    def _check(self, value: Any, dims: list[Dim]) -> None:
        if not isinstance(value, Tensor):
            return
        for size, dim in zip(value.shape, dims, strict=True):
            if dim is not None and isinstance(size, int) and self.axes.size(dim) != size:
                raise ValueError(f"dimension of {size}, expected {self.axes.size(dim)}")

    def _input(self, node: fx.Node) -> list[Dim]:
        index, sizes = self.exported.inputs.index(node.name), self.shape(node)
        given = "its order is given by the input"
        return [None if at == 0 else self.axes.new(size, f"input{index}.{at}", given) for at, size in enumerate(sizes)]

    def unknown(self, node: fx.Node, reason: str = "operator without a rule") -> list[Dim] | list[list[Dim]]:
        """Fixes the order of everything ``node`` reads, and notes it where that costs something."""
        name = rules.name_of(node)
        costs = False
        for arg in node.all_input_nodes:
            costs |= self._pin_all(arg, f"operator {name} ({node.name}) has no rule")
        if costs:
            self.notes.append(Note(name, f"{reason} ({node.name})"))
        if self.shape(node) is not None:
            return [None] * len(self.shape(node))
        values = node.meta.get("val")
        values = values if isinstance(values, (tuple, list)) else ()
        return [[None] * (value.dim() if isinstance(value, Tensor) else 0) for value in values]

    def _pin_all(self, node: fx.Node, reason: str) -> bool:
        """Fixes all dimensions of a node's value; True if one was free."""
        if self.shape(node) is not None:
            found = self.dims(node)
        else:
            found = [dim for dims in self._dims.get(node.name, ()) for dim in dims]
        free = any(self.axes.is_free(dim) for dim in found)
        for dim in found:
            self.axes.pin(dim, reason)
        return free

    def _fixed(self, dim: Dim) -> bool:
        return not self.axes.is_free(dim)

    def _finish(self) -> None:
        for layer in self.layers.values():
            for segment in self.axes.resolve(layer.rows):
                writers = self.axes[segment.atom].writers
                writers += [layer.path] if layer.path not in writers else []
        reads = Counter(self.exported.tensors.get(a.name) for n in self.exported.graph.nodes for a in n.all_input_nodes)
        for norm in [norm for norm in self.norms if reads[norm.mean] > 1]:
            self.norms.remove(norm)  # it cannot be fitted to several inputs
            self.note(norm.mean.rpartition(".")[0], "it is called several times and keeps its statistics")
        by_input = {norm.node.args[0].name: norm for norm in self.norms}
        for layer in self.layers.values():
            norm = by_input.get(layer.node.name)
            if norm is not None and len(layer.node.users) == 1:
                layer.norm = norm
            if reads[layer.weight] > layer.calls:
                layer.private = layer.private or "its weight is also used elsewhere"
                layer.calls = reads[layer.weight]


def _is_plumbing(node: fx.Node) -> bool:
    """True for what computes no tensor: sizes, assertions."""
    plain = isinstance(node.meta.get("val"), (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool))
    return plain or rules.name_of(node).startswith(("_assert", "sym_", "_check"))


def _hint(size: torch.SymInt) -> int:
    hint = size.node.hint
    return _UNKNOWN_SIZE if hint is None else int(hint)
