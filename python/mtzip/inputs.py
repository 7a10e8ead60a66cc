"""Calibration inputs and training batches, brought to one form.

A batch is what a user's loop gets from a loader: a tensor, ``(inputs, targets)``, or a dict of keyword arguments as
Hugging Face collators make them (``labels`` is the target). Inputs that are a tuple are positional arguments.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset, IterableDataset

#: Samples per chunk when the calibration set is one tensor: large enough for the products, small enough for the cache.
CHUNK = 256

_TARGET_KEYS = ("labels", "label", "targets", "target")


@dataclass
class Batch:
    """Arguments of one call of a network, and the targets that came along (None without)."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    targets: Any = None

    @property
    def size(self) -> int:
        """Number of samples: the first dimension of the first tensor."""
        for leaf in pytree.tree_leaves((self.args, self.kwargs)):
            if isinstance(leaf, Tensor) and leaf.dim():
                return leaf.shape[0]
        raise ValueError("a batch must hold a tensor with a batch dimension, got none; give inputs as tensors")

    def to(self, device: torch.device) -> Batch:
        """The batch with every tensor on ``device``."""

        def move(leaf):
            return leaf.to(device) if isinstance(leaf, Tensor) else leaf

        return Batch(*(pytree.tree_map(move, part) for part in (self.args, self.kwargs, self.targets)))

    def narrow(self, start: int, length: int) -> Batch:
        """Samples ``start`` to ``start + length``."""
        size = self.size

        def cut(leaf):
            batched = isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == size
            return leaf[start : start + length] if batched else leaf

        return Batch(*(pytree.tree_map(cut, part) for part in (self.args, self.kwargs, self.targets)))


def leading(batches: Iterable[Batch], samples: int) -> list[Batch]:
    """The first so many samples, batch by batch."""
    taken = []
    for batch in batches:
        if samples <= 0:
            break
        taken.append(batch.narrow(0, min(batch.size, samples)))
        samples -= batch.size
    return taken


def as_batch(item: Any) -> Batch:
    """One item of a loader as a :class:`Batch`.

    ``tensor``; ``(inputs, targets)`` as tuple or list; ``(inputs,)``; a mapping of keyword arguments.
    """
    if isinstance(item, Tensor):
        return Batch((item,), {})
    if isinstance(item, Mapping):
        kwargs = dict(item)
        targets = next((kwargs.pop(key) for key in _TARGET_KEYS if key in kwargs), None)
        return Batch((), kwargs, targets)
    if isinstance(item, (tuple, list)) and 1 <= len(item) <= 2:
        inputs = item[0]
        targets = item[1] if len(item) == 2 else None
        if isinstance(inputs, Mapping):
            return Batch((), dict(inputs), targets)
        if isinstance(inputs, (tuple, list)):
            return Batch(tuple(inputs), {}, targets)
        if isinstance(inputs, Tensor):
            return Batch((inputs,), {}, targets)
    raise TypeError(
        f"a batch must be a tensor, (inputs, targets), or a dict of keyword arguments, got {_describe(item)}; "
        "wrap several inputs of one call as ((first, second), targets)"
    )


def whole(name: str, data: Any) -> Batch | None:
    """A data set held in tensors as one :class:`Batch`; None for anything that gives batches.

    Args:
        name: of the argument, for messages.
        data: a tensor [N, ...] of inputs, ``(inputs, targets)`` tensors as a tuple, or a dict of tensors.

    Raises:
        ValueError: inputs and targets of different lengths.
    """
    if isinstance(data, (Tensor, Mapping)):
        return as_batch(data)
    if isinstance(data, tuple) and len(data) == 2 and all(isinstance(part, Tensor) for part in data):
        inputs, targets = data
        if inputs.dim() and targets.dim() and len(inputs) != len(targets):
            raise ValueError(
                f"{name} must have as many targets as inputs, got {len(inputs)} inputs and "
                f"{len(targets)} targets; two batches of inputs are given as a list"
            )
        return as_batch(data)
    return None


def calibration_batches(task: str, data: Any, samples: int | None, device: torch.device) -> list[Batch]:
    """Calibration inputs of a task as chunks on ``device``, targets dropped.

    Args:
        task: name, for messages.
        data: a tensor [N, ...], ``(inputs, targets)`` tensors as a tuple, a dict of tensors, an iterable of batches, a
            DataLoader or a map-style Dataset.
        samples: take at most so many samples; None takes all.
        device: where the network lives.

    Raises:
        TypeError, ValueError: nothing iterable, no samples, or values that are not finite.
    """
    batches, taken = [], 0
    for batch in _chunks(task, data):
        size = batch.size
        if samples is not None and taken + size > samples:
            batch = batch.narrow(0, samples - taken)
        batch.targets = None
        if batch.size:
            _check_finite(task, batch)
            batches.append(batch.to(device))
        taken += batch.size
        if samples is not None and taken >= samples:
            break
    if not batches:
        raise ValueError(f"inputs[{task!r}] must hold at least one sample, got none; a generator can be read only once")
    return batches


def _chunks(task: str, data: Any) -> Iterator[Batch]:
    """Batches of one task's calibration data; messages name the task."""
    everything = whole(f"inputs[{task!r}]", data)
    if (everything is None and not isinstance(data, (Dataset, Iterable))) or isinstance(data, (str, bytes)):
        raise TypeError(
            f"inputs[{task!r}] must be a tensor, an iterable of batches or a DataLoader, got {_describe(data)}"
        )
    items: Iterable[Any] = data
    if everything is not None:
        items = (everything.narrow(at, CHUNK) for at in range(0, _sized(task, everything).size, CHUNK))
    elif isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        items = DataLoader(data, CHUNK)
    for item in items:
        try:
            batch = item if isinstance(item, Batch) else as_batch(item)
        except TypeError as error:
            raise TypeError(f"inputs[{task!r}]: {error}") from None
        yield _sized(task, batch)


def _sized(task: str, batch: Batch) -> Batch:
    """The batch; one without a batch dimension is refused by the name of its task."""
    try:
        batch.size  # noqa: B018
    except ValueError as error:
        raise ValueError(f"inputs[{task!r}]: {error}") from None
    return batch


def _check_finite(task: str, batch: Batch) -> None:
    for leaf in pytree.tree_leaves((batch.args, batch.kwargs)):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and not torch.isfinite(leaf).all():
            raise ValueError(
                f"inputs[{task!r}] must be finite, got NaN or Inf in a batch of shape {list(leaf.shape)}; "
                "drop those samples: one would spread through every merged weight"
            )


def device_of(network: nn.Module) -> torch.device:
    """Device of the network's first parameter or buffer; the CPU for one without."""
    for tensor in (*network.parameters(), *network.buffers()):
        return tensor.device
    return torch.device("cpu")


def _describe(value: Any) -> str:
    size = f" of length {len(value)}" if isinstance(value, (tuple, list)) else ""
    return f"{type(value).__name__}{size}"
