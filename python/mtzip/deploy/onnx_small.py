"""What an ONNX file holds beside the weights, made small: nodes, constants, names."""

from __future__ import annotations

import math

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor
from torch import Tensor

#: What names of initializers begin with that are no weights.
CONSTANT = "constant/"

#: Attributes that say what ONNX assumes without them.
_ASSUMED = {
    ("Conv", "auto_pad"): "NOTSET",
    ("Conv", "group"): 1,
    ("Gemm", "alpha"): 1.0,
    ("Gemm", "beta"): 1.0,
    ("Gemm", "transA"): 0,
    ("BatchNormalization", "training_mode"): 0,
    ("BatchNormalization", "momentum"): 0.9,
    ("MaxPool", "auto_pad"): "NOTSET",
    ("MaxPool", "ceil_mode"): 0,
    ("MaxPool", "storage_order"): 0,
}


def make_small(model: ir.Model) -> None:
    """Changes a model, in place, to one that computes the same from fewer bytes beside the weights."""
    _fold_norms(model.graph)
    if model.opset_imports.get("", 0) >= 13:  # where Split takes its sizes as an input
        _split(model.graph)
    _merge_constants(model.graph)
    _shorten(model)


def _fold_norms(graph: ir.Graph) -> None:
    """Stores two vectors for a BatchNorm, not four: the factor under the key of its weight, the shift of its bias."""
    for node in graph:
        kind, values = node.op_type, node.inputs
        if kind != "BatchNormalization" or any(x is None or x.const_value is None for x in values[1:]):
            continue
        alone = all(not x.name.startswith(CONSTANT) and len(x.uses()) == 1 for x in values[1:3])
        weight, bias, mean, variance = (torch.from_numpy(x.const_value.numpy().copy()) for x in values[1:])
        if not alone or weight.dtype not in (torch.float16, torch.float32, torch.float64):
            continue
        epsilon = node.attributes["epsilon"].value if "epsilon" in node.attributes else 1e-5
        factor = weight.double() / (variance.double() + epsilon).sqrt()
        shift = bias.double() - mean.double() * factor
        for value, new in zip(values[1:3], (factor.to(weight.dtype), shift.to(bias.dtype)), strict=True):
            value.const_value = TorchTensor(new, name=value.name)
        statistics = values[3:]
        node.replace_input_with(3, _constant(graph, node, "zeros", torch.zeros_like(mean)))
        node.replace_input_with(4, _constant(graph, node, "ones", torch.ones_like(variance)))
        node.attributes["epsilon"] = ir.AttrFloat32("epsilon", 0.0)
        for value in statistics:
            if not value.uses():
                graph.initializers.pop(value.name, None)


def _split(graph: ir.Graph) -> None:
    """One Split in the place of the Slices that cut a value up along a dimension."""
    places = {id(node): at for at, node in enumerate(graph)}
    cuts: dict[tuple[int, int], dict[tuple[int, int], list[ir.Node]]] = {}
    for node in graph:
        numbers = [None if x is None or x.const_value is None else x.const_value.numpy() for x in node.inputs[1:]]
        if node.op_type != "Slice" or len(numbers) not in (3, 4) or any(x is None or x.size != 1 for x in numbers):
            continue
        start, end, axis, *step = (int(x.item()) for x in numbers)
        if step in ([], [1]) and axis >= 0 and not node.outputs[0].is_graph_output():
            cuts.setdefault((id(node.inputs[0]), axis), {}).setdefault((start, end), []).append(node)
    for (_, axis), found in cuts.items():
        nodes = [node for cut in found.values() for node in cut]
        value = nodes[0].inputs[0]
        ranges = sorted(found)
        ends = [0, *(end for _, end in ranges)]
        size = None if value.shape is None else value.shape[axis]
        if len(ranges) < 2 or ends[-1] != size or ends[:-1] != [start for start, _ in ranges]:
            continue
        sizes = _constant(graph, nodes[0], "sizes", torch.tensor(ends).diff())
        split = ir.node("Split", [value, sizes], {"axis": axis}, num_outputs=len(ranges))
        graph.insert_before(min(nodes, key=lambda node: places[id(node)]), split)
        for out, cut in zip(split.outputs, ranges, strict=True):
            for node in found[cut]:
                node.outputs[0].replace_all_uses_with(out)
                graph.remove(node, safe=True)


def _constant(graph: ir.Graph, node: ir.Node, what: str, tensor: Tensor) -> ir.Value:
    """A new initializer on behalf of ``node``; :func:`_merge_constants` makes one of those that are equal."""
    name = f"{CONSTANT}{node.outputs[0].name}/{what}"
    value = ir.Value(name=name, const_value=TorchTensor(tensor, name=name))
    graph.register_initializer(value)
    return value


def _merge_constants(graph: ir.Graph) -> None:
    """Stores constants that are equal once, and those that nobody reads not at all."""
    known: dict[tuple, ir.Value] = {}
    for name, value in list(graph.initializers.items()):
        if not name.startswith(CONSTANT):
            continue
        numbers = value.const_value.numpy()
        first = known.setdefault((numbers.dtype.str, numbers.shape, numbers.tobytes()), value)
        if first is not value:
            value.replace_all_uses_with(first)
        if not value.uses():
            del graph.initializers[name]


def _shorten(model: ir.Model) -> None:
    """Drops what every reader can work out again: types, shapes and long names of values in between, defaults."""
    model.producer_name, model.producer_version, model.graph.name = "mtzip", None, "mtzip"
    ends = {id(value) for value in (*model.graph.inputs, *model.graph.outputs)}
    for number, value in enumerate(list(model.graph.initializers.values())):
        value.type = value.shape = None  # the tensor has them
        if value.name.startswith(CONSTANT):
            value.name = value.const_value.name = f"{number}.c"
    for number, node in enumerate(model.graph):
        node.name = None
        for key, attribute in list(node.attributes.items()):
            ones = node.op_type == "Conv" and key in ("dilations", "strides") and set(attribute.value) == {1}
            if ones or _is_assumed(node.op_type, key, attribute.value):
                del node.attributes[key]
        for place, value in enumerate(node.outputs):
            if id(value) not in ends:
                value.type = value.shape = None
                value.name = f"{number}.{place or ''}"  # with a dot, as no task's name has


def _is_assumed(operator: str, key: str, value: object) -> bool:
    assumed = _ASSUMED.get((operator, key))
    return math.isclose(value, assumed, rel_tol=1e-6) if isinstance(assumed, float) else assumed == value
