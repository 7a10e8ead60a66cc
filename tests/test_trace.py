"""Axes of whole networks: as users write them, put together at random, and with layers that stay private."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import (
    IMAGE,
    Branches,
    CifarResNet,
    Functional,
    Residual,
    analysed,
    assert_reordering_changes_nothing,
    axes_of,
    conv1d_net,
    corresponding,
    free_axes,
    functional_as_sequential,
    mlp,
    noise,
    seeded,
    why,
)
from torch import nn
from torch.nn import functional as F

PICTURES = noise(4, *IMAGE)


@pytest.mark.parametrize(
    "make, shape, writers",
    [
        (mlp, (6,), [["0"], ["2"]]),
        (Functional, IMAGE, [["conv1"], ["conv2"], ["fc"]]),
        (functional_as_sequential, IMAGE, [["c1"], ["c2"], ["f1"]]),
        (conv1d_net, (3, 16), [["0"], ["2"]]),
        (Residual, IMAGE, [["stem", "outs.0", "outs.1"], ["ins.0"], ["ins.1"]]),
        (Branches, IMAGE, [["left", "depth"], ["right", "depth"], ["mix"]]),
    ],
)
def test_axes_and_their_writers(make, shape, writers):
    network = seeded(make)
    analysis = analysed(network, noise(4, *shape))
    assert list(free_axes(analysis).values()) == writers
    assert_reordering_changes_nothing(network, noise(4, *shape), len(writers))


def test_the_zero_padded_shortcut_makes_three_axes_of_a_residual_stream():
    """Zeros before and behind the 4 channels that stage 1 writes: the axis of 8 is 2 + 4 + 2."""
    x = noise(3, 3, 16, 16)
    nets = [(seeded(partial(CifarResNet, 2, (w, 2 * w, 4 * w))), x) for w in (4, 8)]
    _, found = corresponding(*nets)
    sizes = {axis.name: (axis.sizes[0], axis.sizes[1]) for axis in found.axes if len(axis.writers) > 1}
    assert sizes == {
        "conv1": (4, 8),
        "layer2.0.conv2[0:2]": (2, 4),
        "layer2.0.conv2[6:8]": (2, 4),
        "layer3.0.conv2[0:4]": (4, 8),
        "layer3.0.conv2[12:16]": (4, 8),
    }
    stream = found.axes[0]
    stages = [1, 1, 2, 2, 3, 3]
    assert [w.name for w in stream.writers[1:]] == [f"layer{s}.{at % 2}.conv2" for at, s in enumerate(stages)]
    assert [w.name for w in found.axes[-1].writers] == ["layer3.1.conv1"]
    assert_reordering_changes_nothing(nets[0][0], x, 11)


def test_layers_of_any_module_class():
    """What matters is the call: a subclass, a parameter of one's own, several weights in one module."""

    class Mine(nn.Linear):
        pass

    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = Mine(6, 5), nn.Linear(5, 4)
            self.weight = nn.Parameter(torch.randn(5, 4))
            self.other_weight = nn.Parameter(torch.randn(5, 6))
            self.head = nn.Linear(6, 3)

        def forward(self, x):
            x = F.linear(self.second(self.first(x).relu()).relu(), self.weight).relu()
            return self.head((x @ self.other_weight).relu())

    x = noise(4, 6)
    analyses, found = corresponding((seeded(Root), x), (seeded(Root, 1), x))
    assert axes_of(found) == {"first": (5, 5), "second": (4, 4), "weight": (5, 5), "other_weight": (6, 6)}
    assert list(why(found, 0)) == ["head"]
    layer = analyses[0].layers["other_weight"]
    assert (layer.transposed, layer.weight, layer.bias, layer.name) == (True, "other_weight", None, "other_weight")
    assert analyses[0].layers[""].name == "weight"
    assert_reordering_changes_nothing(seeded(Root), x, 4)


