"""Whether two networks are one graph with other weights: what of one stands where in the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from .analysis import Analysis, Layer
from .layers import OUTPUT


@dataclass
class Trunk:
    """What two networks of one graph have beside their heads.

    Args:
        tensors: path of a parameter or buffer of the one to its path in the other.
        heads: layers that write the outputs, of the one and of the other, in graph order.
    """

    tensors: dict[str, str]
    heads: list[tuple[Layer, Layer]]


def common_trunk(one: Analysis, other: Analysis) -> Trunk:
    """The trunk of two networks that compute the same but for their weights and the width of their heads.

    Raises:
        ValueError: they do not, or their outputs are written by something else than layers; says what.
    """
    nodes, others = ([n for n in a.exported.graph.nodes if n.op == "call_function"] for a in (one, other))
    if [node.target for node in nodes] != [node.target for node in others]:
        raise ValueError("their graphs have other operators")
    heads = _heads(one)
    own = {path for head in heads for path in (head.weight, head.bias)}
    places = {node.name: at for at, node in enumerate(nodes)}
    other_places = {node.name: at for at, node in enumerate(others)}
    tensors: dict[str, str] = {}
    for node, twin in zip(nodes, others, strict=True):
        if _settings(node) != _settings(twin):
            raise ValueError(f"{node.name} has other settings")
        for arg, match in zip(node.all_input_nodes, twin.all_input_nodes, strict=True):
            if places.get(arg.name) != other_places.get(match.name) or not _same_source(one, arg, other, match):
                raise ValueError(f"{node.name} reads something else")
            path = one.exported.tensors.get(arg.name)
            if path is None or path in own:
                continue
            tensor, known = one.exported.tensor(path), other.exported.tensors[match.name]
            if tensors.setdefault(path, known) != known:
                raise ValueError(f"{path} is used elsewhere too")
            if tensor.shape != other.exported.tensor(known).shape:
                raise ValueError(f"{path} has another shape")
    by_place = {other_places[layer.node.name]: layer for layer in other.layers.values()}
    return Trunk(tensors, [(head, by_place[places[head.node.name]]) for head in heads])


def is_head(analysis: Analysis, layer: Layer) -> bool:
    """Whether what a layer puts out is an output of the network."""
    return analysis.axes.why_pinned(layer.rows) == OUTPUT


def _heads(analysis: Analysis) -> list[Layer]:
    """Layers that write the outputs, in graph order."""
    found = [layer for layer in analysis.layers.values() if is_head(analysis, layer)]
    if not found:
        raise ValueError("no layer alone writes the outputs")
    for layer in found:
        if layer.private is not None or layer.calls > 1 or layer.groups > 1 or layer.norm is not None:
            raise ValueError(f"the head {layer.name} is no plain layer")
    return found


def _settings(node: fx.Node) -> Any:
    """Arguments of a call with nodes left out."""
    return fx.node.map_arg((node.args, dict(node.kwargs)), lambda _: None)


def _same_source(one: Analysis, arg: fx.Node, other: Analysis, match: fx.Node) -> bool:
    """Whether two arguments that no operator made come from the same place of their networks."""
    if arg.op == "call_function":
        return match.op == "call_function"
    sides = []
    for analysis, node in ((one, arg), (other, match)):
        exported = analysis.exported
        position = exported.inputs.index(node.name) if node.name in exported.inputs else None
        sides.append((position, node.name in exported.tensors, exported.constants.get(node.name)))
    (position, stored, constant), (its_position, its_stored, its_constant) = sides
    if isinstance(constant, Tensor) and isinstance(its_constant, Tensor):
        return constant.shape == its_constant.shape and bool(torch.equal(constant, its_constant))
    return (position, stored, constant is None) == (its_position, its_stored, its_constant is None)
