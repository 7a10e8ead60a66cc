"""Training batches without end: each task's loader goes round on its own, whatever its length."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ..inputs import Batch, as_batch, whole
from . import random_state
from .random_state import generators_of, set_states, states_of

_CPU = torch.device("cpu")


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


@dataclass
class Indexed(Batch):
    """Samples of a data set held in tensors, and which they are, [n]."""

    index: Tensor | None = None


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
        return Indexed(*(pytree.tree_map(index, part) for part in parts), index=chosen)


class Cycle:
    """Batches of a loader, round after round without end, from a position that can be noted and gone back to.

    A round that was under way is gone through again up to its position, from the random state it began with: so a
    DataLoader comes to the same place whatever its sampler, as long as the order of a round is drawn at its beginning.

    Args:
        task: name, for messages.
        loader: iterable of batches, once a round; a generator has a single round.
        device: whose random generator is noted beside the CPU's.
    """

    def __init__(self, task: str, loader: Iterable[Any], device: torch.device = _CPU):
        self.task, self.loader, self.device = task, loader, device
        self.once = isinstance(loader, Iterator) and iter(loader) is loader
        self.round, self.taken, self.total = -1, 0, 0
        self.iterator: Iterator[Any] | None = None
        self.start: dict[str, Any] = {}
        self.generators = generators_of(loader)

    def __iter__(self) -> Cycle:
        return self

    def __next__(self) -> Batch:
        """The next batch.

        Raises:
            ValueError: the loader is empty, or it was a generator and has ended.
            TypeError: something that is no batch.
        """
        if self.iterator is None:
            self._begin(self.round + 1)
        try:
            item = next(self.iterator)
        except StopIteration:
            self._check_round()
            self._begin(self.round + 1)
            try:
                item = next(self.iterator)
            except StopIteration:
                self._check_round()
        self.taken += 1
        self.total += 1
        try:
            return item if isinstance(item, Batch) else as_batch(item)
        except TypeError as error:
            raise TypeError(f"loaders[{self.task!r}]: {error}") from None

    def _begin(self, number: int) -> None:
        self.round, self.taken = number, 0
        self.start = {"random": random_state.capture(self.device), "own": states_of(self.generators)}
        for owner in (self.loader, *(getattr(self.loader, name, None) for name in ("sampler", "batch_sampler"))):
            if hasattr(owner, "set_epoch"):  # DistributedSampler has one order until it is told of the next round
                owner.set_epoch(number)
        self.iterator = iter(self.loader)

    def _check_round(self) -> None:
        """ValueError where another round would give nothing."""
        if self.once and self.total:
            raise ValueError(
                f"loaders[{self.task!r}] must be iterable again and again, got a generator that ended after "
                f"{self.total} batches; pass a list or a DataLoader, or fewer steps"
            )
        if not self.taken:
            raise ValueError(
                f"loaders[{self.task!r}] must give at least one batch a round, got none; is drop_last set?"
            )

    def position(self) -> dict[str, Any]:
        """Where it is, for :meth:`go_to`."""
        own = states_of(self.generators)
        return {"round": self.round, "taken": self.taken, "total": self.total, "start": self.start, "own": own}

    def go_to(self, position: Mapping[str, Any]) -> None:
        """Continues from there; leaves the global random generators anywhere."""
        if position["round"] >= 0:
            random_state.restore(position["start"]["random"], self.device)
            set_states(self.generators, position["start"]["own"])
            self._begin(position["round"])
            for number in range(position["taken"]):
                if next(self.iterator, self) is self:
                    raise ValueError(
                        f"loaders[{self.task!r}] must give the batches it gave before, at least {position['taken']} a "
                        f"round, got {number}"
                    )
        self.taken, self.total = position["taken"], position["total"]
        set_states(self.generators, position["own"])

    def close(self) -> None:
        """Lets go of the round under way, and of its workers."""
        self.iterator = None
