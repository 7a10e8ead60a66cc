"""Architectures as users bring them: every axis found free can be reordered, and what stays private is named."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from nets import CifarResNet, analysed, assert_reordering_changes_nothing, free_axes, noise, reordering_error, seeded
from torch import nn

from bench import networks
from bench.zoo import ARCHITECTURES
from mtzip.inputs import as_batch
from mtzip.trace.analysis import Analysis
from mtzip.trace.correspond import correspond
from mtzip.trace.export import export
from mtzip.trace.sharable import sharable

BY_NAME = {architecture.name: architecture for architecture in ARCHITECTURES}

#: What not all can be shared of, tiny: the least fraction, and what stays private apart from heads.
PRIVATE = {
    "ShuffleNetV2": (0.9, "joins dimensions of different structure"),
    "nn.TransformerEncoder": (0.85, "its weight is computed, not stored"),
    "GRU classifier": (0.05, "a recurrent layer is not shared"),
}


@cache
def analysis_of(name: str) -> Analysis:
    architecture = BY_NAME[name]
    return Analysis(export(name, architecture.build(tiny=True), as_batch(architecture.example(True))))


@pytest.mark.parametrize("name", BY_NAME)
def test_every_free_axis_can_be_reordered(name):
    analysis = analysis_of(name)
    assert analysis.exported.fixed_batch is None
    # Networks that cast to float32 round there, whatever their weights are.
    assert reordering_error(analysis, analysis.exported.example) < (1e-5 if BY_NAME[name].casts else 1e-9)
    counted = sharable(analysis)
    assert counted.total == sum(p.numel() for p in analysis.exported.network.parameters())
    if name in PRIVATE:
        least, reason = PRIVATE[name]
        assert least < counted.fraction < 1
        assert any(reason in note.reason for note in counted.notes)
    else:
        assert counted.fraction == 1
        assert all(note.name in analysis.layers for note in counted.notes)  # the heads


@pytest.mark.parametrize("name", BY_NAME)
def test_the_outputs_depend_on_the_order_of_every_axis(name):
    """Else the test above would prove nothing: reordering only what a layer writes, and no reader, is noticed."""
    analysis = analysis_of(name)
    weights = {layer.weight for layer in analysis.layers.values()}
    before = analysis.uses
    rows = {path: {at: dim for at, dim in dims.items() if at == _rows(analysis, path)} for path, dims in before.items()}
    unnoticed = []
    try:
        analysis.uses = {path: dims for path, dims in rows.items() if path in weights}
        for atom, writers in free_axes(analysis).items():
            error = reordering_error(analysis, analysis.exported.example, only=atom)
            unnoticed += [writers] if error < 1e-6 else []
    finally:
        analysis.uses = before
    assert unnoticed == []


def _rows(analysis: Analysis, path: str) -> int:
    return 1 if any(layer.weight == path and layer.transposed for layer in analysis.layers.values()) else 0


@pytest.mark.parametrize("name", BY_NAME)
def test_two_of_a_kind_share_every_free_axis(name):
    """Nothing is lost between what one network allows and what two have in common."""
    analysis = analysis_of(name)
    found = correspond([analysis, analysis])
    writers = {layer.path for layer in analysis.layers.values() if layer.private is None}
    expected = {atom for atom, paths in free_axes(analysis).items() if writers & set(paths)}
    for task in (0, 1):
        assert {axis.atoms[task] for axis in found.axes if axis.sizes[task] > 1} == expected
    names = [axis.name for axis in found.axes]
    assert len(names) == len(set(names))


@pytest.mark.shared
@pytest.mark.parametrize("name", ["resnet20-cifar10", "resnet56-cifar10", "resnet20-projection-cifar10"])
def test_real_residual_networks(name):
    network = networks.pretrained(f"{name}/a")
    analysis = analysed(network, noise(3, 3, 32, 32))
    assert sharable(analysis).fraction == 1
    assert_reordering_changes_nothing(network, noise(3, 3, 32, 32), 12)


def test_widths_of_the_zero_padded_shortcut_may_differ():
    pair = [analysed(seeded(lambda w=w: CifarResNet(1, (w, 2 * w, 4 * w))), noise(3, 3, 16, 16)) for w in (4, 8)]
    found = correspond(pair)
    assert [axis.sizes for axis in found.axes if len(axis.writers) == 4] == [{0: 4, 1: 8}]


def test_what_is_counted():
    """Weight and bias of every layer, heads and tables and norms by themselves."""

    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.norm = nn.Embedding(9, 6), nn.LayerNorm(6)
            self.body, self.fixed, self.head = nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.fixed(self.body(self.norm(self.table(x))).relu()).flip(-1).mean(1))

    analysis = analysed(seeded(Small), torch.arange(12).view(4, 3) % 9)
    counted = sharable(analysis)
    assert (counted.free, counted.private, counted.heads, counted.other) == (35, 24, 10, 54 + 12)
    assert counted.fraction == 35 / 59
    assert {note.name: note.reason.split(" (")[0] for note in counted.notes} == {
        "head": "it is an output of the network",
        "fixed": "flip",
    }
