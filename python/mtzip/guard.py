"""What retraining must leave as it was: modes, random generators, and weights that are numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .objective import all_finite


class Snapshot:
    """The network's tensors at the last step whose losses and gradients were finite."""

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
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.default_generator.manual_seed(seed)
        for cuda in devices:
            with torch.cuda.device(cuda):
                torch.cuda.manual_seed(seed)
        yield
