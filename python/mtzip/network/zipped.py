"""The zipped network: each task's own classes, with the weights that tasks share stored once."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import unknown_task
from .layout import Layout
from .leaf import leaves, replace_module
from .zeros import Zeros


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
    ``zipped(x)`` runs every task on the same input, what they compute alike once (:mod:`mtzip.deploy.together`). Both
    return a dict from task to output.

    ``state_dict`` holds each tensor once: ``shared.<path in the first task that has it>.<block>`` for what tasks
    share, ``networks.<task>.<path>`` for the rest. Made by :func:`mtzip.zip_networks` and :func:`mtzip.load`.
    """

    #: Whether :func:`mtzip.retrain` keeps zeros of its weights; which these are, the weights say.
    keep_zeros = False

    def __init__(self, networks: Mapping[str, nn.Module], report, originals: Mapping[str, nn.Module] | None = None):
        super().__init__()
        self.networks = nn.ModuleDict()
        for task, network in networks.items():
            check_name(task)
            self.networks[task] = network
        self.training = self.networks.training = any(network.training for network in networks.values())
        self.report = report
        self._originals = dict(originals) if originals else None
        #: Task to a small batch it was calibrated with: what it is exported with.
        self.example_inputs: dict[str, Any] = {}
        #: Task to what of its output counts, for those that :func:`mtzip.zip_networks` was told of.
        self.outputs: dict[str, Any] = {}
        self._together = None  # the graph of all tasks on one input
        #: Second moments of the shared layers, for :func:`mtzip.add_network`; None unless asked for, and after a load.
        self.moments: Any = None
        #: Task to path of a module to the original's neuron that each channel of its output is.
        self.orders: dict[str, dict[str, Tensor]] = {}

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
        # Not self.networks[task]: the look-ups of nn.Module take as long as a layer of a small network.
        network = self._modules["networks"]._modules.get(task)
        if network is None:
            raise unknown_task("task", task, self.tasks)
        return network

    def __iter__(self) -> Iterator[str]:
        return iter(self.tasks)

    def __len__(self) -> int:
        return len(self.networks)

    def __contains__(self, task: str) -> bool:
        return task in self.networks

    def forward(self, inputs: Any) -> dict[str, Any]:
        if isinstance(inputs, Mapping) and inputs and all(key in self.networks for key in inputs):
            return {task: self[task](value) for task, value in inputs.items()}
        if not (self.training or torch.is_grad_enabled() or torch.compiler.is_compiling()):
            if self._together is None:
                from ..deploy.together import Together

                self._together = Together()
            outputs = self._together(self, inputs)
            if outputs is not None:
                return outputs
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

    def zeros(self) -> Zeros:
        """The zeros its weights have now, for a training loop of your own: ``zeros.restore_()`` after every step."""
        return Zeros(self)

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
        outputs = {task: select for task, select in self.outputs.items() if not callable(select)}  # a lambda stays here
        return {**self.__dict__, "_originals": None, "_together": None, "outputs": outputs}

    def __deepcopy__(self, memo):
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        new._originals, new.outputs = self._originals, dict(self.outputs)
        return new
