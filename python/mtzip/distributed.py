"""Several processes that work together: sums over all of them, and a message instead of a hang where one is gone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .inputs import CHUNK, Batch, leading

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

    def gather_into(self, found: list[Tensor], value: Tensor, what: str) -> None:
        """Fills ``found`` with the tensor of every process, all of one shape."""
        self._call(what, lambda: dist.all_gather(found, value))

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


# -- calibration -------------------------------------------------------------------------------------------------------
#
# Each process runs its own part of the calibration inputs. What a sweep computes from them are sums over samples, which
# pass through `total`, and in sample space the samples themselves, through `gathered_rows`. So every process goes on
# with the same bits, and comes to the same merges.

_ranks = Ranks(False)


@contextlib.contextmanager
def together(ranks: Ranks) -> Iterator[None]:
    """While it lasts, sums over calibration inputs are sums over the inputs of all processes."""
    global _ranks
    before, _ranks = _ranks, ranks
    try:
        yield
    finally:
        _ranks = before


def total(value: Any) -> Any:
    """Sum over all processes of what each has summed over its own inputs: a tensor, or a number."""
    if _ranks.alone:
        return value
    if not isinstance(value, Tensor):
        tensor = _ranks.tensor([value])
        _ranks.sum_([tensor], "calibration")
        return type(value)(tensor.item())
    value = value.clone()
    _ranks.sum_([value], "calibration")
    return value


def own_share(samples: int) -> int:
    """How many of so many samples each process takes."""
    return -(-samples // _ranks.size)


def gathered_rows(rows: Tensor) -> Tensor:
    """Rows [n, ...] of all processes, one process after another."""
    if _ranks.alone:
        return rows
    counts = [int(count) for count in _ranks.gathered(len(rows), "calibration")]
    longest = torch.zeros(max(counts), *rows.shape[1:], dtype=rows.dtype, device=rows.device)
    longest[: len(rows)] = rows
    found = [torch.empty_like(longest) for _ in counts]
    _ranks.gather_into(found, longest, "calibration")
    return torch.cat([part[:count] for part, count in zip(found, counts, strict=True)])


def first_samples(batches: list[Batch], samples: int) -> list[Batch]:
    """Batches that hold the first ``samples`` samples of all processes, taken in turn; the batches themselves if alone.

    The same in every process: for what is estimated from few samples.
    """
    if _ranks.alone:
        return batches
    own = leading(batches, own_share(samples))
    cpu = torch.device("cpu")
    parts = _ranks.gathered([_joined(own).to(cpu)], "calibration")
    everything = _interleaved([part for (part,) in parts]).to(_device_of(own[0]))
    return [everything.narrow(at, CHUNK) for at in range(0, min(samples, everything.size), CHUNK)]


def _joined(batches: Sequence[Batch]) -> Batch:
    """Batches one after another, as one."""
    return _combined(batches, torch.cat)


def _interleaved(batches: Sequence[Batch]) -> Batch:
    """The first sample of each, then the second of each and so on."""

    def weave(leaves: Sequence[Tensor]) -> Tensor:
        shortest = min(map(len, leaves))
        woven = torch.stack([leaf[:shortest] for leaf in leaves], 1).flatten(0, 1)
        return torch.cat([woven, *(leaf[shortest:] for leaf in leaves)])

    return _combined(batches, weave)


def _combined(batches: Sequence[Batch], combine: Callable[[Sequence[Tensor]], Tensor]) -> Batch:
    sizes = [batch.size for batch in batches]

    def join(*leaves: Any) -> Any:
        batched = all(isinstance(x, Tensor) and x.dim() and len(x) == n for x, n in zip(leaves, sizes, strict=True))
        return combine(leaves) if batched else leaves[0]

    trees = [(batch.args, batch.kwargs) for batch in batches]
    return Batch(*pytree.tree_map(join, *trees))


def _device_of(batch: Batch) -> torch.device:
    return next(leaf.device for leaf in pytree.tree_leaves((batch.args, batch.kwargs)) if isinstance(leaf, Tensor))


def check_same(ranks: Ranks, networks: Mapping[str, nn.Module], settings: str) -> None:
    """ValueError in every process where the processes do not zip the same networks in the same way."""
    if ranks.alone:
        return
    parameters = [parameter.detach() for network in networks.values() for parameter in network.parameters()]
    sums = [float(parameter.double().sum()) for parameter in parameters]
    found = ranks.gathered((settings, sums), "the beginning of zip_networks")
    if any(other != found[0] for other in found):
        what = "arguments" if any(other[0] != found[0][0] for other in found) else "weights"
        raise ValueError(
            f"zip_networks must be called with the same networks and arguments in every process, got different {what}; "
            "load the same weights everywhere, or pass distributed=False"
        )


def agree_(ranks: Ranks, zipped: nn.Module, form: str) -> None:
    """Gives every process the first one's zipped network, bit for bit.

    Args:
        ranks: the processes.
        zipped: its tensors are replaced.
        form: what must be the same already: how the network is put together.

    Raises:
        RuntimeError: the processes have come to networks of different forms.
    """
    if ranks.alone:
        return
    forms = ranks.gathered(form, "the end of zip_networks")
    if any(other != forms[0] for other in forms):
        raise RuntimeError(
            "the processes came to different pairings from the same sums, which happens where their processors or "
            "libraries round differently; start them on machines of one kind"
        )
    ranks.take_([*zipped.parameters(), *zipped.buffers()], "the end of zip_networks")
