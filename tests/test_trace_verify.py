"""The proof on the example: a rule that is wrong is caught, and the axis it touches left private."""

from __future__ import annotations

import pytest
import torch
from nets import IMAGE, Functional, analysed, axes_of, corresponding, noise, seeded, why
from torch import nn

from mtzip.trace import rules
from mtzip.trace.permute import _Proof, verify_axes


def test_verify_axes_catches_a_wrong_rule(monkeypatch):
    """With roll taken for an operator that keeps its axis, the axis it touches is taken out and the others stay."""
    monkeypatch.setitem(rules.RULES, "roll", rules.same_shape)

    class Rolled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Linear(6, 8), nn.Linear(8, 5), nn.Linear(5, 3)

        def forward(self, x):
            return self.head(self.b(self.a(x).relu().roll(1, 1)).relu())

    x = noise(4, 6)
    analyses, found = corresponding((seeded(Rolled), x), (seeded(Rolled, 1), x))
    assert axes_of(found) == {"a": (8, 8), "b": (5, 5)}
    for task, analysis in enumerate(analyses):
        verify_axes(analysis, task, found)
    assert axes_of(found) == {"b": (5, 5)}
    assert why(found, 0)["a"] == "reordering it changed the network's outputs"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_verify_axes_accepts_right_axes_in_every_precision(dtype):
    x = noise(4, *IMAGE, dtype=dtype)
    nets = [(seeded(Functional, seed).to(dtype), x) for seed in (0, 1)]
    analyses, found = corresponding(*nets)
    for task, analysis in enumerate(analyses):
        verify_axes(analysis, task, found)
    assert list(axes_of(found)) == ["conv1", "conv2", "fc"]


def test_one_fault_among_many_axes_takes_few_passes(monkeypatch):
    """32 axes, one of them wrong: two passes a halving, not one for every axis."""
    monkeypatch.setitem(rules.RULES, "roll", rules.same_shape)

    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(33))

        def forward(self, x):
            for at, layer in enumerate(self.layers):
                x = layer(x).relu() + 0.1 if at < 32 else layer(x)
                x = x.roll(1, 1) if at == 20 else x
            return x

    pair = [(seeded(Deep, seed), noise(4, 6)) for seed in (0, 1)]
    analyses, found = corresponding(*pair)
    assert len(found.axes) == 32
    passes = []
    outputs = type(analyses[0].exported).outputs
    monkeypatch.setattr(type(analyses[0].exported), "outputs", lambda *args: passes.append(0) or outputs(*args))
    verify_axes(analyses[0], 0, found)
    assert [f"layers.{at}" in axes_of(found) for at in range(32)] == [at != 20 for at in range(32)]
    assert why(found, 0)["layers.20"] == "reordering it changed the network's outputs"
    assert len(passes) <= 2 + 1 + 2 * 5 + 1  # float32 and float64 as it is, all, halves, the rest


def test_a_fault_too_small_for_float32_is_found(monkeypatch):
    monkeypatch.setitem(rules.RULES, "roll", rules.same_shape)

    class Slight(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x):
            x = self.a(x).relu()
            return self.head(x + 1e-5 * x.roll(1, 1))

    pair = [(seeded(Slight, seed), noise(4, 6)) for seed in (0, 1)]
    analyses, found = corresponding(*pair)
    assert list(axes_of(found)) == ["a"]
    verify_axes(analyses[0], 0, found)
    assert axes_of(found) == {}


def test_axes_that_are_wrong_only_together_are_both_left_private():
    """Each order by itself changes nothing, both do: neither is trusted."""

    analysis = analysed(seeded(Functional), noise(4, *IMAGE))
    proof = _Proof(analysis)
    proof._agrees = lambda orders: len(orders) < 2
    assert proof.faults({3: torch.arange(4), 5: torch.arange(4)}) == [3, 5]


def test_the_network_is_as_before_when_the_proof_is_done():
    network = seeded(Functional)
    analyses, found = corresponding((network, noise(4, *IMAGE)), (seeded(Functional, 1), noise(4, *IMAGE)))
    before = {name: value.clone() for name, value in analyses[0].exported.network.state_dict().items()}
    verify_axes(analyses[0], 0, found)
    after = analyses[0].exported.network.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_a_network_that_puts_out_nan_proves_nothing():
    network = seeded(Functional)
    network.fc.bias.data.fill_(float("nan"))
    analyses, found = corresponding((network, noise(4, *IMAGE)), (seeded(Functional, 1), noise(4, *IMAGE)))
    with pytest.raises(ValueError, match="task '0': the network puts out NaN or Inf"):
        verify_axes(analyses[0], 0, found)
