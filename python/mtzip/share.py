"""The zipped network: each task's own classes, with the weights that tasks share stored once.

A layer with shared neurons becomes a *leaf*: a subclass of the layer's own class that assembles its weight from
blocks. Rows and columns of a layer fall into runs, a run being consecutive neurons stored by the same set of tasks, and
there is one block for every pair (tasks sharing the rows, tasks sharing the columns)::

                  columns of A and B    columns of A alone
    rows of A, B  [ shared by A and B |  private to A      ]
    rows of A     [ private to A                           ]

A block that two tasks share is one ``nn.Parameter``, registered in the leaves of both. Optimisers, ``deepcopy``, pickle
and ``torch.save`` see plain parameters; :class:`ZippedNetwork` lists each once.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import unknown_task


@dataclass(frozen=True)
class Run:
    """``size`` consecutive neurons that exactly the tasks with indices ``tasks`` store together."""

    tasks: tuple[int, ...]
    size: int


@dataclass(frozen=True)
class Layout:
    """How the tensors of one task's layer are cut into blocks.

    Args:
        task: index of the task this leaf belongs to; a member of every run.
        rows: runs of output neurons, shared ones first.
        columns: runs of input neurons (input channels of a convolution).
        bias: runs of the bias, None for a layer without one. A bias private to the task is a single run of all rows.
        scaled: how many leading rows carry a private scale, ``y = scale * (W x) + bias``.
    """

    task: int
    rows: tuple[Run, ...]
    columns: tuple[Run, ...]
    bias: tuple[Run, ...] | None
    scaled: int = 0

    def weight_blocks(self) -> dict[str, tuple[int, int]]:
        """Name to (rows, columns) of every weight block, in the order they are assembled."""
        shapes: dict[str, tuple[int, int]] = {}
        for row in self.rows:
            for column in self.columns:
                name = block_name(row, column)
                shapes[name] = (row.size, shapes.get(name, (0, 0))[1] + column.size)
        return shapes

    def bias_blocks(self) -> dict[str, int]:
        """Name to length of every bias block, in the order they are assembled."""
        return {_bias_name(run): run.size for run in self.bias or ()}

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, for a manifest."""

        def runs(items: tuple[Run, ...]) -> list[list[Any]]:
            return [[list(run.tasks), run.size] for run in items]

        bias = None if self.bias is None else runs(self.bias)
        return {
            "task": self.task,
            "rows": runs(self.rows),
            "columns": runs(self.columns),
            "bias": bias,
            "scaled": self.scaled,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Layout:
        """The inverse of :meth:`to_dict`."""

        def runs(items: list[list[Any]]) -> tuple[Run, ...]:
            return tuple(Run(tuple(int(task) for task in tasks), int(size)) for tasks, size in items)

        bias = None if data["bias"] is None else runs(data["bias"])
        return cls(int(data["task"]), runs(data["rows"]), runs(data["columns"]), bias, int(data["scaled"]))


def block_name(row: Run, column: Run) -> str:
    """Name of the block at this row and column run: it is stored by the tasks that share both."""
    both = [task for task in row.tasks if task in column.tasks]
    return f"weight_rows_{_join(row.tasks)}_columns_{_join(both)}"


def _bias_name(run: Run) -> str:
    return f"bias_rows_{_join(run.tasks)}"


def _join(tasks) -> str:
    return "_".join(map(str, tasks))


class SharedLayer:
    """Mixin of the leaf classes: ``weight`` and ``bias`` are assembled from blocks that tasks may share.

    ``weight`` is the effective weight, private scale included, so a ``forward`` that reads ``layer.weight`` itself
    computes the right thing. Where the whole layer is shared and carries no scale, ``weight`` is the shared Parameter.
    """

    plain: type[nn.Module]
    layout: Layout

    @classmethod
    def wrap(cls, layer: nn.Module, layout: Layout, blocks: Mapping[str, nn.Parameter]) -> SharedLayer:
        """A leaf with the settings of ``layer`` and these blocks; ``layer`` itself is not changed.

        Args:
            layer: an instance of ``cls.plain``.
            layout: how the blocks make up the layer.
            blocks: every name of ``layout.weight_blocks()`` and ``layout.bias_blocks()``, and ``scale`` if scaled.
        """
        leaf = cls.__new__(cls)
        # Hooks and child modules lie in dicts: copied, or a hook on the leaf would be a hook on the layer.
        leaf.__dict__.update({key: copy.copy(v) if isinstance(v, dict) else v for key, v in layer.__dict__.items()})
        leaf._parameters = {}
        leaf.layout = layout
        for name, parameter in blocks.items():
            leaf.register_parameter(name, parameter)
        return leaf

    def dense(self) -> nn.Module:
        """The layer as its plain class again, with a weight and bias of its own."""
        layer = self.plain.__new__(self.plain)
        layer.__dict__.update({key: value for key, value in self.__dict__.items() if key != "layout"})
        layer._parameters = {}
        layer._buffers = dict(self._buffers)
        bias = self.bias
        layer.register_parameter("weight", nn.Parameter(self.weight.detach().clone()))
        layer.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach().clone()))
        return layer

    @property
    def is_whole(self) -> bool:
        """True where one block is the entire weight, so that using it copies nothing."""
        return len(self.layout.rows) == 1 and len(self.layout.weight_blocks()) == 1

    def _unscaled_weight(self) -> Tensor:
        if self.is_whole:
            return self._parameters[next(iter(self.layout.weight_blocks()))]
        rows = []
        for row in self.layout.rows:
            taken: dict[str, int] = {}
            parts = []
            for column in self.layout.columns:
                name = block_name(row, column)
                start = taken.get(name, 0)
                taken[name] = start + column.size
                parts.append(self._parameters[name][:, start : start + column.size])
            rows.append(torch.cat(parts, 1) if len(parts) > 1 else parts[0])
        return torch.cat(rows) if len(rows) > 1 else rows[0]

    def _full_scale(self) -> Tensor:
        scale = self._parameters["scale"]
        rest = sum(run.size for run in self.layout.rows) - scale.numel()
        return torch.cat([scale, scale.new_ones(rest)]) if rest else scale

    @property
    def weight(self) -> Tensor:
        weight = self._unscaled_weight()
        if not self.layout.scaled:
            return weight
        return weight * self._full_scale().view(-1, *[1] * (weight.dim() - 1))

    @property
    def bias(self) -> Tensor | None:
        if self.layout.bias is None:
            return None
        parts = [self._parameters[name] for name in self.layout.bias_blocks()]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def forward(self, input: Tensor) -> Tensor:
        if not (self.layout.scaled and self.is_whole):
            return super().forward(input)
        # Scaling the output keeps the shared weight as it is; scaling the weight would copy it at every call.
        output = self._apply_weight(input, self._unscaled_weight())
        channel = (-1,) + (1,) * self._trailing
        output = output * self._full_scale().to(output.dtype).view(channel)  # autocast: stay in its type
        return output if self.layout.bias is None else output + self.bias.to(output.dtype).view(channel)

    _trailing = 0  # dimensions of the output behind the channel

    def _apply_weight(self, input: Tensor, weight: Tensor) -> Tensor:
        return self._conv_forward(input, weight, None)


