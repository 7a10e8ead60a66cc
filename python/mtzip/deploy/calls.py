"""The calls of several tasks' networks as one function of stored tensors and inputs.

Weights that come in as inputs are not constants: no optimiser folds two blocks of a weight into a dense copy, nor a
BatchNorm into a weight that other tasks share. Whoever writes a program out puts the stored tensors in their place.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from ..errors import ZipError, first_line
from ..inputs import Batch
from ..network.assembly import assembled_anew
from ..network.example import example_of
from ..network.zipped import ZippedNetwork
from ..trace.select import Select, selected


class Calls(nn.Module):
    """``forward(tensors, inputs)``: one call of every task's network, in evaluation mode.

    Args:
        zipped: the network; not changed, and its tensors not copied.
        tasks: names of the tasks to call.
        example: task to a batch of inputs, for those whose remembered one is not to be used.
        select: task to what of its network's output counts; a task not named puts out all its tensors.

    Attributes:
        tasks: in their order.
        tensors: key in the zipped network's state dict to every parameter and buffer the networks compute with.
        inputs: for every task the tensors of its example.
        input_names: for every task their names within the call, "" for the only one.
        output_names: for every task the names within what its network returns, "" for the only one.

    Raises:
        ValueError: no example input.
        ZipError: a network does not run on its example.
    """

    def __init__(
        self,
        zipped: ZippedNetwork,
        tasks: Sequence[str],
        example: Mapping[str, Any] | None = None,
        select: Mapping[str, Select] | None = None,
    ):
        super().__init__()
        self.tasks = list(tasks)
        keys: dict[int, str] = {}
        for key, tensor in zipped.state_dict(keep_vars=True).items():
            keys.setdefault(id(tensor), key)
        self.tensors: dict[str, Tensor] = {}
        self._calls: list[_Call] = []
        for task in tasks:
            call = _Call(zipped[task], example_of(task, zipped[task], example, zipped.example_inputs))
            call.select = (select or {}).get(task)
            for path, tensor in call.named_tensors():
                key = keys.setdefault(id(tensor), f"networks.{task}.{path}")
                self.tensors[key] = tensor
                call.keys[path] = key
            self._calls.append(call)
        self.inputs = [call.inputs for call in self._calls]
        self.input_names = [call.input_names for call in self._calls]
        with torch.no_grad(), assembled_anew():
            self(self.tensors, self.inputs)
        self.output_names = [call.output_names for call in self._calls]

    def forward(self, tensors: Mapping[str, Tensor], inputs: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
        """Every task's outputs.

        Args:
            tensors: as ``self.tensors``.
            inputs: as ``self.inputs``, of any batch size.
        """
        results = []
        for task, call, given in zip(self.tasks, self._calls, inputs, strict=True):
            try:
                results.append(call(tensors, given))
            except Exception as error:
                raise ZipError(
                    f"task {task!r}: {call.name} cannot run on the example input: {first_line(error)}"
                ) from error
        return results


class SameInput(nn.Module):
    """The calls on the same inputs."""

    def __init__(self, calls: Calls):
        super().__init__()
        self._held = [calls]

    def forward(self, tensors: dict[str, Tensor], inputs: list[Tensor]) -> list[list[Tensor]]:
        # An alias a task: operators that give back what they got, as flatten may, would tie the tasks together.
        alias = torch.ops.aten.alias.default
        return self._held[0](tensors, [[alias(x) for x in inputs] for _ in self._held[0].tasks])


class _Call:
    """A call of one network: the form of its arguments, and the names of what goes in and out."""

    def __init__(self, network: nn.Module, example: Batch):
        kept = [*network.parameters(), *network.buffers()]
        # The modules are copied, for their mode; the tensors are not.
        self.network = copy.deepcopy(network, {id(tensor): tensor for tensor in kept}).eval()
        self.name = type(network).__name__
        self.keys: dict[str, str] = {}  # path to key
        leaves, self._form = pytree.tree_flatten((example.args, example.kwargs))
        self._fixed = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._places = [at for at, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        # As they lie in a file: strides of an example would be taken for the network's.
        self.inputs = [leaves[at].contiguous() for at in self._places]
        self.input_names = _input_names(network, example)
        self.output_names: list[str] = []
        self.select: Select = None

    def named_tensors(self) -> list[tuple[str, Tensor]]:
        """Path and value of parameters and buffers; one that is at several places comes as often."""
        places = self.network.named_parameters, self.network.named_buffers
        return [item for named in places for item in named(remove_duplicate=False)]

    def __call__(self, tensors: Mapping[str, Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
        leaves = list(self._fixed)
        for at, value in zip(self._places, inputs, strict=True):
            leaves[at] = value
        args, kwargs = pytree.tree_unflatten(leaves, self._form)
        state = {path: tensors[key] for path, key in self.keys.items()}
        result = functional_call(self.network, state, args, kwargs, tie_weights=False)
        if self.select is not None:
            result = selected(result, self.select)
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
