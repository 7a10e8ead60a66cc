"""Convolutions with groups: every group's moments and fit against dense algebra in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from nets import noise, seeded
from test_plan import settled
from torch import nn
from torch.nn import functional as F

import mtzip
from bench.zoo_copies import shuffled
from mtzip.inputs import as_batch
from mtzip.merging.grouped import grouped_moments
from mtzip.merging.moments import View


@pytest.mark.parametrize("dimensions", [1, 2])
@pytest.mark.parametrize("groups, channels, rows", [(4, 4, 4), (3, 6, 9), (2, 4, 2)])
def test_moments_of_every_group(dimensions, groups, channels, rows):
    shape = (5, 7)[:dimensions]
    settings = {"stride": (2, 1)[:dimensions], "padding": (1, 2)[:dimensions], "dilation": (1, 2)[:dimensions]}
    kernel = (3, 2)[:dimensions]
    x = noise(6, channels, *shape, dtype=torch.float64) + 0.5
    conv = (F.conv1d, F.conv2d)[dimensions - 1]
    weight = noise(rows, channels // groups, *kernel, seed=1, dtype=torch.float64)
    z = conv(x, weight, None, **settings, groups=groups).tanh()
    view = View(f"conv{dimensions}d", kernel, settings)
    moment, target = grouped_moments(view, groups, [x[:2], x[2:]], [z[:2], z[2:]])
    each, per = channels // groups, rows // groups
    outputs = view.rows(z)
    for g in range(groups):
        columns = view.unfold(x[:, g * each : (g + 1) * each])
        centred = columns - columns.mean(0)
        own = outputs[:, g * per : (g + 1) * per]
        torch.testing.assert_close(moment.mean[g], columns.mean(0))
        torch.testing.assert_close(moment.covariance[g], centred.T @ centred / len(columns))
        torch.testing.assert_close(target.cross[g], centred.T @ (own - own.mean(0)) / len(columns))
    torch.testing.assert_close(target.mean, outputs.mean(0))
    torch.testing.assert_close(target.variance, outputs.var(0, correction=0))


class Inverted(nn.Module):
    """An inverted bottleneck as in MobileNetV2, or grouped as in ResNeXt."""

    def __init__(self, groups: int = 8, width: int = 8, norm: bool = True):
        super().__init__()
        self.stem = nn.Conv2d(2, 5, 1)
        self.expand = nn.Conv2d(5, width, 1, bias=not norm)
        self.depth = nn.Conv2d(width, width, 3, padding=1, groups=groups, bias=not norm)
        self.first = nn.BatchNorm2d(width) if norm else nn.Identity()
        self.second = nn.BatchNorm2d(width) if norm else nn.Identity()
        self.project = nn.Conv2d(width, 5, 1)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        x = self.stem(x)
        y = self.second(self.depth(self.first(self.expand(x)).relu())).relu()
        return self.head((x + self.project(y)).mean((2, 3)))


@pytest.mark.parametrize("groups", [8, 4, 2])
@pytest.mark.parametrize("norm", [True, False])
def test_a_shuffled_copy_zips_onto_the_original(groups, norm):
    x = noise(200, 2, 6, 6)
    network = settled(seeded(lambda: Inverted(groups, norm=norm)), x)
    zipped = mtzip.zip_networks({"a": network, "b": shuffled(network, as_batch(x))}, {"a": x, "b": x})
    shared = [name for name, _ in zipped["a"].depth.named_parameters() if name.startswith("weight")]
    assert shared == ["weight_rows_0_1_columns_0_1"]
    assert zipped["a"].depth.weight_rows_0_1_columns_0_1 is zipped["b"].depth.weight_rows_0_1_columns_0_1
    with torch.no_grad():
        expected = network(x)
        for task in "ab":
            assert (zipped[task](x) - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("method", ["refit", "mtz", "average"])
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_two_networks(method, share):
    x = noise(200, 2, 6, 6)
    networks = {name: settled(seeded(Inverted, at), x) for at, name in enumerate("ab")}
    before = copy.deepcopy(networks)
    zipped = mtzip.zip_networks(networks, {"a": x, "b": x}, share=share, method=method)
    rows = round(8 * share)
    assert zipped["a"].depth.weight_rows_0_1_columns_0_1.shape == (rows, 1, 3, 3)
    leaf = zipped["b"].depth
    assert sum(p.numel() for name, p in leaf.named_parameters() if name.startswith("weight")) == 8 * 9
    for name in "ab":
        assert bool(torch.isfinite(zipped[name](x)).all())
        for old, new in zip(before[name].parameters(), networks[name].parameters(), strict=True):
            assert torch.equal(old, new)


def test_refit_is_no_worse_than_the_merged_weights():
    x = noise(300, 2, 6, 6)
    networks = {name: settled(seeded(lambda: Inverted(norm=False), at), x) for at, name in enumerate("ab")}
    errors = {}
    for method in ("refit", "mtz", "average"):
        zipped = mtzip.zip_networks(networks, {"a": x, "b": x}, method=method)
        with torch.no_grad():
            errors[method] = sum(float((zipped[n](x) - networks[n](x)).square().mean()) for n in "ab")
    assert errors["refit"] < errors["mtz"]
    assert errors["refit"] < errors["average"]


def test_transposed_convolutions():
    def decoder():
        return nn.Sequential(
            nn.ConvTranspose2d(3, 6, 3, stride=2, padding=1, output_padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(6, 4, 4, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 2, 1),
        )

    x = noise(100, 3, 4, 4)
    network = settled(seeded(decoder), x)
    zipped = mtzip.zip_networks({"a": network, "b": shuffled(network, as_batch(x))}, {"a": x, "b": x})
    assert isinstance(zipped["a"][0], nn.ConvTranspose2d)
    assert [axis.shared for axis in zipped.report.axes] == [6, 4]
    with torch.no_grad():
        expected = network(x)
        for task in "ab":
            assert (zipped[task](x) - expected).abs().max() < 1e-4 * expected.abs().max()
    other = settled(seeded(decoder, 1), x)
    half = mtzip.zip_networks({"a": network, "b": other}, {"a": x, "b": x}, share=0.5)
    assert half["a"][0].weight.shape == (3, 6, 3, 3)
    plain = half.extract("b")
    assert type(plain[0]) is nn.ConvTranspose2d
    with torch.no_grad():
        torch.testing.assert_close(plain(x), half["b"](x))
