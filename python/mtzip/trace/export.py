"""From an ``nn.Module`` to a flat graph of ATen calls, by ``torch.export``."""

from __future__ import annotations

import copy
import os
import traceback
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
from .graphs import inline
from .select import Select, selected
from .writes import functionalise


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
        select: what of the network's output counts.
    """

    task: str
    network: nn.Module
    graph: fx.Graph
    tensors: dict[str, str]
    constants: dict[str, Any]
    inputs: list[str]
    example: Batch
    fixed_batch: int | None
    select: Select = None

    def outputs(self, network: nn.Module, batch: Batch) -> list[Tensor]:
        """The tensors that ``network`` puts out for a batch and that count, on floating numbers."""
        leaves = pytree.tree_leaves(selected(network(*batch.args, **batch.kwargs), self.select))
        return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.numel()]

    def tensor(self, path: str, network: nn.Module | None = None) -> Tensor:
        """Parameter or buffer ``path`` of ``network`` (default: the evaluation copy)."""
        return _tensor(network or self.network, path)


def evaluation_copy(network: nn.Module) -> nn.Module:
    """A frozen copy in evaluation mode; the original is not touched."""
    new = copy.deepcopy(network).eval()
    return new.requires_grad_(False)


def export(task: str, network: nn.Module, batch: Batch, select: Select = None) -> Exported:
    """Traces a copy of ``network`` with a dynamic batch dimension.

    Args:
        task: name, for messages.
        network: any module ``torch.export`` can trace.
        batch: an example; at least two of its samples are used, since export specialises a batch of one.
        select: what of its output counts: a name, an index or a function; None takes tensors as they are, and of a
            Hugging Face ``ModelOutput`` or another dataclass its tensors.

    Raises:
        ZipError: the network cannot be exported; says where and what to do.
    """
    if not hasattr(Dim, "AUTO"):
        raise ZipError(
            f"torch {torch.__version__} cannot trace networks for mtzip: its torch.export has no Dim.AUTO, expected "
            "torch 2.6 or newer; upgrade torch (mtz_ext alone runs from 2.4 on)"
        )
    network = evaluation_copy(network)
    if select is not None:
        _check_select(task, network, _example(batch), select)
    try:
        return _export(task, network, _example(batch), select)
    except ZipError:
        # A forward that fixes the batch size runs on whole batches only.
        if _example(batch).size == batch.size:
            raise
    return _export(task, network, Batch(batch.args, batch.kwargs), select)


def _check_select(task: str, network: nn.Module, example: Batch, select: Select) -> None:
    """Refuses a selection that does not fit: torch.export would say it with the traceback of its own frames."""
    with torch.no_grad():
        output = network(*example.args, **example.kwargs)
    try:
        leaves = pytree.tree_leaves(selected(output, select))
    except Exception as error:
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        raise ZipError(
            f"outputs[{task!r}] must be a name, index or function that fits what the network puts out, got {select!r} "
            f"for {type(output).__name__}: {text}"
        ) from error
    if not any(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in leaves):
        found = ", ".join(type(leaf).__name__ for leaf in leaves) or "nothing"
        raise ZipError(
            f"outputs[{task!r}] must select at least one floating-point tensor, got {found} by {select!r}; "
            "choose another part of the output"
        )


class _Selected(nn.Module):
    """A network that takes its arguments as one tuple and one dict and gives what of its output counts."""

    def __init__(self, network: nn.Module, select: Select):
        super().__init__()
        self.network, self._select = network, select

    def forward(self, args: tuple, kwargs: dict) -> Any:
        return selected(self.network(*args, **kwargs), self._select)


def _export(task: str, network: nn.Module, example: Batch, select: Select) -> Exported:
    size = example.size

    def dims(leaf):
        if not isinstance(leaf, Tensor):
            return None
        return {0: Dim.AUTO} if leaf.dim() and leaf.shape[0] == size else {}

    arguments = (example.args, example.kwargs)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(
                _Selected(network, select), arguments, dynamic_shapes=pytree.tree_map(dims, arguments), strict=False
            )
    except Exception as error:
        raise ZipError(_refusal(task, network, error)) from error
    inline(program.graph_module)
    functionalise(program.graph)
    tensors, constants, inputs = {}, {}, []
    canonical: dict[int, str] = {}  # a tensor that has several paths goes by the first
    for spec in program.graph_signature.input_specs:
        name = spec.arg.name
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            path = spec.target.removeprefix("network.")
            tensors[name] = canonical.setdefault(id(_tensor(network, path)), path)
        elif spec.kind is InputKind.USER_INPUT:
            inputs.append(name)
        else:
            constants[name] = program.constants.get(spec.target)
    for node in program.graph.nodes:  # the graphs that higher-order operators call
        if node.op == "get_attr":
            constants[node.name] = getattr(program.graph_module, node.target)
    fixed = None
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.name in inputs and isinstance(value, Tensor) and value.dim():
            fixed = size if _constant(value.shape[0]) == size else fixed
    return Exported(task, network, program.graph, tensors, constants, inputs, example, fixed, select)


def _refusal(task: str, network: nn.Module, error: Exception) -> str:
    """What torch.export did not understand, where in the user's code, and what to do."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    what = f"{type(error).__name__}: {lines[0] if lines else ''}"
    here = (os.path.dirname(torch.__file__), os.path.dirname(__file__))
    frames = [
        frame
        for cause in (error, error.__cause__, error.__context__)
        if cause is not None
        for frame in traceback.extract_tb(cause.__traceback__)
        if not frame.filename.startswith((*here, "<"))
    ]
    place = ""
    if frames:
        last = frames[-1]
        place = f"\nIt stopped at {last.filename}:{last.lineno}, in {last.name}: {last.line}"
    return (
        f"task {task!r}: {type(network).__name__} cannot be exported by torch.export: {what}{place}\n"
        "Make its forward free of control flow that depends on values (torch.where instead of if), or wrap it in a "
        "module whose forward takes tensors and returns tensors."
    )


def _tensor(network: nn.Module, path: str) -> Tensor:
    owner, _, name = path.rpartition(".")
    return getattr(network.get_submodule(owner), name)


def _constant(size: int | torch.SymInt) -> int | None:
    """The number a size is bound to, None for one that is free."""
    return size if isinstance(size, int) else size.node.maybe_as_int()


def _example(batch: Batch) -> Batch:
    """Two or three samples; a single one is repeated."""
    size = batch.size
    if size > 1:
        return Batch(batch.args, batch.kwargs).narrow(0, min(size, 3))

    def repeat(leaf):
        batched = isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == size
        return torch.cat([leaf] * 3) if batched else leaf

    return Batch(*(pytree.tree_map(repeat, part) for part in (batch.args, batch.kwargs, None)))
