"""Networks pruned by magnitude to the usual density of every layer, then retrained with their zeros held.

Densities are those of Han et al., *Learning both Weights and Connections for Efficient Neural Networks*, NeurIPS 2015,
tables 3 and 4: 8 % of all weights are left in both networks.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from mtzip.demo.recipes import trained
from mtzip.demo.tasks import Task
from mtzip.demo.train import Recipe

#: Layer to the share of its weights that is left.
DENSITIES = {
    "LeNet-300-100": {"fc1": 0.08, "fc2": 0.09, "fc3": 0.26},
    "LeNet-5": {"conv1": 0.66, "conv2": 0.12, "fc1": 0.08, "fc2": 0.19},
}
#: How they are retrained: some ten seconds.
RECIPES = {"LeNet-300-100": Recipe(epochs=3, rate=0.1), "LeNet-5": Recipe(epochs=1, rate=0.05)}


def pruned(name: str, network: nn.Module, task: Task, seed: int) -> nn.Module:
    """A sparse copy of ``network`` in eval mode, retrained on ``task``; from the cache if that was done before.

    Args:
        name: of the network, a key of ``DENSITIES``.
        network: a trained one.
        task: what it was trained for.
        seed: of the order of images.
    """

    def sparse(classes: int) -> nn.Module:
        made = copy.deepcopy(network)
        for path, density in DENSITIES[name].items():
            weight = made.get_submodule(path).weight
            support = largest(weight.detach(), density)
            weight.data *= support
            weight.register_hook(lambda gradient, support=support: gradient * support)
        return made

    sparse.__name__ = f"{type(network).__name__}-sparse"  # of its file in the cache
    return copy.deepcopy(trained(sparse, task, seed, RECIPES[name]))  # without the hooks


def largest(weight: Tensor, density: float) -> Tensor:
    """True at the ``density`` of all entries that are largest by magnitude."""
    kept = weight.abs().flatten().topk(round(density * weight.numel())).indices
    return torch.zeros(weight.numel(), dtype=torch.bool).index_fill_(0, kept, True).view_as(weight)
