"""From an ``nn.Module`` to a flat graph of ATen calls, by ``torch.export``."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from ..errors import ZipError
from ..inputs import Batch


@dataclass
class Exported:
    """A network in evaluation mode and its graph.

    Args:
        task: name of the task.
        network: a frozen evaluation copy of the user's network.
        graph: the flat ATen graph.
        tensors: placeholder name to path of the parameter or buffer it stands for.
        constants: node name to what the graph holds by itself: tensors, and graphs it calls.
        inputs: placeholder names of the network's inputs, in the order of the flattened (args, kwargs).
        example: the batch it was traced with.
        fixed_batch: batch size the graph insists on, None if any will do.
    """

    task: str
    network: nn.Module
    graph: fx.Graph
    tensors: dict[str, str]
    constants: dict[str, Any]
    inputs: list[str]
    example: Batch
    fixed_batch: int | None

    def tensor(self, path: str, network: nn.Module | None = None) -> Tensor:
        """Parameter or buffer ``path`` of ``network`` (default: the evaluation copy)."""
        owner, _, name = path.rpartition(".")
        return getattr((network or self.network).get_submodule(owner), name)


def evaluation_copy(network: nn.Module) -> nn.Module:
    """A frozen copy in evaluation mode; the original is not touched."""
    new = copy.deepcopy(network).eval()
    return new.requires_grad_(False)


def export(task: str, network: nn.Module, batch: Batch) -> Exported:
    """Traces a copy of ``network`` with a dynamic batch dimension.

    Args:
        task: name, for messages.
        network: any module ``torch.export`` can trace.
        batch: an example; at least two of its samples are used, since export specialises a batch of one.

    Raises:
        ZipError: the network cannot be exported; says where and what to do.
    """
    network = evaluation_copy(network)
    try:
        return _export(task, network, _example(batch))
    except ZipError:
        # A forward that fixes the batch size runs on whole batches only.
        if _example(batch).size == batch.size:
            raise
    return _export(task, network, Batch(batch.args, batch.kwargs))


def _export(task: str, network: nn.Module, example: Batch) -> Exported:
    size = example.size

    def dims(leaf):
        if not isinstance(leaf, Tensor):
            return None
        return {0: Dim.AUTO} if leaf.dim() and leaf.shape[0] == size else {}

    shapes = pytree.tree_map(dims, (example.args, example.kwargs))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(
                network, example.args, example.kwargs, dynamic_shapes=_by_name(network, *shapes), strict=False
            )
    except Exception as error:
        raise ZipError(
            f"task {task!r}: {type(network).__name__} cannot be exported by torch.export: {_first_line(error)}\n"
            "Make its forward free of control flow that depends on values, or wrap it in a module whose forward takes "
            "tensors and returns tensors."
        ) from error
    _functionalise(program.graph)
    tensors, constants, inputs = {}, {}, []
    for spec in program.graph_signature.input_specs:
        name = spec.arg.name
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            tensors[name] = spec.target
        elif spec.kind is InputKind.USER_INPUT:
            inputs.append(name)
        else:
            constants[name] = program.constants.get(spec.target)
    for node in program.graph.nodes:  # the graphs that higher-order operators call, as torch.no_grad() leaves them
        if node.op == "get_attr":
            constants[node.name] = getattr(program.graph_module, node.target)
    fixed = None
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.name in inputs and isinstance(value, Tensor) and value.dim():
            fixed = size if _constant(value.shape[0]) == size else fixed
    return Exported(task, network, program.graph, tensors, constants, inputs, example, fixed)


def _constant(size: int | torch.SymInt) -> int | None:
    """The number a size is bound to, None for one that is free."""
    return size if isinstance(size, int) else size.node.maybe_as_int()


def _functionalise(graph: fx.Graph) -> None:
    """Replaces in-place operators (``relu_``) by their twins: running the graph changes no value it still needs."""
    order = {node: at for at, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.is_mutable:
            continue
        name = node.target._schema.name.split("::")[-1]
        twin = getattr(torch.ops.aten, name[:-1], None) if name.endswith("_") else None
        twin = getattr(twin, node.target._overloadname, None)
        if twin is None or not node.args:
            continue
        changed = node.args[0]
        for user in list(changed.users):
            if user is not node and order[user] > order[node]:
                user.replace_input_with(changed, node)
        node.target = twin


def _example(batch: Batch) -> Batch:
    """Two or three samples; a single one is repeated."""
    size = batch.size
    if size > 1:
        return Batch(batch.args, batch.kwargs).narrow(0, min(size, 3))

    def repeat(leaf):
        batched = isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == size
        return torch.cat([leaf] * 3) if batched else leaf

    return Batch(*(pytree.tree_map(repeat, part) for part in (batch.args, batch.kwargs, None)))


def _by_name(network: nn.Module, args: tuple, kwargs: dict) -> Any:
    """torch.export wants one dict by parameter name as soon as there are keyword arguments."""
    if not kwargs:
        return args
    import inspect

    names = list(inspect.signature(network.forward).parameters)
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
