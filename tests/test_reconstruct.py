"""Activation-aware targets: against a slow loop, and never worse."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from nets import analysed, noise, seeded
from torch import nn
from torch.nn import functional as F

from mtzip.merging.moments import View, collect
from mtzip.merging.reconstruct import Follow, corrected, correction, following, substitute


def slow(y, z, relu: bool, window):
    """What a position's target is, said in words, one position after another."""
    t = torch.empty_like(z)
    for n in range(z.shape[0]):
        for c in range(z.shape[1]):
            if window is None:
                for at in range(z[n, c].numel()):
                    old, now = z[n, c].flatten()[at], y[n, c].flatten()[at]
                    t[n, c].view(-1)[at] = old if not relu or old > 0 else min(now, torch.zeros(()))
                continue
            height, width = (size // step * step for size, step in zip(z.shape[2:], window, strict=True))
            t[n, c] = y[n, c]  # behind the last whole window nobody reads
            for i in range(0, height, window[0]):
                for j in range(0, width, window[1]):
                    old = z[n, c, i : i + window[0], j : j + window[1]]
                    now = y[n, c, i : i + window[0], j : j + window[1]]
                    top = old.max().clamp_min(0) if relu else old.max()
                    new = torch.minimum(now, top)
                    winner = old.argmax()
                    if not relu or old.max() > 0:
                        new.view(-1)[winner] = old.max()
                    t[n, c, i : i + window[0], j : j + window[1]] = new
    return t


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("window", [None, (2, 2), (3, 2)])
def test_substitution_is_what_a_slow_loop_says(relu, window):
    y, z = noise(2, 3, 5, 6, seed=1), noise(2, 3, 5, 6, seed=2)
    got = substitute(y, z, Follow(relu, window))
    expected = slow(y.clone(), z, relu, window)
    torch.testing.assert_close(got, expected)


def test_rows_of_linear_layers_and_one_dimension():
    y, z = noise(4, 5, seed=1), noise(4, 5, seed=2)
    torch.testing.assert_close(substitute(y, z, Follow(True, None)), torch.where(z > 0, z, y.clamp_max(0)))
    y, z = noise(2, 3, 6, seed=1), noise(2, 3, 6, seed=2)
    t = substitute(y, z, Follow(True, (2,)))
    torch.testing.assert_close(F.max_pool1d(t.relu(), 2), F.max_pool1d(z.relu(), 2))


@pytest.mark.parametrize("relu, window", [(True, None), (True, (2, 2)), (False, (2, 2))])
def test_an_exact_fit_of_the_target_is_an_exact_fit_behind_the_activation(relu, window):
    y, z = noise(2, 3, 6, 6, seed=1), noise(2, 3, 6, 6, seed=2)
    t = substitute(y, z, Follow(relu, window))

    def behind(x):
        x = x.relu() if relu else x
        return x if window is None else F.max_pool2d(x, window)

    torch.testing.assert_close(behind(t), behind(z))


@pytest.mark.parametrize("relu, window", [(True, None), (True, (2, 2)), (False, (2, 2))])
def test_a_step_never_raises_the_error_behind_the_activation(relu, window):
    """Exact least squares onto the substituted target, on all data: the bound that it minimises never rises.

    The bound counts a winner's whole error and a loser's only above what passes; it is no less than the error behind
    the activation, and where every winner is positive it is that error plus what losers exceed it by.
    """
    follow = Follow(relu, window)
    x, old = noise(40, 2, 6, 6, seed=1, dtype=torch.float64), noise(4, 18, seed=2, dtype=torch.float64)
    view = View("conv2d", (3, 3), {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1)})
    z = F.conv2d(x, old.view(4, 2, 3, 3), padding=1) + 0.4 * noise(40, 4, 6, 6, seed=3, dtype=torch.float64)

    def behind(value):
        value = value.relu() if relu else value
        return value if window is None else F.max_pool2d(value, window)

    def bound(y):
        return float((y - substitute(y, z, follow)).square().sum())

    columns = torch.cat([view.unfold(x), torch.ones(view.positions(x), 1, dtype=torch.float64)], 1)

    def fit(t):
        solution = torch.linalg.lstsq(columns, view.rows(t)).solution
        return (columns @ solution).view(40, 6, 6, 4).movedim(-1, 1)

    y = fit(z)
    bounds, behinds = [bound(y)], [float((behind(y) - behind(z)).square().sum())]
    for _ in range(6):
        y = fit(substitute(y, z, follow))
        bounds.append(bound(y))
        behinds.append(float((behind(y) - behind(z)).square().sum()))
    assert all(after <= before * (1 + 1e-12) for before, after in pairwise(bounds))
    assert all(behind <= bound * (1 + 1e-12) for behind, bound in zip(behinds, bounds, strict=True))
    assert behinds[-1] < behinds[0]


@pytest.mark.parametrize("window", [None, (2, 2)])
def test_correction_gives_the_moments_of_the_substituted_target(window, assert_within):
    x = noise(20, 2, 6, 6, dtype=torch.float64) + 0.5
    y, z = noise(20, 3, 6, 6, seed=1, dtype=torch.float64), noise(20, 3, 6, 6, seed=2, dtype=torch.float64)
    view = View("conv2d", (3, 3), {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1)})
    follow = Follow(True, window)
    moment, target = collect(view, [x], [z])
    _, expected = collect(view, [x], [substitute(y, z, follow)])
    got = corrected(target, moment, *correction(view, x.split(7), y.split(7), z.split(7), follow))
    for name in ("mean", "variance", "cross"):
        assert_within(getattr(got, name), getattr(expected, name), 1e-10, torch.ones(()))


@pytest.mark.parametrize(
    "behind, expected",
    [
        ([nn.ReLU()], Follow(True, None)),
        ([nn.ReLU(inplace=True), nn.Dropout(), nn.MaxPool2d(2)], Follow(True, (2, 2))),
        ([nn.MaxPool2d((3, 2)), nn.ReLU()], Follow(True, (3, 2))),
        ([nn.MaxPool2d(2)], Follow(False, (2, 2))),
        ([nn.MaxPool2d(3, 2), nn.ReLU()], Follow(False, None)),
        ([nn.MaxPool2d(2, padding=1)], Follow(False, None)),
        ([nn.MaxPool2d(2, dilation=2)], Follow(False, None)),
        ([nn.MaxPool2d(2, ceil_mode=True)], Follow(False, None)),
        ([nn.ReLU(), nn.AvgPool2d(2), nn.MaxPool2d(2)], Follow(True, None)),
        ([nn.GELU(), nn.MaxPool2d(2)], Follow(False, None)),
    ],
)
def test_what_follows_a_layer(behind, expected):
    network = nn.Sequential(nn.Conv2d(2, 4, 3), *behind, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    analysis = analysed(seeded(lambda: network), noise(4, 2, 14, 14))
    found = following(analysis, analysis.layers["0"].node)
    assert found == expected
    assert bool(found) == (expected != Follow(False, None))


def test_a_layer_read_twice_has_no_follower():
    class Fork(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(2, 4, 3), nn.Linear(4, 2)

        def forward(self, x):
            x = self.conv(x)
            return self.head((x.relu() + x).mean((2, 3)))

    analysis = analysed(seeded(Fork), noise(4, 2, 6, 6))
    assert not following(analysis, analysis.layers["conv"].node)