class SharedLinear(SharedLayer, nn.Linear):
    """An ``nn.Linear`` of a zipped network."""

    plain = nn.Linear

    def _apply_weight(self, input: Tensor, weight: Tensor) -> Tensor:
        return F.linear(input, weight)


class SharedConv1d(SharedLayer, nn.Conv1d):
    """An ``nn.Conv1d`` of a zipped network."""

    plain = nn.Conv1d
    _trailing = 1


class SharedConv2d(SharedLayer, nn.Conv2d):
    """An ``nn.Conv2d`` of a zipped network."""

    plain = nn.Conv2d
    _trailing = 2


class SharedConv3d(SharedLayer, nn.Conv3d):
    """An ``nn.Conv3d`` of a zipped network."""

    plain = nn.Conv3d
    _trailing = 3


#: Plain layer class to its leaf. A class that is not here (a user's own subclass included) stays private.
LEAVES: dict[type[nn.Module], type[SharedLayer]] = {
    leaf.plain: leaf for leaf in (SharedLinear, SharedConv1d, SharedConv2d, SharedConv3d)
}


def replace_module(root: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """Replaces every reference to ``old`` inside ``root``; returns the root, which is ``new`` if it was ``old``."""
    if root is old:
        return new
    for module in root.modules():
        for name, child in module._modules.items():
            if child is old:
                module._modules[name] = new
    return root


def leaves(network: nn.Module) -> Iterator[tuple[str, SharedLayer]]:
    """Path and leaf of every layer of ``network`` that stores shared blocks."""
    for path, module in network.named_modules():
        if isinstance(module, SharedLayer):
            yield path, module


def check_name(task: Any) -> None:
    """ValueError for what cannot name a task."""
    if not isinstance(task, str) or not task or "." in task or hasattr(nn.ModuleDict, task) or task == "training":
        raise ValueError(
            f"a task's name must be a non-empty string without '.' that is no attribute of nn.ModuleDict, "
            f"got {task!r}; the keys of the state dict are networks.<task>.<path>: choose another name"
        )


class ZippedNetwork(nn.Module):
    """Several networks, one per task, that store the weights they share once.

    ``zipped["a"]`` is task a's network, of the class it always had; ``zipped({"a": xa, "b": xb})`` runs several tasks;
    ``zipped(x)`` runs every task on the same input. Both return a dict from task to output.

    ``state_dict`` holds each tensor once: ``shared.<path in the first task that has it>.<block>`` for what tasks
    share, ``networks.<task>.<path>`` for the rest. Made by :func:`mtzip.zip_networks` and :func:`mtzip.load`.
    """

    def __init__(self, networks: Mapping[str, nn.Module], report, originals: Mapping[str, nn.Module] | None = None):
        super().__init__()
        self.networks = nn.ModuleDict()
        for task, network in networks.items():
            check_name(task)
            self.networks[task] = network
        self.training = self.networks.training = any(network.training for network in networks.values())
        self.report = report
        self._originals = dict(originals) if originals else None

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks, in the order the caller gave them."""
        return tuple(self.networks)

    @property
    def originals(self) -> dict[str, nn.Module] | None:
        """Frozen copies of the networks before zipping, the teachers of :func:`mtzip.retrain`; None after a load.

        They are no submodules: neither ``parameters()``, ``state_dict()``, pickle nor :func:`mtzip.save` has them.
        """
        return self._originals

    def forget_originals(self) -> None:
        """Lets go of the originals, and of the memory they take."""
        self._originals = None

    def __getitem__(self, task: str) -> nn.Module:
        if task not in self.networks:
            raise unknown_task("task", task, self.tasks)
        return self.networks[task]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tasks)

    def __len__(self) -> int:
        return len(self.networks)

    def __contains__(self, task: str) -> bool:
        return task in self.networks

    def forward(self, inputs: Any) -> dict[str, Any]:
        if isinstance(inputs, Mapping) and inputs and all(key in self.networks for key in inputs):
            return {task: self[task](value) for task, value in inputs.items()}
        return {task: network(inputs) for task, network in self.networks.items()}

    def extract(self, task: str) -> nn.Module:
        """Task ``task`` as a network of the original classes with dense weights of its own, sharing nothing."""
        network = copy.deepcopy(self[task])
        for _, leaf in list(leaves(network)):
            network = replace_module(network, leaf, leaf.dense())
        return network

    def layouts(self) -> dict[str, dict[str, Layout]]:
        """Task to path to :class:`Layout` of every leaf: with the tensors, all that :func:`mtzip.load` needs."""
        return {task: {path: leaf.layout for path, leaf in leaves(self[task])} for task in self.tasks}

    def parameter_count(self) -> int:
        """Parameters stored, each shared one counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    # -- one entry a tensor in the state dict ------------------------------------------------------------------

    def shared_keys(self) -> dict[str, list[str]]:
        """``shared.*`` key of every parameter that several tasks store to the ``networks.*`` keys it stands for."""
        owners: dict[int, list[tuple[str, str]]] = {}
        for task, network in self.networks.items():
            for path, parameter in network.named_parameters(remove_duplicate=False):
                owners.setdefault(id(parameter), []).append((task, path))
        keys: dict[str, list[str]] = {}
        for places in owners.values():
            if len({task for task, _ in places}) > 1:
                name = f"shared.{places[0][1]}"
                while name in keys:  # the same path in different tasks may be different layers
                    name += "_"
                keys[name] = [f"networks.{task}.{path}" for task, path in places]
        return keys

    def state_dict(self, *args, destination=None, prefix: str = "", keep_vars: bool = False):
        state = super().state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)
        for key, aliases in self.shared_keys().items():
            values = [state.pop(prefix + alias) for alias in aliases]
            state[prefix + key] = values[0]
        return state

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        for key, aliases in self.shared_keys().items():
            if prefix + key in state_dict:
                value = state_dict.pop(prefix + key)
                if local_metadata.get("assign_to_params_buffers") and not isinstance(value, nn.Parameter):
                    value = nn.Parameter(value)  # wrapped once here, or every task would get a Parameter of its own
                for alias in aliases:
                    state_dict[prefix + alias] = value
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    # -- copies do not take the originals along ----------------------------------------------------------------

    def __getstate__(self):
        return {**self.__dict__, "_originals": None}

    def __deepcopy__(self, memo):
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        new._originals = self._originals
        return new
