"""What the tests of ``zip_networks`` use: kinds of networks, calibration inputs, and how wrong a zip is."""

from __future__ import annotations

import torch
from nets import (
    IMAGE,
    Branches,
    Functional,
    Residual,
    conv1d_net,
    functional_as_sequential,
    mlp,
    noise,
    seeded,
)
from torch import nn

import mtzip

METHODS = ("refit", "mtz", "average")


def inputs(*shape: int, count: int = 200, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Correlated calibration inputs with a mean, another set for each task."""
    result = {}
    for seed, task in enumerate("abc"):
        x = noise(count, *shape, seed=seed)
        mixing = noise(shape[-1], shape[-1], seed=9) / shape[-1] ** 0.5
        result[task] = (x @ mixing + 0.3).to(dtype)
    return result


def calibrated(network: nn.Module, x: torch.Tensor) -> nn.Module:
    """The network with the BatchNorm statistics of ``x``, as if it had been trained on it."""
    norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    handles = [norm.register_forward_pre_hook(_take_statistics) for norm in norms]
    with torch.no_grad():
        network(x)
    for handle in handles:
        handle.remove()
    return network


def _take_statistics(norm, args) -> None:
    if not norm.track_running_stats:
        return
    x = args[0]
    variance, mean = torch.var_mean(x.double(), [0, *range(2, x.dim())], correction=0)
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(variance)


def pair(make, other=None) -> dict[str, nn.Module]:
    return {"a": seeded(make, 0), "b": seeded(other or make, 1)}


def some(data: dict, networks: dict) -> dict:
    return {task: data[task] for task in networks}


def zip_pair(networks, data, *args, **options):
    return mtzip.zip_networks(networks, some(data, networks), *args, **options)


@torch.no_grad()
def errors(zipped, networks, data) -> dict[str, float]:
    """Squared error of every task's outputs relative to their variance."""
    result = {}
    for task, network in networks.items():
        expected = network.eval()(data[task])
        result[task] = float((zipped[task].eval()(data[task]) - expected).square().mean() / expected.var(0).mean())
    return result


def assert_finite(zipped, data) -> None:
    for task in zipped:
        for name, tensor in zipped[task].state_dict().items():
            assert torch.isfinite(tensor.double()).all(), f"{task}.{name}"
        assert torch.isfinite(zipped[task](data[task]).double()).all(), task


def bare_norms(track_running_stats: bool) -> nn.Sequential:
    norm = {"affine": False, "track_running_stats": track_running_stats}
    layers = [nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6, **norm), nn.ReLU()]
    layers += [nn.Conv2d(6, 5, 3, bias=False), nn.BatchNorm2d(5, **norm), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(80, 3))


KINDS = {
    "mlp": (mlp, (6,)),
    "mlp without bias": (lambda: mlp(bias=False), (6,)),
    "mlp with BatchNorm": (lambda: mlp(norm=True), (6,)),
    "convolutions": (Functional, IMAGE),
    "convolutions without BatchNorm": (lambda: Functional(batchnorm=False), IMAGE),
    "sequential": (functional_as_sequential, IMAGE),
    "conv1d": (conv1d_net, (3, 16)),
    "BatchNorm without affine": (lambda: bare_norms(track_running_stats=True), IMAGE),
    "BatchNorm without statistics": (lambda: bare_norms(track_running_stats=False), IMAGE),
    "residual": (Residual, IMAGE),
    "branches": (Branches, IMAGE),
}
