"""Training batches without end: each task's loader goes round on its own, whatever its length."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset, IterableDataset

from .inputs import Batch, as_batch, whole


def loader_of(task: str, data: Any, batch_size: int) -> Iterable[Any]:
    """``data`` as something that can be iterated once an epoch.

    Args:
        task: name, for messages.
        data: a DataLoader or any iterable of batches; or a whole data set, cut into shuffled batches of
            ``batch_size``: a tensor [N, ...] of inputs, ``(inputs, targets)`` tensors as a tuple, a dict of tensors,
            or a map-style Dataset.
        batch_size: for data that is not in batches yet.

    Raises:
        TypeError: none of these.
        ValueError: inputs and targets of different lengths.
    """
    everything = whole(f"loaders[{task!r}]", data)
    if everything is not None:
        return ShuffledBatches(task, everything, batch_size)
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        return DataLoader(data, batch_size, shuffle=True, drop_last=len(data) > batch_size)
    if isinstance(data, Iterable) and not isinstance(data, (str, bytes)):
        return data
    raise TypeError(
        f"loaders[{task!r}] must be a DataLoader, an iterable of batches, a tensor of inputs or (inputs, targets) "
        f"tensors, got {type(data).__name__}"
    )


class ShuffledBatches:
    """Batches of a data set held in tensors, in a new order at every iteration, drawn from torch's global generator.

    Every batch has ``batch_size`` samples: what is left over at the end of a round is in another round's batches.
    """

    def __init__(self, task: str, data: Batch, batch_size: int):
        try:
            self.size = data.size
        except ValueError as error:
            raise ValueError(f"loaders[{task!r}]: {error}") from None
        self.data = data
        self.batch_size = min(batch_size, self.size)

    def __iter__(self) -> Iterator[Batch]:
        if not self.size:
            return
        order = torch.randperm(self.size)
        for start in range(0, self.size - self.batch_size + 1, self.batch_size):
            yield self._take(order[start : start + self.batch_size])

    def _take(self, chosen: Tensor) -> Batch:
        def index(leaf):
            batched = isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == self.size
            return leaf[chosen] if batched else leaf

        parts = (self.data.args, self.data.kwargs, self.data.targets)
        return Batch(*(pytree.tree_map(index, part) for part in parts))


def cycle(task: str, loader: Iterable[Any]) -> Iterator[Batch]:
    """Batches of ``loader``, round after round without end.

    Raises:
        ValueError: the loader is empty, or it was a generator and has ended.
        TypeError: something that is no batch.
    """
    once = iter(loader) is loader if isinstance(loader, Iterator) else False
    taken = 0
    while True:
        before = taken
        for item in loader:
            try:
                batch = item if isinstance(item, Batch) else as_batch(item)
            except TypeError as error:
                raise TypeError(f"loaders[{task!r}]: {error}") from None
            taken += 1
            yield batch
        if once and taken:
            raise ValueError(
                f"loaders[{task!r}] must be iterable again and again, got a generator that ended after {taken} "
                "batches; pass a list or a DataLoader, or fewer steps"
            )
        if taken == before:
            raise ValueError(f"loaders[{task!r}] must give at least one batch a round, got none; is drop_last set?")
