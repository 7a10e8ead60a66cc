"""The calls of all tasks as one ONNX model, every stored tensor an initializer under its key."""

from __future__ import annotations

import onnx_ir as ir
import torch
from onnx_ir.passes import common
from onnx_ir.tensor_adapters import TorchTensor
from torch import Tensor

from ..errors import ZipError, first_line
from .calls import Calls, SameInput
from .exporting import batch_sizes, exported, quiet

INPUT = "input"  # of all tasks


def input_names(calls: Calls, same_input: bool) -> list[list[str]]:
    """For every task the names of its inputs in the file."""
    roots = [INPUT if same_input else task for task in calls.tasks]
    return [[f"{root}.{x}" if x else root for x in names] for root, names in zip(roots, calls.input_names, strict=True)]


def output_names(calls: Calls) -> list[list[str]]:
    """For every task the names of its outputs in the file. No task's name has a dot in it."""
    return [
        [f"{task}.{x or 'output'}" for x in names] for task, names in zip(calls.tasks, calls.output_names, strict=True)
    ]


def model_of(calls: Calls, same_input: bool = False, opset: int | None = None) -> ir.Model:
    """The model.

    Args:
        calls: what it computes.
        same_input: one set of inputs that all tasks see.
        opset: version of ONNX' operators, None for the exporter's own.

    Raises:
        ValueError: inputs of the tasks differ in form with ``same_input``.
        ZipError: a network cannot be exported, or an operator has no form in ONNX.
    """
    module, inputs, sizes = calls, calls.inputs, batch_sizes(calls)
    if same_input:
        _check_same_form(calls)
        module, inputs, sizes = SameInput(calls), inputs[0], sizes[0]
    weights = {key: tensor.detach() for key, tensor in calls.tensors.items()}
    program = exported(module, calls, (weights, inputs), (dict.fromkeys(weights), sizes))
    try:
        with quiet():
            model = torch.onnx.export(program, dynamo=True, verbose=False, opset_version=opset).model
    except Exception as error:  # the exporter's own errors have no common class
        raise ZipError(f"{', '.join(calls.tasks)} cannot be written as ONNX: {first_line(error)}") from error
    _store(model.graph, weights)
    _name(model.graph, calls, same_input)
    if same_input:
        common.CommonSubexpressionEliminationPass()(model)
    for change in (common.RemoveUnusedNodesPass(), common.OutputFixPass(), common.ClearMetadataAndDocStringPass()):
        change(model)
    _fold_norms(model.graph)
    _shorten(model)
    return model


def _store(graph: ir.Graph, weights: dict[str, Tensor]) -> None:
    """Puts initializers in the place of the inputs that stand for weights."""
    for value in list(graph.initializers.values()):
        del graph.initializers[value.name]
        value.name = f"constant/{value.name}"
        graph.initializers.add(value)
    for value, (key, tensor) in zip(list(graph.inputs)[: len(weights)], weights.items(), strict=True):
        stored = TorchTensor(tensor.cpu().contiguous(), name=key)
        kept = ir.Value(name=key, type=ir.TensorType(stored.dtype), shape=stored.shape, const_value=stored)
        graph.register_initializer(kept)
        value.replace_all_uses_with(kept, replace_graph_outputs=True)
    del graph.inputs[: len(weights)]


def _name(graph: ir.Graph, calls: Calls, same_input: bool) -> None:
    """Gives inputs, outputs and their batches the names that people read."""
    tasks = [INPUT] if same_input else calls.tasks
    symbols: dict[str, str] = {}
    values = iter(graph.inputs)
    for task, names in zip(tasks, input_names(calls, same_input), strict=False):
        for name in names:
            value = next(values)
            value.name = name
            if value.shape is not None and len(value.shape) and not isinstance(value.shape[0], int):
                symbols.setdefault(str(value.shape[0]), "batch" if same_input else f"{task}.batch")
    places = [(task, name) for task, names in zip(calls.tasks, output_names(calls), strict=True) for name in names]
    seen: set[int] = set()
    for at, (_, name) in enumerate(places):
        value = graph.outputs[at]
        if value.producer() is None or id(value) in seen:  # an input or a weight, or the same output twice
            copied = ir.node("Identity", [value])
            graph.append(copied)
            copied.outputs[0].type, copied.outputs[0].shape = value.type, value.shape
            value = graph.outputs[at] = copied.outputs[0]
        seen.add(id(value))
        value.name = name
    for value in (*graph.inputs, *graph.outputs):
        if value.shape is not None:
            value.shape = ir.Shape([symbols.get(str(x), x) if not isinstance(x, int) else x for x in value.shape])