class Twice(nn.Module):
    """A layer called twice, a tied weight, a BatchNorm called twice."""

    def __init__(self):
        super().__init__()
        self.enter = nn.Linear(6, 6)
        self.again = nn.Linear(6, 6)
        self.tied = nn.Linear(6, 6)
        self.tied.weight = self.enter.weight
        self.norm = nn.BatchNorm1d(6)
        self.free = nn.Linear(6, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        x = self.norm(self.enter(x)).relu()
        x = self.norm(self.again(self.again(x).relu())).relu()
        return self.head(self.free(self.tied(x)).relu())


def test_tied_weights_and_layers_called_twice_are_private():
    x = noise(4, 6)
    analyses, found = corresponding((seeded(Twice), x), (seeded(Twice, 1), x))
    assert axes_of(found) == {"free": (5, 5)}
    reasons = why(found, 1)
    assert {"again", "norm", "head"} <= set(reasons)
    assert any("called several times" in reason for reason in reasons.values())
    assert analyses[0].norms == []


def test_weights_read_elsewhere_are_private():
    class Back(nn.Module):
        def __init__(self):
            super().__init__()
            self.code = nn.Linear(6, 4)

        def forward(self, x):
            return F.linear(self.code(x).relu(), self.code.weight.t())

    analysis = analysed(seeded(Back), noise(4, 6))
    assert analysis.layers["code"].private
    assert analysis.layers["code"].calls == 2


def test_an_axis_that_a_private_layer_writes_is_shared_by_its_other_writers():
    """A computed weight, as weight_norm makes it, is only reordered."""
    plain, other = seeded(Residual), seeded(Residual, 1)
    nn.utils.parametrizations.weight_norm(other.stem)
    analyses, found = corresponding((plain, PICTURES), (other, PICTURES))
    assert axes_of(found) == {"ins.0": (5, 5), "outs.0": (6, 6), "ins.1": (5, 5)}
    assert [writers.name for writers in found.axes[1].writers] == ["outs.0", "outs.1"]
    assert why(found, 1)["stem"] == "its weight is computed, not stored"
    assert set(analyses[1].unshared) == {f"stem.parametrizations.weight.original{at}" for at in (0, 1)}
    assert_reordering_changes_nothing(other, PICTURES, 3)


def test_a_layer_called_twice_is_reordered_with_its_axis():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.enter, self.block, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x):
            x = self.enter(x).relu()
            for _ in range(3):
                x = x + self.block(x).relu()
            return self.head(x)

    x = noise(4, 6)
    analyses, found = corresponding((seeded(Shared), x), (seeded(Shared, 1), x))
    assert axes_of(found) == {"enter": (8, 8)}
    assert analyses[0].layers["block"].calls == 3
    assert "several calls" in why(found, 0)["block"]
    assert_reordering_changes_nothing(seeded(Shared), x)


class Heads(nn.Module):
    """Attention over 5 positions of 6 features, between a first and a last layer: heads as users write them."""

    def __init__(self, attend, **widths):
        super().__init__()
        self.embed, self.out, self.head = nn.Linear(6, 10), nn.Linear(24, 10), nn.Linear(10, 3)
        for name, width in widths.items():
            setattr(self, name, nn.Linear(10, width))
        self.attend = attend

    def forward(self, x):
        x = self.embed(x)
        return self.head(x + self.out(self.attend(self, x).flatten(2))).mean(1)


def heads_of(x, heads):
    return x.view(x.size(0), x.size(1), heads, -1).transpose(1, 2)


def softmax_attention(q, k, v):
    return (torch.softmax(q @ k.transpose(-2, -1) / 8**0.5, -1) @ v).transpose(1, 2)


def fused(net, x):
    q, k, v = net.qkv(x).reshape(x.size(0), 5, 3, 3, 8).permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def fused_by_head(net, x):
    q, k, v = heads_of(net.qkv(x), 3).chunk(3, -1)
    return softmax_attention(q, k, v)


def cut_in_three(net, x):
    return softmax_attention(*(heads_of(part, 3) for part in net.qkv(x).split(24, dim=2)))


def separate(net, x):
    q, k, v = (heads_of(layer(x), 3) for layer in (net.q, net.k, net.v))
    return softmax_attention(q, k, v)


def batched(net, x):
    """Batch and heads in one dimension, as nn.MultiheadAttention has them."""
    q, k, v = (layer(x).transpose(0, 1).contiguous().view(5, -1, 8).transpose(0, 1) for layer in (net.q, net.k, net.v))
    out = torch.bmm(torch.softmax(torch.baddbmm(q.new_zeros(1, 5, 5), q, k.mT), -1), v)
    return out.transpose(0, 1).reshape(5, x.size(0), 24).transpose(0, 1)


def turned(x):
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), -1)


def rotary(net, x):
    q, k, v = (heads_of(layer(x), 3) for layer in (net.q, net.k, net.v))
    angle = torch.outer(torch.arange(5.0), torch.linspace(1, 0.1, 8)).to(x.dtype)
    q, k = (part * angle.cos() + turned(part) * angle.sin() for part in (q, k))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def grouped_queries(net, x):
    q, k, v = heads_of(net.q(x), 6), heads_of(net.k(x), 2), heads_of(net.v(x), 2)
    k = k[:, :, None].expand(k.size(0), 2, 3, 5, 4).reshape(k.size(0), 6, 5, 4)
    return softmax_attention(q, k, v.repeat_interleave(3, dim=1))


