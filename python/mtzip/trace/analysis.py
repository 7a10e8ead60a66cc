"""The axis analysis: walks an exported graph once and finds layers, axes, and everything that lies on an axis."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from . import rules
from .axes import Axes, Dim
from .export import Exported


@dataclass
class Layer:
    """A linear layer or convolution the graph calls.

    Args:
        path: path of its module (of its weight, where no leaf class can replace the module).
        node: the call.
        kind: "linear", "conv1d", "conv2d" or "conv3d".
        weight: path of the weight parameter.
        bias: path of the bias, None without one.
        columns: dimension its columns read, in units of weight dimension 1.
        rows: dimension it writes.
        kernel: kernel size, () for a linear layer.
        settings: stride, padding, dilation of a convolution.
        norm: the BatchNorm that alone reads its output, None without one.
        private: why its rows cannot be stored in blocks; None where they can.
        calls: how often the graph reads its weight.
        transposed: True where its weight has the columns first, [columns, rows, ...].
        groups: of a convolution.
    """

    path: str
    node: fx.Node
    kind: str
    weight: str
    bias: str | None
    columns: Dim
    rows: Dim
    kernel: tuple[int, ...]
    settings: dict[str, Any]
    norm: Norm | None = None
    private: str | None = None
    calls: int = 1
    transposed: bool = False
    groups: int = 1

    @property
    def name(self) -> str:
        """Its path; of its weight where it is the whole network."""
        return self.path or self.weight


@dataclass
class Norm:
    """A BatchNorm call: paths of its four vectors (weight and bias None without affine), and epsilon."""

    node: fx.Node
    weight: str | None
    bias: str | None
    mean: str
    variance: str
    eps: float


@dataclass
class Note:
    """Something that stays private and why."""

    name: str
    reason: str


class Analysis:
    """Axes, layers and norms of one exported network.

    ``uses`` says for every parameter and buffer which of its dimensions lie on an axis: all that reordering an axis has
    to touch.
    """

    def __init__(self, exported: Exported, leaf_classes: tuple[type[nn.Module], ...] | None = None):
        self.exported = exported
        self.axes = Axes()
        self.layers: dict[str, Layer] = {}
        self.norms: list[Norm] = []
        self.notes: list[Note] = []
        self.uses: dict[str, dict[int, Dim]] = {}
        self._leaf_classes = leaf_classes
        self._dims: dict[str, list[Dim] | list[list[Dim]]] = {}
        self._by_weight: dict[str, Layer] = {}
        for node in exported.graph.nodes:
            self._visit(node)
        self._finish()

    # -- what the rules ask ------------------------------------------------------------------------------------

    def shape(self, node: Any) -> list[int] | None:
        """Shape of a tensor node with the example's batch size; None for anything that is not a tensor."""
        value = node.meta.get("val") if isinstance(node, fx.Node) else None
        if not isinstance(value, Tensor):
            return None
        return [size if isinstance(size, int) else size.node.hint for size in value.shape]

    def dims(self, node: Any) -> list[Dim]:
        """Dimensions of a tensor node; nothing known for one without an axis."""
        if node.name in self._dims:
            return self._dims[node.name]
        return [None] * len(self.shape(node) or ())

    def is_parameter(self, node: fx.Node) -> bool:
        """True for a parameter or buffer of the network, used as it is."""
        return node.name in self.exported.tensors

    def parameter_dim(self, node: fx.Node, position: int) -> Dim:
        """Dimension a parameter was already found to lie on; () if none yet."""
        return self.uses.get(self.exported.tensors[node.name], {}).get(position, ())

    def use(self, node: fx.Node, position: int, dim: Dim) -> None:
        """Notes that dimension ``position`` of a parameter lies on ``dim``; pins where that cannot be said."""
        if dim is None:
            return
        if not isinstance(node, fx.Node) or not self.is_parameter(node):
            self.axes.pin(dim, f"{node} lies on it and is computed, not stored")
            return
        known = self.uses.setdefault(self.exported.tensors[node.name], {})
        known[position] = self.axes.unify(known[position], dim, node.name) if position in known else dim

    def pin(self, dim: Dim, node: fx.Node, what: str) -> None:
        """Fixes the order of ``dim`` because of what ``node`` does."""
        self.axes.pin(dim, f"{rules.name_of(node)} ({node.name}) {what}")

    def note(self, node: fx.Node, reason: str) -> None:
        """Notes that the layer called by ``node`` stays private."""
        weight = self.exported.tensors.get(node.args[1].name)
        name = node.name if weight is None else weight.removesuffix(".weight")
        if not any(note.name == name for note in self.notes):
            self.notes.append(Note(name, reason))

    def add_norm(self, node: fx.Node) -> None:
        """Records a BatchNorm call with stored statistics."""
        weight, bias, mean, variance = (
            self.exported.tensors.get(arg.name) if isinstance(arg, fx.Node) else None for arg in node.args[1:5]
        )
        if mean is not None and variance is not None:
            self.norms.append(Norm(node, weight, bias, mean, variance, node.args[7]))

    def layer(self, node: fx.Node, reads: Dim, features: int) -> Dim:
        """Records a layer call; returns the dimension it writes."""
        weight_node = node.args[1]
        bias_node = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
        rows = self.shape(weight_node)[0]
        if not self.is_parameter(weight_node):
            self.note(node, "its weight is computed, not stored")
            self.axes.pin(reads, f"{node.name} reads it with a computed weight")
            return self.axes.new(rows, pinned=f"written by {node.name} with a computed weight")
        weight = self.exported.tensors[weight_node.name]
        if reads is None:
            reads = self.axes.new(features, pinned="its order is not known")
        known = self._by_weight.get(weight)
        if known is not None:
            known.calls += 1
            known.private = "the same weight is used by several calls"
            for dim, other in ((known.columns, reads), (known.rows, None)):
                self.axes.pin(dim, f"{known.path} is called several times")
                self.axes.pin(other, f"{known.path} is called several times")
            return known.rows
        bias = self.exported.tensors.get(bias_node.name) if isinstance(bias_node, fx.Node) else None
        path, _, name = weight.rpartition(".")
        out = self.axes.new(rows)
        layer = Layer(
            path,
            node,
            rules.name_of(node),
            weight,
            bias,
            reads,
            out,
            tuple(self.shape(weight_node)[2:]),
            _settings(node),
        )
        module = self.exported.network.get_submodule(path)
        if (
            (self._leaf_classes is not None and type(module) not in self._leaf_classes)
            or name != "weight"
            or (bias is not None and bias != _dot(path, "bias"))
        ):
            layer.private = f"its module is {type(module).__name__}, for which there is no leaf class"
            layer.path = weight
        self.use(weight_node, 0, out)
        self.use(weight_node, 1, reads)
        if bias_node is not None:
            self.use(bias_node, 0, out)
        self.layers[layer.path] = self._by_weight[weight] = layer
        return out

    # -- the walk ----------------------------------------------------------------------------------------------

    def _visit(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            if node.name in self.exported.inputs:
                self._dims[node.name] = self._input(node)
        elif node.op == "output":
            for arg in node.all_input_nodes:
                for dim in self._dims.get(arg.name, ()):
                    self.axes.pin(dim, "it is an output of the network")
        elif node.op == "call_function" and self.shape(node) is not None:
            rule = rules.find(node)
            self._dims[node.name] = self._unknown(node) if rule is None else list(rule(self, node))
        elif node.op == "call_function" and isinstance(node.meta.get("val"), (tuple, list)):
            self._several(node)
        elif node.op == "call_function" and not isinstance(node.meta.get("val"), (int, float, bool, torch.SymInt)):
            self._unknown(node)

    def _several(self, node: fx.Node) -> None:
        """An operator with several outputs: the rule for it says what all of them look like."""
        rule = rules.find(node)
        dims = self._unknown(node) if rule is None else list(rule(self, node))
        for user in node.users if rule is not None else ():  # getitem
            self._dims[user.name] = dims

    def _input(self, node: fx.Node) -> list[Dim]:
        shape = self.shape(node)
        index = self.exported.inputs.index(node.name)
        if shape is None:
            return []
        given = "its order is given by the input"
        return [None if at == 0 else self.axes.new(size, f"input{index}.{at}", given) for at, size in enumerate(shape)]

    def _unknown(self, node: fx.Node) -> list[Dim]:
        name = rules.name_of(node)
        reads = False
        for arg in node.all_input_nodes:
            reads |= arg.name in self._dims
            for dim in self._dims.get(arg.name, ()):
                self.axes.pin(dim, f"operator {name} ({node.name}) has no rule")
            if self.is_parameter(arg):
                for dim in self.uses.get(self.exported.tensors[arg.name], {}).values():
                    self.axes.pin(dim, f"operator {name} ({node.name}) has no rule")
        if reads:  # one that reads no activation makes a constant
            self.notes.append(Note(name, f"operator without a rule ({node.name})"))
        return [None] * len(self.shape(node) or ())

    def _finish(self) -> None:
        for layer in self.layers.values():
            for segment in self.axes.resolve(layer.rows):
                writers = self.axes[segment.atom].writers
                writers += [layer.path] if layer.path not in writers else []
        reads = Counter(self.exported.tensors.get(a.name) for n in self.exported.graph.nodes for a in n.all_input_nodes)
        for norm in [norm for norm in self.norms if reads[norm.mean] > 1]:
            self.norms.remove(norm)  # it cannot be fitted to several inputs
            note = Note(norm.mean.rpartition(".")[0], "it is called several times and keeps its statistics")
            self.notes += [note] if note not in self.notes else []
        by_input = {norm.node.args[0].name: norm for norm in self.norms}
        for layer in self.layers.values():
            norm = by_input.get(layer.node.name)
            if norm is not None and len(layer.node.users) == 1:
                layer.norm = norm
            if reads[layer.weight] > layer.calls:
                layer.private = layer.private or "its weight is also used elsewhere"
                layer.calls = reads[layer.weight]


def _settings(node: fx.Node) -> dict[str, Any]:
    if not rules.name_of(node).startswith("conv"):
        return {}
    dimensions = int(rules.name_of(node)[4])
    names = ("stride", "padding", "dilation")
    defaults = (1, 0, 1)
    values = {}
    for at, (name, default) in enumerate(zip(names, defaults, strict=True)):
        value = node.args[3 + at] if len(node.args) > 3 + at else node.kwargs.get(name, default)
        if isinstance(value, str):  # "same" (stride 1) and "valid"
            kernel = node.args[1].meta["val"].shape[2:]
            dilation = node.args[5] if len(node.args) > 5 else node.kwargs.get("dilation", [1] * dimensions)
            value = [d * (k - 1) if value == "same" else 0 for k, d in zip(kernel, dilation, strict=True)]
            values["total_padding"] = value
            value = [v // 2 for v in value]
        value = [value] if isinstance(value, int) else list(value)
        values[name] = tuple(int(v) for v in (value * dimensions if len(value) == 1 else value))
    return values


def _dot(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
