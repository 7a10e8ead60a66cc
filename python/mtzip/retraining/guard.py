"""What retraining must leave as it was: modes, random generators, and weights that are numbers."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """True if no number of any tensor is NaN or infinite; one pass and one synchronisation where that is so."""
    tensors = [tensor for tensor in tensors if tensor.is_floating_point()]
    # Norms would be as good, but a sum is the cheapest pass; one element of each type's sums goes to the host.
    sums = [tensor.sum() for tensor in tensors]
    if not sums or all(math.isfinite(value) for value in torch.stack([s.float() for s in sums]).tolist()):
        return True
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)  # a sum may overflow where no number has


class Snapshot:
    """Every tensor of a network that a step may change, and a copy of what they were when last kept."""

    def __init__(self, network: nn.Module):
        self.live = [parameter.detach() for parameter in network.parameters() if parameter.requires_grad]
        self.live += [buffer for buffer in network.buffers() if buffer is not None]
        self.kept = [tensor.clone() for tensor in self.live]

    def keep(self) -> None:
        """Takes what the network has now for good."""
        for kept, live in zip(self.kept, self.live, strict=True):
            kept.copy_(live)

    def restore(self) -> None:
        """Gives the network what was last kept."""
        with torch.no_grad():
            for kept, live in zip(self.kept, self.live, strict=True):
                live.copy_(kept)

    def fill(self, tensors: list[Tensor]) -> None:
        """Replaces what was kept."""
        for kept, tensor in zip(self.kept, tensors, strict=True):
            kept.copy_(tensor)

    def finite(self) -> bool:
        """True if all of them are numbers."""
        return all_finite(self.live)


@contextlib.contextmanager
def modes_kept(roots: list[Any]) -> Iterator[None]:
    """Every module of ``roots`` ends in the mode it was found in."""
    found = {module: module.training for root in roots if isinstance(root, nn.Module) for module in root.modules()}
    try:
        yield
    finally:
        for module, training in found.items():
            module.training = training


@contextlib.contextmanager
def seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """torch's generators of the CPU and of ``device`` seeded for a while, then as they were."""
    if seed is None:
        yield
        return
    with random_kept(device):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


@contextlib.contextmanager
def random_kept(device: torch.device) -> Iterator[None]:
    """torch's generators of the CPU and of ``device`` end as they were found."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
