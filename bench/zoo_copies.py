"""A network and a copy of itself with every axis in another order: the same function, so zipping must lose nothing."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import mtzip
from mtzip.inputs import Batch, as_batch
from mtzip.trace.analysis import Analysis
from mtzip.trace.export import export
from mtzip.trace.permute import permute_

from .zoo import Architecture


def calibration(example: Batch) -> Batch:
    """Some dozens of samples: the example with noise, or with its tokens shuffled."""
    generator = torch.Generator().manual_seed(4)

    def more(x):
        if not isinstance(x, Tensor) or not x.dim():
            return x
        x = torch.cat([x] * (8 if x.dim() > 3 else 40))
        if x.is_floating_point():
            return x + 0.5 * torch.randn(x.shape, generator=generator)
        return x[torch.randperm(len(x), generator=generator)]

    return Batch(*pytree.tree_map(more, (example.args, example.kwargs)))


def outputs(network: nn.Module, batch: Batch) -> list[Tensor]:
    """The floating tensors that a network puts out."""
    with torch.no_grad():
        result = network(*batch.args, **batch.kwargs)
    result = getattr(result, "logits", result)
    return [x for x in pytree.tree_leaves(result) if isinstance(x, Tensor) and x.is_floating_point()]


def shuffled(network: nn.Module, batch: Batch, seed: int = 1) -> nn.Module:
    """The same function with every free axis in a random order."""
    analysis = Analysis(export("shuffled", network, batch))
    generator = torch.Generator().manual_seed(seed)
    free = [atom for atom in analysis.axes.roots() if analysis.axes[atom].pinned is None]
    orders = {atom: torch.randperm(analysis.axes[atom].size, generator=generator) for atom in free}
    other = copy.deepcopy(network)
    permute_(other, analysis, orders)
    return other


def differences(architecture: Architecture) -> tuple[float, float]:
    """Largest relative difference of the outputs of a zip from the original's: sharing nothing, and everything.

    The tiny network, zipped with its shuffled copy.
    """
    batch = calibration(as_batch(architecture.example(True)))
    network = architecture.build(True)
    networks = {"a": network, "b": shuffled(network, batch)}
    worst = []
    for share in (0.0, 1.0):
        zipped = mtzip.zip_networks(networks, {task: [batch] for task in networks}, share)
        found = [0.0]
        for task, original in networks.items():
            for got, wanted in zip(outputs(zipped[task], batch), outputs(original, batch), strict=True):
                found.append(float((got - wanted).abs().max() / wanted.abs().max()))
        worst.append(max(found))
    return worst[0], worst[1]