def grouped_by_flag(net, x):
    q, k, v = heads_of(net.q(x), 6), heads_of(net.k(x), 2), heads_of(net.v(x), 2)
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)


def single(net, x):
    return softmax_attention(*(layer(x).unsqueeze(1) for layer in (net.q, net.k, net.v)))


@pytest.mark.parametrize(
    "attend, widths, expected",
    [
        (fused, dict(qkv=72), {"qkv": [(3, 3, 8)]}),
        (cut_in_three, dict(qkv=72), {"qkv": [(3, 3, 8)]}),
        (fused_by_head, dict(qkv=72), {"qkv": [(3, 1, 24)]}),
        (separate, dict(q=24, k=24, v=24), {name: [(3, 1, 8)] for name in "qkv"}),
        (batched, dict(q=24, k=24, v=24), {name: [(3, 1, 8)] for name in "qkv"}),
        (rotary, dict(q=24, k=24, v=24), {name: [(3, 1, 8)] for name in "qkv"}),
        (grouped_queries, dict(q=24, k=8, v=8), {"q": [(2, 1, 12)], "k": [(2, 1, 4)], "v": [(2, 1, 4)]}),
        (grouped_by_flag, dict(q=24, k=8, v=8), {"q": [(2, 1, 12)], "k": [(2, 1, 4)], "v": [(2, 1, 4)]}),
        (single, dict(q=24, k=24, v=24), {name: [(24, 1, 1)] for name in "qkv"}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_heads_are_shared_as_wholes(attend, widths, expected):
    """Rows of every layer as (heads, outer, rows to a head); query, key and value on one axis."""
    network = seeded(lambda: Heads(attend, **widths))
    analysis = analysed(network, noise(4, 5, 6))
    axes = analysis.axes
    rows = {name: axes.resolve(analysis.layers[name].rows) for name in expected}
    assert {n: [(axes[s.atom].size, s.outer, s.inner) for s in dim] for n, dim in rows.items()} == expected
    heads = {s.atom for dim in rows.values() for s in dim}
    assert len(heads) == (2 if attend is single else 1)  # one head: queries with keys, values by themselves
    assert {s.atom for s in axes.resolve(analysis.layers["out"].columns)} <= heads
    assert_reordering_changes_nothing(network, noise(4, 5, 6), 2)


# -- random networks -------------------------------------------------------------------------------------------

PIECES = {
    "conv": lambda c: (nn.Conv2d(c, 5, 3, padding=1), 5),
    "strided": lambda c: (nn.Conv2d(c, 4, 2, stride=2, padding=1, bias=False), 4),
    "same": lambda c: (nn.Conv2d(c, 3, 2, padding="same", dilation=2), 3),
    "norm": lambda c: (nn.BatchNorm2d(c), c),
    "relu": lambda c: (nn.ReLU(inplace=True), c),
    "prelu": lambda c: (nn.PReLU(c), c),
    "pool": lambda c: (nn.MaxPool2d(2, ceil_mode=True), c),
    "depthwise": lambda c: (nn.Conv2d(c, c, 3, padding=1, groups=c), c),
    "residual": lambda c: (Around(c), c),
    "dense": lambda c: (Beside(c), c + 3),
}


class Around(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.inner, self.outer = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 3, padding=1)

    def forward(self, x):
        return x + self.outer(torch.tanh(self.inner(x)))


class Beside(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.extra = nn.Conv2d(channels, 3, 1)

    def forward(self, x):
        return torch.cat([x, self.extra(x)], 1)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(sorted(PIECES)), max_size=6), st.sampled_from(["flatten", "pool", "linear"]))
def test_reordering_every_axis_of_a_random_network_changes_nothing(names, end):
    channels = 4
    layers: list[nn.Module] = [nn.Conv2d(2, channels, 3, padding=1)]
    for name in names:
        layer, channels = PIECES[name](channels)
        layers.append(layer)
    layers += [nn.AdaptiveAvgPool2d(1 if end == "pool" else 2), nn.Flatten()]
    features = channels * (1 if end == "pool" else 4)
    if end == "linear":
        layers += [nn.Linear(features, 6), nn.ReLU()]
        features = 6
    assert_reordering_changes_nothing(seeded(lambda: nn.Sequential(*layers, nn.Linear(features, 3))), PICTURES)
