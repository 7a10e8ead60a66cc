"""Sensitivities against the Jacobian that autograd gives."""

from __future__ import annotations

import pytest
import torch
from nets import IMAGE, Functional, analysed, mlp, noise, seeded
from torch import nn

from mtzip.inputs import as_batch
from mtzip.merging.sensitivity import FLOOR, row_weighting, sensitivities


def jacobian_squares(network: nn.Module, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Sum over samples, positions and outputs of (d out / d z_i)^2 for every row i, one output after another."""
    kept = []
    handle = layer.register_forward_hook(lambda _, args, z: kept.append(z) or z.clone())
    out = network(x)
    handle.remove()
    (z,) = kept
    channel = -1 if isinstance(layer, nn.Linear) else 1
    total = torch.zeros(z.shape[channel], dtype=torch.float64)
    for n in range(out.shape[0]):
        for at in range(out.shape[1]):
            (gradient,) = torch.autograd.grad(out[n, at], z, retain_graph=True)
            total += gradient.double().square().movedim(channel, -1).flatten(0, -2).sum(0)
    return total


@pytest.mark.parametrize(
    "make, shape", [(mlp, (6,)), (lambda: Functional(batchnorm=False), IMAGE), (Functional, IMAGE)]
)
def test_sensitivities_are_the_diagonal_of_the_gauss_newton_matrix(make, shape, assert_within):
    network, x = seeded(make), noise(12, *shape)
    analysis = analysed(network, x)
    got = sensitivities(analysis, [as_batch(x[:5]), as_batch(x[5:])], probes=400)
    assert list(got) == list(analysis.layers)
    with torch.no_grad():
        spread = network(x).double().var(0, correction=0).sum()
    for path, values in got.items():
        expected = jacobian_squares(network, network.get_submodule(path), x) / (len(x) * spread)
        # random signs: the error falls with the root of the number of draws
        assert_within(values, expected, 0.2, expected.clamp_min(0.2 * float(expected.mean())))


def test_one_output_needs_one_draw(assert_within):
    network, x = seeded(lambda: mlp(classes=1)), noise(30, 6)
    analysis = analysed(network, x)
    with torch.no_grad():
        spread = network(x).double().var(0, correction=0).sum()
    for path, values in sensitivities(analysis, [as_batch(x)], probes=1).items():
        expected = jacobian_squares(network, network.get_submodule(path), x)
        assert_within(values, expected / (30 * spread), 1e-5)


def test_repeatable_limited_and_without_a_trace():
    network, x = seeded(mlp), noise(60, 6)
    analysis = analysed(network, x)
    state = torch.get_rng_state()
    first = sensitivities(analysis, [as_batch(x[:40]), as_batch(x[40:])], samples=40)
    again = sensitivities(analysis, [as_batch(x[:40])])
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[path], again[path]) for path in first)
    assert all(p.grad is None for p in analysis.exported.network.parameters())


def test_a_layer_no_output_depends_on_is_left_out():
    class Beside(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused, self.head = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.used(x) + 0 * self.unused(x))

    analysis = analysed(seeded(Beside), noise(4, 6))
    assert list(sensitivities(analysis, [as_batch(noise(10, 6))])) == ["used", "head"]


def test_row_weighting():
    values = torch.tensor([4.0, 1.0, 0.0, 1.0]).double()
    weights = row_weighting(values, None)
    assert weights.square().mean() == pytest.approx(1)
    assert weights[0] / weights[1] == pytest.approx(2)
    assert weights[2] / weights[1] == pytest.approx((FLOOR * values.mean()) ** 0.5)
    # behind a folded BatchNorm of scale s the output's sensitivity is that over s^2; a dead channel counts least
    scaled = row_weighting(values, torch.tensor([2.0, 1.0, 1.0, 0.0]).double())
    assert scaled[0] == pytest.approx(float(scaled[1]))
    assert scaled[3] == scaled.min()
    assert torch.equal(row_weighting(torch.zeros(3), None), torch.ones(3))
