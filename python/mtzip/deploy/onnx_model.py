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
from .onnx_small import CONSTANT, make_small

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
    make_small(model)
    return model


def _store(graph: ir.Graph, weights: dict[str, Tensor]) -> None:
    """Puts initializers in the place of the inputs that stand for weights."""
    for value in list(graph.initializers.values()):
        del graph.initializers[value.name]
        value.name = CONSTANT + value.name
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
