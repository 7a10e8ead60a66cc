"""Calibration that tells little and networks at the edge of their numbers: no NaN, no failure, nothing made up."""

from __future__ import annotations

import pytest
import torch
from nets import IMAGE, Functional, Residual, noise, seeded
from test_grouped import Inverted
from test_plan import settled
from torch import nn

import mtzip

MAKES = {
    "functional": (lambda: Functional(widths=(8, 6, 9)), IMAGE),
    "residual": (lambda: Residual(width=8, inner=6), IMAGE),
    "depthwise": (Inverted, (2, 6, 6)),
}


def kill(network: nn.Module) -> nn.Module:
    """Two neurons of every layer put out nothing at all."""
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)) and len(module.weight) > 4:
                module.weight[:2] = 0
                if module.bias is not None:
                    module.bias[:2] = 0
    return network


def duplicate(network: nn.Module) -> nn.Module:
    """The first two neurons of every layer are the same."""
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)) and len(module.weight) > 4:
                module.weight[1] = module.weight[0]
    return network


CASES = {
    "ten samples": (lambda n: n, lambda x: x[:10]),
    "two samples": (lambda n: n, lambda x: x[:2]),
    "one sample again and again": (lambda n: n, lambda x: x[:1].expand(50, *x.shape[1:]).contiguous()),
    "duplicate inputs": (lambda n: n, lambda x: torch.cat([x[:20]] * 4)),
    "constant inputs": (lambda n: n, lambda x: torch.full_like(x, 0.7)),
    "inputs that are zero": (lambda n: n, torch.zeros_like),
    "one dead channel": (lambda n: n, lambda x: x * torch.tensor([1.0, 0.0]).view(2, 1, 1)),
    "huge inputs": (lambda n: n, lambda x: x * 1e6),
    "tiny inputs": (lambda n: n, lambda x: x * 1e-6),
    "channels of other scales": (lambda n: n, lambda x: x * torch.tensor([1e4, 1e-4]).view(2, 1, 1)),
    "dead neurons": (kill, lambda x: x),
    "duplicate neurons": (duplicate, lambda x: x),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind, method", [("functional", "mtz"), *((kind, "refit") for kind in MAKES)])
def test_no_nan_and_no_failure(kind, method, case):
    make, shape = MAKES[kind]
    change, calibration = CASES[case]
    x = {task: calibration(noise(60, *shape, seed=seed)) for seed, task in enumerate("ab")}
    networks = {task: change(settled(seeded(make, seed), noise(60, *shape))) for seed, task in enumerate("ab")}
    zipped = mtzip.zip_networks(networks, x, share=0.75, method=method)
    for task, network in networks.items():
        with torch.no_grad():
            got, wanted = zipped[task](x[task]), network(x[task])
        assert bool(torch.isfinite(got).all())
        assert got.abs().max() <= 100 * wanted.abs().max() + 1e-3
    for layer in zipped.report.layers:
        assert 0 < layer.damping < 1e3
        assert all(error == error and error >= 0 for error in layer.error.values())


@pytest.mark.parametrize("kind", MAKES)
def test_an_input_seen_again_and_again_is_reproduced(kind):
    """One sample says nothing of the second moment: what is known, the outputs for it, must still come out."""
    make, shape = MAKES[kind]
    one = noise(1, *shape)
    networks = {task: settled(seeded(make, seed), noise(60, *shape)) for seed, task in enumerate("ab")}
    zipped = mtzip.zip_networks(networks, {task: one.expand(8, *shape).contiguous() for task in networks})
    for task, network in networks.items():
        with torch.no_grad():
            assert (zipped[task](one) - network(one)).abs().max() < 0.3 * network(one).abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", MAKES)
def test_half_precision_networks(kind, dtype):
    make, shape = MAKES[kind]
    x = {task: noise(100, *shape, seed=seed) for seed, task in enumerate("ab")}
    networks = {task: settled(seeded(make, seed), x[task]).to(dtype) for seed, task in enumerate("ab")}
    x = {task: values.to(dtype) for task, values in x.items()}
    zipped = mtzip.zip_networks(networks, x, share=0.75)
    for task, network in networks.items():
        assert {p.dtype for p in zipped[task].parameters()} == {dtype}
        with torch.no_grad():
            got, wanted = zipped[task](x[task]).float(), network(x[task]).float()
        assert bool(torch.isfinite(got).all())
        spread = (wanted - wanted.mean(0)).square().sum()
        assert (got - wanted).square().sum() < spread
