"""One task's network as an exported program whose weights are inputs.

Weights that come in as inputs are not constants: no optimiser folds two blocks of a weight into a dense copy, nor a
BatchNorm into a weight that other tasks share. Whoever writes the program out puts the stored tensors in their place.
"""

from __future__ import annotations

import copy
import inspect
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.func import functional_call
from torch.utils import _pytree as pytree

from ..errors import ZipError
from ..inputs import Batch
from ..share import ZippedNetwork
from .example import example_of

if TYPE_CHECKING:
    import onnx_ir


@dataclass
class TaskGraph:
    """A task's network, exported.

    Args:
        task: its name.
        program: its inputs are ``tensors``, then the tensors of ``inputs``; its outputs ``outputs``.
        tensors: key in the zipped network's state dict and value of every parameter and buffer; one that the network
            has at several places comes as often.
        inputs: name within the call ("" for the only one) and example of every input.
        outputs: name within the result ("" for the only one) and value on the example of every output.
        batch: samples of the example.
    """

    task: str
    program: ExportedProgram
    tensors: list[tuple[str, Tensor]]
    inputs: list[tuple[str, Tensor]]
    outputs: list[tuple[str, Tensor]]
    batch: int

    def to_onnx(self, opset: int | None) -> onnx_ir.Model:
        """The program in ONNX' operators, weights still inputs."""
        try:
            with _quiet():
                return torch.onnx.export(self.program, dynamo=True, verbose=False, opset_version=opset).model
        except Exception as error:  # the exporter's own errors have no common class
            raise ZipError(f"task {self.task!r} cannot be written as ONNX: {_first_line(error)}") from error


def task_graphs(
    zipped: ZippedNetwork, tasks: Sequence[str], example: Mapping[str, Any] | None = None
) -> list[TaskGraph]:
    """Exports the networks of ``tasks`` in evaluation mode; ``zipped`` is not changed.

    Args:
        zipped: the network.
        tasks: names.
        example: task to a batch of inputs, for those whose remembered one is not to be used.

    Raises:
        ValueError: no example input.
        ZipError: a network cannot be exported.
    """
    keys: dict[int, str] = {}
    for key, tensor in zipped.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor):
            keys.setdefault(id(tensor), key)
    return [
        _task_graph(task, zipped[task], example_of(task, zipped[task], example, zipped.example_inputs), keys)
        for task in tasks
    ]


def frozen_view(network: nn.Module) -> nn.Module:
    """The network's modules again, in evaluation mode, around the same parameters and buffers."""
    kept = [*network.parameters(), *network.buffers()]
    return copy.deepcopy(network, {id(tensor): tensor for tensor in kept}).eval()


def _task_graph(task: str, network: nn.Module, example: Batch, keys: Mapping[int, str]) -> TaskGraph:
    call = _Call(frozen_view(network), example)
    named = [
        *call.network.named_parameters(remove_duplicate=False),
        *call.network.named_buffers(remove_duplicate=False),
    ]
    tensors = [tensor.detach() for _, tensor in named]
    call.paths = [path for path, _ in named]
    size = example.size
    batched = [{0: Dim.AUTO} if x.dim() and x.shape[0] == size else None for x in call.inputs]
    try:
        with _quiet(), torch.no_grad():
            outputs = call(tensors, call.inputs)
            program = torch.export.export(
                call, (tensors, call.inputs), dynamic_shapes=([None] * len(tensors), batched), strict=False
            )
    except Exception as error:
        raise ZipError(
            f"task {task!r}: {type(network).__name__} cannot be exported on the example input: {_first_line(error)}"
        ) from error
    stored = [(keys.get(id(tensor), f"networks.{task}.{path}"), tensor.detach()) for path, tensor in named]
    return TaskGraph(
        task,
        program,
        stored,
        list(zip(call.input_names, call.inputs, strict=True)),
        list(zip(call.output_names, outputs, strict=True)),
        size,
    )


class _Call(nn.Module):
    """``forward(tensors, inputs)``: a call of a network with these parameters and buffers on these inputs."""

    def __init__(self, network: nn.Module, example: Batch):
        super().__init__()
        self._held = [network]  # in a list: its parameters are not to be parameters of this
        leaves, self._form = pytree.tree_flatten((example.args, example.kwargs))
        self._fixed = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._places = [at for at, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self.inputs = [leaves[at] for at in self._places]
        self.input_names = _input_names(network, example)
        self.output_names: list[str] = []
        self.paths: list[str] = []

    @property
    def network(self) -> nn.Module:
        return self._held[0]

    def forward(self, tensors: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
        leaves = list(self._fixed)
        for at, value in zip(self._places, inputs, strict=True):
            leaves[at] = value
        args, kwargs = pytree.tree_unflatten(leaves, self._form)
        state = dict(zip(self.paths, tensors, strict=True))
        result = functional_call(self.network, state, args, kwargs, tie_weights=False)
        named = [(_text(path), leaf) for path, leaf in pytree.tree_leaves_with_path(result) if isinstance(leaf, Tensor)]
        self.output_names = [name for name, _ in named] if len(named) > 1 else [""]
        return [leaf for _, leaf in named]


def _input_names(network: nn.Module, example: Batch) -> list[str]:
    """Name of every tensor among a call's arguments, by the parameters of ``forward``; "" for the only one."""
    parameters = inspect.signature(network.forward).parameters.values()
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    names += [str(at) for at in range(len(names), len(example.args))]
    given = {**dict(zip(names, example.args, strict=False)), **example.kwargs}
    found = [_text(path) for path, leaf in pytree.tree_leaves_with_path(given) if isinstance(leaf, Tensor)]
    return found if len(found) > 1 else [""]


def _text(path: tuple[Any, ...]) -> str:
    """A place in nested containers: keys and indices with dots between."""
    return ".".join(str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path)


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's warnings: what matters comes as an error."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
