"""Networks of different inner scale: what comes behind a ReLU takes any positive factor back, so it must not matter."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import mtzip


def net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 3)).eval()


@torch.no_grad()
def louder(network: nn.Module, first: float, second: float) -> nn.Module:
    """The same function, its hidden layers putting out so many times as much."""
    network = copy.deepcopy(network)
    network[0].weight *= first
    network[0].bias *= first
    network[2].weight *= second / first
    network[2].bias *= second
    network[4].weight /= second
    return network


@pytest.mark.parametrize("first, second", [(8.0, 1.0), (64.0, 64.0)])
def test_zip_hardly_depends_on_the_scale_of_hidden_layers(first, second):
    """Ratios of private scales that are tried around one, whatever the networks' scales, give 1.4 and 1.5 here."""
    networks = {"a": net(0), "b": net(1)}
    inputs = {task: torch.randn(500, 8, generator=torch.Generator().manual_seed(9)) for task in networks}
    scaled = {**networks, "b": louder(networks["b"], first, second)}
    x = inputs["b"][:50]
    torch.testing.assert_close(scaled["b"](x), networks["b"](x))
    assert _error(scaled, inputs, x) <= 1.25 * _error(networks, inputs, x)  # measured 1.06 and 1.14


@torch.no_grad()
def _error(networks, inputs, x) -> float:
    """Relative error of the zipped networks' outputs, mean of the tasks."""
    zipped = mtzip.zip_networks(networks, inputs)
    wanted = {task: network(x) for task, network in networks.items()}
    return sum(float((zipped[t](x) - y).norm() / (y - y.mean(0)).norm()) for t, y in wanted.items()) / len(wanted)
