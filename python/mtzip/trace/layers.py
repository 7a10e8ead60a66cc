"""What the analysis finds in a graph: layers, norms, and what stays private."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from .axes import Dim

#: Why a head stays private.
OUTPUT = "it is an output of the network"


@dataclass
class Layer:
    """A linear layer or convolution the graph calls.

    Args:
        path: path of its module; of its weight, where the weight has another name than "weight".
        node: the call.
        kind: "linear", "conv1d" to "conv3d", "conv_transpose1d" to "conv_transpose3d".
        weight: path of the weight parameter.
        bias: path of the bias, None without one.
        columns: dimension it reads. Its columns, one for each element of it and each position of the kernel; of a
            layer with groups every row has the columns of its group only.
        rows: dimension it writes.
        kernel: kernel size, () for a linear layer.
        settings: stride, padding, dilation of a convolution; output_padding of a transposed one.
        norm: the BatchNorm that alone reads its output, None without one.
        private: why its rows cannot be stored in blocks; None where they can.
        calls: how often the graph reads its weight.
        groups: number of groups; 1 for a layer that reads everything. ``rows`` and ``columns`` lie on the same atoms
            then, which are never smaller than a group. With one channel to a group, it is depthwise.
        transposed: the weight is stored [in, out / groups, ...] instead of [out, in / groups, ...].
        places: position of "input", "weight" and "bias" among the arguments of the call.
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
    groups: int = 1
    transposed: bool = False
    places: dict[str, int] | None = None

    @property
    def name(self) -> str:
        """Its path; of its weight where it is the whole network."""
        return self.path or self.weight

    @property
    def input(self) -> fx.Node:
        """What it reads."""
        return self.node.args[(self.places or {}).get("input", 0)]


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


def settings_of(node: fx.Node, kind: str, kernel: tuple[int, ...]) -> dict[str, Any]:
    """Stride, padding and dilation of a convolution as tuples; nothing for a linear layer."""
    if not kind.startswith("conv"):
        return {}
    dimensions, names = len(kernel), {"stride": (3, 1), "padding": (4, 0), "dilation": (5, 1)}
    if kind.startswith("conv_transpose"):
        names = {"stride": (3, 1), "padding": (4, 0), "output_padding": (5, 0), "dilation": (7, 1)}
    values: dict[str, Any] = {}
    for name, (at, default) in names.items():
        value = node.args[at] if len(node.args) > at else node.kwargs.get(name, default)
        if isinstance(value, str):  # "same" (stride 1) and "valid"
            dilation = node.args[5] if len(node.args) > 5 else node.kwargs.get("dilation", [1])
            dilation = list(dilation) * dimensions if len(dilation) == 1 else dilation
            value = [d * (k - 1) if value == "same" else 0 for k, d in zip(kernel, dilation, strict=True)]
            values["total_padding"] = value
            value = [v // 2 for v in value]
        value = [value] if isinstance(value, int) else list(value)
        values[name] = tuple(int(v) for v in (value * dimensions if len(value) == 1 else value))
    return values
