"""The graphs of all tasks put into one ONNX model."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
from onnx_ir.passes import common
from onnx_ir.tensor_adapters import TorchTensor
from torch import Tensor

from .task_graph import TaskGraph

INPUT = "input"  # of all tasks


def input_names(graph: TaskGraph, same_input: bool) -> list[str]:
    """Names of a task's inputs in the file."""
    root = INPUT if same_input else graph.task
    return [f"{root}.{name}" if name else root for name, _ in graph.inputs]


def output_names(graph: TaskGraph) -> list[str]:
    """Names of a task's outputs in the file: no task's name has a dot in it."""
    return [f"{graph.task}.{name or 'output'}" for name, _ in graph.outputs]


def merged(graphs: Sequence[TaskGraph], same_input: bool = False, opset: int | None = None) -> ir.Model:
    """One model of all tasks, every stored tensor an initializer under its key.

    Raises:
        ValueError: inputs of the tasks differ in form with ``same_input``.
        ZipError: an operator has no form in ONNX.
    """
    if same_input:
        _check_same_form(graphs)
    parts = _Parts(same_input)
    for graph in graphs:
        parts.add(graph, opset)
    model = parts.model()
    if same_input:
        common.CommonSubexpressionEliminationPass()(model)
    for change in (common.RemoveUnusedNodesPass(), common.OutputFixPass(), common.ClearMetadataAndDocStringPass()):
        change(model)
    ends = {id(value) for value in (*model.graph.inputs, *model.graph.outputs)}
    for node in model.graph:
        for value in node.outputs:
            if id(value) not in ends:  # every runtime infers them again
                value.type = value.shape = None
    return model


class _Parts:
    """What the graphs have put together so far."""

    def __init__(self, same_input: bool):
        self.same_input = same_input
        self.weights: dict[str, ir.Value] = {}
        self.constants: dict[tuple, ir.Value] = {}
        self.inputs: dict[str, ir.Value] = {}
        self.outputs: list[ir.Value] = []
        self.nodes: list[ir.Node] = []
        self.opsets: dict[str, int] = {}
        self.version = 0

    def add(self, graph: TaskGraph, opset: int | None) -> None:
        """Takes the nodes of a task's graph; its weights, constants and inputs are those already there, if they are."""
        model = graph.to_onnx(opset)
        source = model.graph
        if model.functions:
            common.InlinePass()(model)
        self.version = max(self.version, model.ir_version)
        self.opsets |= source.opset_imports
        for number, value in enumerate(list(_values(source))):
            value.name = f"{graph.task}/{number}"
        given, ends, held = list(source.inputs), list(source.outputs), list(source.initializers.values())
        nodes = list(source)
        for container in (source.inputs, source.outputs, source.initializers):
            container.clear()
        for value, (key, tensor) in zip(given[: len(graph.tensors)], graph.tensors, strict=True):
            if key not in self.weights:
                self.weights[key] = _initializer(key, tensor)
            _replace(value, self.weights[key], ends)
        for value in held:
            constant = value.const_value
            content = constant.dtype, tuple(constant.shape), constant.tobytes()
            _replace(value, self.constants.setdefault(content, value), ends)
        batch = "batch" if self.same_input else f"{graph.task}.batch"
        for value, name in zip(given[len(graph.tensors) :], input_names(graph, self.same_input), strict=True):
            if name in self.inputs:
                _replace(value, self.inputs[name], ends)
            else:
                self.inputs[name] = value
                value.name = name
        source.remove(nodes)
        for at, (value, name) in enumerate(zip(ends, output_names(graph), strict=True)):
            if value.producer() is None or value in ends[:at]:  # an input or a weight, or the same twice
                copied = ir.node("Identity", [value])
                nodes.append(copied)
                ends[at] = copied.outputs[0]
                ends[at].type, ends[at].shape = value.type, value.shape
            ends[at].name = name
        for value in (*self.inputs.values(), *ends):
            _name_batch(value, batch)
        self.outputs += ends
        self.nodes += nodes

    def model(self) -> ir.Model:
        """All of it."""
        for number, value in enumerate(self.constants.values()):
            value.name = f"constant/{number}"
        stored = [*self.weights.values(), *self.constants.values()]
        for node in self.nodes:
            node.name = None
        inputs = list(self.inputs.values())
        graph = ir.Graph(
            inputs, self.outputs, nodes=self.nodes, initializers=stored, opset_imports=self.opsets, name="mtzip"
        )
        return ir.Model(graph, ir_version=self.version, producer_name="mtzip")


def _values(graph: ir.Graph):
    """Every value of a graph and of those inside it."""
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph.all_nodes():
        yield from node.outputs


def _replace(value: ir.Value, other: ir.Value, ends: list[ir.Value]) -> None:
    if value is not other:
        value.replace_all_uses_with(other)
        ends[:] = [other if end is value else end for end in ends]


def _initializer(key: str, tensor: Tensor) -> ir.Value:
    stored = TorchTensor(tensor.detach().cpu().contiguous(), name=key)
    return ir.Value(name=key, type=ir.TensorType(stored.dtype), shape=stored.shape, const_value=stored)


def _name_batch(value: ir.Value, name: str) -> None:
    """Gives the free first size of an input or output a name people can read."""
    if value.shape is not None and len(value.shape) and not isinstance(value.shape[0], int):
        if "batch" not in str(value.shape[0]):
            value.shape = ir.Shape([name, *list(value.shape)[1:]])


def _check_same_form(graphs: Sequence[TaskGraph]) -> None:
    first = graphs[0]
    for other in graphs[1:]:
        forms = [[(name, x.dtype, tuple(x.shape[1:])) for name, x in graph.inputs] for graph in (first, other)]
        if forms[0] != forms[1]:
            raise ValueError(
                f"same_input needs tasks with inputs of the same form, got {_form(first)} and {_form(other)}; "
                "export them without it"
            )


def _form(graph: TaskGraph) -> str:
    return f"{graph.task} " + ", ".join(f"{x.dtype} {['n', *x.shape[1:]]}" for _, x in graph.inputs)