#: Attributes that say what ONNX assumes without them.
_ASSUMED = {
    ("Conv", "auto_pad"): "NOTSET",
    ("Conv", "group"): 1,
    ("Gemm", "alpha"): 1.0,
    ("Gemm", "beta"): 1.0,
    ("Gemm", "transA"): 0,
    ("BatchNormalization", "training_mode"): 0,
    ("BatchNormalization", "momentum"): torch.tensor(0.9).item(),
    ("MaxPool", "auto_pad"): "NOTSET",
    ("MaxPool", "ceil_mode"): 0,
    ("MaxPool", "storage_order"): 0,
}


def _fold_norms(graph: ir.Graph) -> None:
    """Stores two vectors for a BatchNorm, not four: the factor under the key of its weight, the shift of its bias."""
    made: dict[tuple, ir.Value] = {}

    def constant(name: str, like: Tensor, number: float) -> ir.Value:
        key = (name, len(like), like.dtype)
        if key not in made:
            tensor = TorchTensor(torch.full_like(like, number), name=f"constant/{name}/{len(made)}")
            made[key] = ir.Value(name=tensor.name, const_value=tensor)
            graph.register_initializer(made[key])
        return made[key]

    for node in graph:
        kind, values = node.op_type, node.inputs
        if kind != "BatchNormalization" or any(x is None or x.const_value is None for x in values[1:]):
            continue
        alone = all(not x.name.startswith("constant/") and len(x.uses()) == 1 for x in values[1:3])
        weight, bias, mean, variance = (torch.from_numpy(x.const_value.numpy().copy()) for x in values[1:])
        if not alone or weight.dtype not in (torch.float16, torch.float32, torch.float64):
            continue
        epsilon = node.attributes["epsilon"].value if "epsilon" in node.attributes else 1e-5
        factor = weight.double() / (variance.double() + epsilon).sqrt()
        shift = bias.double() - mean.double() * factor
        for value, new in zip(values[1:3], (factor.to(weight.dtype), shift.to(bias.dtype)), strict=True):
            value.const_value = TorchTensor(new, name=value.name)
        statistics = values[3:]
        node.replace_input_with(3, constant("zeros", mean, 0.0))
        node.replace_input_with(4, constant("ones", variance, 1.0))
        node.attributes["epsilon"] = ir.AttrFloat32("epsilon", 0.0)
        for value in statistics:
            if not value.uses():
                graph.initializers.pop(value.name, None)


def _shorten(model: ir.Model) -> None:
    """Drops what every reader can work out again: types, shapes and long names of values in between, defaults."""
    model.producer_name, model.producer_version, model.graph.name = "mtzip", None, "mtzip"
    ends = {id(value) for value in (*model.graph.inputs, *model.graph.outputs)}
    for value in model.graph.initializers.values():
        value.type = value.shape = None  # the tensor has them
    for number, node in enumerate(model.graph):
        node.name = None
        for key, attribute in list(node.attributes.items()):
            ones = node.op_type == "Conv" and key in ("dilations", "strides") and set(attribute.value) == {1}
            if ones or _ASSUMED.get((node.op_type, key)) == attribute.value:
                del node.attributes[key]
        for place, value in enumerate(node.outputs):
            if id(value) not in ends:
                value.type = value.shape = None
                value.name = f"{number}.{place}" if place else str(number)


def _check_same_form(calls: Calls) -> None:
    forms = [
        [(name, str(x.dtype), ["n", *x.shape[1:]]) for name, x in zip(names, inputs, strict=True)]
        for names, inputs in zip(calls.input_names, calls.inputs, strict=True)
    ]
    for task, form in zip(calls.tasks, forms, strict=True):
        if form != forms[0]:
            first, other = (" and ".join(f"{kind} {shape}" for _, kind, shape in one) for one in (forms[0], form))
            raise ValueError(
                f"same_input needs tasks with inputs of the same form, got {first} for {calls.tasks[0]} and {other} "
                f"for {task}; export them without it"
            )
