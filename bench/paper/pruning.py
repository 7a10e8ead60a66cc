"""Each network pruned on its own with torch-pruning, until all together are as large as their zip."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mtzip.demo.train import evaluating

from ..networks import BasicBlock

GRID = 400  # ratios tried are multiples of 1 / GRID


def pruned(networks: Mapping[str, nn.Module], images: Mapping[str, Tensor], size: int) -> dict[str, nn.Module]:
    """Copies pruned by one ratio, their parameters together as near to ``size`` as ratios come.

    By the l2 norm of the groups of weights that go together, the same share of every layer. In residual networks with
    shortcuts without parameters only channels inside of blocks go, as those of the residual stream cannot. BatchNorm is
    re-estimated on ``images``, task to calibration images.

    Raises:
        ValueError: ``size`` is out of reach.
    """
    low, high = 0, GRID - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _count(_prune(networks, images, middle)) > size else (low, middle)
    found = min((_prune(networks, images, at) for at in (low, high)), key=lambda nets: abs(_count(nets) - size))
    if abs(_count(found) - size) > 0.05 * size:
        raise ValueError(f"size must be one that pruning reaches within 5 %, got {size:,}, nearest {_count(found):,}")
    for task, network in found.items():
        reestimate_(network, images[task])
    return found


def _prune(networks: Mapping[str, nn.Module], images: Mapping[str, Tensor], at: int) -> dict[str, nn.Module]:
    import torch_pruning as tp

    found = {}
    for task, network in networks.items():
        network = copy.deepcopy(network)
        kept = [[module for module in network.modules() if isinstance(module, nn.Linear)][-1]]
        blocks = [module for module in network.modules() if isinstance(module, BasicBlock)]
        if blocks:
            kept += [network.conv1, *(block.conv2 for block in blocks)]
        tp.pruner.MagnitudePruner(
            network,
            images[task][:2],
            importance=tp.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=at / GRID,
            ignored_layers=kept,
        ).step()
        found[task] = network.eval().requires_grad_(True)
    return found


def _count(networks: Mapping[str, nn.Module]) -> int:
    return sum(parameter.numel() for network in networks.values() for parameter in network.parameters())


@torch.no_grad()
def reestimate_(network: nn.Module, images: Tensor) -> None:
    """Sets the statistics of every BatchNorm of ``network`` to those of its inputs, a cumulative mean over batches."""
    norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    with evaluating(network):
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
            norm.training = True
        for x in images.split(250):
            network(x)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
