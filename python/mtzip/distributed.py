"""Several processes that work together: sums over all of them, and a message instead of a hang where one is gone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

#: Most bytes put into one message.
BUCKET = 64 * 2**20


class Ranks:
    """The processes of the default process group; one process alone where there is none, or it is not wanted.

    Args:
        distributed: None takes the process group if there is one, as under torchrun; False works alone; True insists.

    Raises:
        ValueError: ``distributed=True`` without a process group.
    """

    def __init__(self, distributed: bool | None = None):
        ready = dist.is_available() and dist.is_initialized()
        if distributed not in (None, True, False):
            raise ValueError(f"distributed must be None, True or False, got {distributed!r}")
        if distributed and not ready:
            raise ValueError(
                "distributed=True needs a process group, got none; call torch.distributed.init_process_group() in "
                "every process, and start them with torchrun"
            )
        together = ready and distributed is not False
        self.rank = dist.get_rank() if together else 0
        self.size = dist.get_world_size() if together else 1

    @property
    def alone(self) -> bool:
        """True where there is nobody to talk to."""
        return self.size == 1

    def sum_(self, tensors: Sequence[Tensor], what: str) -> None:
        """Adds up each tensor over all processes, in place; every process gets the same bits.

        Args:
            tensors: of the same shapes and types in every process.
            what: for the message if it fails.
        """
        if not self.alone:
            for bucket in _buckets(tensors):
                flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
                self._call(what, lambda flat=flat: dist.all_reduce(flat))
                for tensor, total in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
                    tensor.copy_(total.view_as(tensor))

    def mean_(self, tensors: Sequence[Tensor], what: str) -> None:
        """Their mean over all processes, in place."""
        self.sum_(tensors, what)
        if not self.alone:
            for tensor in tensors:
                tensor.div_(self.size)

    def means(self, numbers: Mapping[str, float], what: str) -> dict[str, float]:
        """The mean of every number over all processes."""
        if self.alone:
            return dict(numbers)
        total = self.tensor(list(numbers.values()))
        self.mean_([total], what)
        return dict(zip(numbers, total.tolist(), strict=True))

    def take_(self, tensors: Sequence[Tensor], what: str) -> None:
        """Gives every process the first one's values, in place."""
        if not self.alone:
            for tensor in tensors:
                plain = tensor.detach().contiguous()
                self._call(what, lambda plain=plain: dist.broadcast(plain, 0))
                tensor.detach().copy_(plain)

    def gathered(self, value: Any, what: str) -> list[Any]:
        """What every process has, in their order, in every process."""
        if self.alone:
            return [value]
        values = [None] * self.size
        self._call(what, lambda: dist.all_gather_object(values, value))
        return values

    def of_first(self, value: Any, what: str) -> Any:
        """What the first process has, in every process."""
        if self.alone:
            return value
        values = [value]
        self._call(what, lambda: dist.broadcast_object_list(values, 0))
        return values[0]

    def tensor(self, numbers: Sequence[float]) -> Tensor:
        """Numbers as a float64 tensor where the process group can send it."""
        nccl = not self.alone and dist.get_backend() == "nccl"
        return torch.tensor(numbers, dtype=torch.float64, device="cuda" if nccl else "cpu")

    def _call(self, what: str, collective: Callable[[], Any]) -> None:
        try:
            collective()
        except RuntimeError as error:
            raise RuntimeError(
                f"rank {self.rank} of {self.size} cannot go on with {what}: another process has ended, hangs, or does "
                f"not take part. Look for its error first; every process must make the same calls. ({error})"
            ) from error


def _buckets(tensors: Sequence[Tensor]):
    """Runs of neighbours of one type and device that fit into a message."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        alike = bucket and (tensor.dtype, tensor.device) == (bucket[0].dtype, bucket[0].device)
        if bucket and not (alike and size + tensor.nbytes <= BUCKET):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        yield bucket
