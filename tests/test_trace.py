"""Tracing: axes of networks as users write them, what answers to what, and what stays private by name."""

from __future__ import annotations

import copy
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
    axes_of,
    conv1d_net,
    corresponding,
    functional_as_sequential,
    mlp,
    noise,
    seeded,
    why,
)
from torch import nn
from torch.nn import functional as F

from mtzip import ZipError
from mtzip.permute import permute_, verify_axes
from mtzip.trace import rules

PICTURES = noise(4, *IMAGE)


def free_axes(analysis) -> dict[int, list[str]]:
    """Atom to writers of every axis that some layer writes and that may be reordered."""
    atoms = [(atom, analysis.axes[atom]) for atom in analysis.axes.roots()]
    return {at: atom.writers for at, atom in atoms if atom.pinned is None and atom.size > 1 and atom.writers}


def assert_reordering_changes_nothing(network: nn.Module, x: torch.Tensor, least: int = 1) -> None:
    """Every free axis in a random order: the same function, also of inputs the network was not traced with."""
    analysis = analysed(network, x)
    free = free_axes(analysis)
    assert len(free) >= least, f"only {free} can be reordered"
    generator = torch.Generator().manual_seed(1)
    orders = {atom: torch.randperm(analysis.axes[atom].size, generator=generator) for atom in free}
    permuted = copy.deepcopy(analysis.exported.network)
    permute_(permuted, analysis, orders)
    other = torch.randn(5, *x.shape[1:], generator=generator)
    moved = [not torch.equal(a, b) for a, b in zip(permuted.parameters(), network.parameters(), strict=True)]
    assert any(moved)
    with torch.no_grad():
        torch.testing.assert_close(permuted(other), network(other), rtol=1e-4, atol=1e-5)


# -- axes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make, shape, writers",
    [
        (mlp, (6,), [["0"], ["2"]]),
        (Functional, IMAGE, [["conv1"], ["conv2"], ["fc"]]),
        (functional_as_sequential, IMAGE, [["c1"], ["c2"], ["f1"]]),
        (conv1d_net, (3, 16), [["0"], ["2"]]),
        (Residual, IMAGE, [["stem", "outs.0", "outs.1"], ["ins.0"], ["ins.1"]]),
        (Branches, IMAGE, [["left"], ["right"], ["mix"]]),
    ],
)
def test_axes_and_their_writers(make, shape, writers):
    network = seeded(make)
    analysis = analysed(network, noise(4, *shape))
    assert list(free_axes(analysis).values()) == writers
    assert_reordering_changes_nothing(network, noise(4, *shape), len(writers))


class Calls(nn.Module):
    """A convolution, some function of what it puts out, and a head."""

    def __init__(self, between, features: int, width: int = 4, **modules):
        super().__init__()
        self.conv = nn.Conv2d(2, width, 3, padding=1)
        for name, module in modules.items():
            setattr(self, name, module)
        self.between = between
        self.head = nn.Linear(features, 3)

    def forward(self, x):
        return self.head(self.between(self, self.conv(x)))


@pytest.mark.parametrize(
    "between, features",
    [
        (lambda net, x: x.view(x.size(0), -1), 256),
        (lambda net, x: x.reshape(-1, 256).relu_(), 256),
        (lambda net, x: torch.flatten(F.relu(x, inplace=True), 1), 256),
        (lambda net, x: F.dropout(x.flatten(1), 0.5, net.training), 256),
        (lambda net, x: F.adaptive_avg_pool2d(x, 1).squeeze(-1).squeeze(-1), 4),
        (lambda net, x: F.adaptive_max_pool2d(x, 2).flatten(1), 16),
        (lambda net, x: F.avg_pool2d(x, 3, 2, 1).flatten(1), 64),
        (lambda net, x: x.mean([2, 3]), 4),
        (lambda net, x: x.amax((2, 3)), 4),
        (lambda net, x: x.flatten(2).max(-1).values, 4),
        (lambda net, x: (x.sigmoid() * x + 1.5).flatten(1), 256),
        (lambda net, x: F.pad(x, (1, 1, 0, 0)).flatten(1), 320),
        (lambda net, x: x.permute(0, 2, 3, 1).mean((1, 2)), 4),
        (lambda net, x: x.transpose(1, 3)[:, ::2].sum((1, 2)), 4),
        (lambda net, x: F.interpolate(x, scale_factor=0.5).flatten(1), 64),
        (lambda net, x: torch.cat([x, x.relu()], 1).flatten(1), 512),
        (lambda net, x: torch.cat(x.chunk(2, -1), -1).flatten(1), 256),
        (lambda net, x: (x / (x.var(unbiased=False) + 1)).flatten(1), 256),
        (lambda net, x: torch.where(x > 0, x, x * 0.1).flatten(1), 256),
        (lambda net, x: F.softmax(x, 1).flatten(1), 256),
        (lambda net, x: F.instance_norm(x).flatten(1), 256),
        (lambda net, x: F.layer_norm(x.mean((2, 3)), (4,)), 4),
    ],
)
def test_operators_that_keep_an_axis(between, features):
    assert_reordering_changes_nothing(seeded(lambda: Calls(between, features)), PICTURES)


@pytest.mark.parametrize(
    "module",
    [
        nn.BatchNorm2d(4),
        nn.BatchNorm2d(4, affine=False),
        nn.BatchNorm2d(4, track_running_stats=False),
        nn.PReLU(),
        nn.PReLU(4),
        nn.GroupNorm(4, 4),
        nn.InstanceNorm2d(4, affine=True),
        nn.Hardswish(),
        nn.ReLU6(inplace=True),
        nn.ELU(),
        nn.Mish(),
        nn.Dropout2d(),
        nn.Conv2d(4, 4, 3, padding=1, groups=4),
        nn.LocalResponseNorm(2),
        nn.ConvTranspose2d(4, 4, 3, padding=1),
        nn.Conv2d(4, 4, 3, padding=1, groups=2),
    ],
)
def test_modules_keep_the_axis_or_are_named(module):
    network = seeded(lambda: Calls(lambda net, x: net.module(x).flatten(1), 256, module=module))
    analysis = analysed(network, PICTURES)
    if free_axes(analysis):
        assert_reordering_changes_nothing(network, PICTURES)
    else:
        assert isinstance(module, (nn.GroupNorm, nn.LocalResponseNorm, nn.ConvTranspose2d, nn.Conv2d))
        assert analysis.axes[analysis.layers["conv"].rows[0].atom].pinned


@pytest.mark.parametrize(
    "kind, arguments",
    [
        ("Conv1d", dict(kernel_size=3, stride=2, padding=2, dilation=2)),
        ("Conv1d", dict(kernel_size=4, padding="same")),
        ("Conv2d", dict(kernel_size=(3, 1), stride=(2, 1), padding=(0, 1), dilation=(1, 2))),
        ("Conv2d", dict(kernel_size=4, padding="same", dilation=2)),
        ("Conv2d", dict(kernel_size=3, padding="valid")),
        ("Conv2d", dict(kernel_size=3, padding=1, padding_mode="circular")),
        ("Conv3d", dict(kernel_size=2, stride=(1, 2, 1), padding=1)),
    ],
)
def test_convolutions_of_any_setting(kind, arguments):
    space = int(kind[4])
    conv = getattr(nn, kind)
    first = seeded(lambda: nn.Sequential(conv(2, 4, **arguments), nn.ReLU(), conv(4, 5, 2), nn.Flatten()))
    x = noise(3, 2, *[9] * space)
    network = nn.Sequential(first, seeded(lambda: nn.Linear(first(x).shape[1], 3))).eval()
    assert_reordering_changes_nothing(network, x, 2)
    layer = analysed(network, x).layers["0.0"]
    assert (layer.kind, layer.private) == (kind.lower(), None)


@torch.library.custom_op("mtzip_tests::swap", mutates_args=())
def swap(x: torch.Tensor) -> torch.Tensor:
    return x.flip(1).clone()


swap.register_fake(lambda x: torch.empty_like(x))


@pytest.mark.parametrize(
    "between, features, name",
    [
        (lambda net, x: swap(x).flatten(1), 256, "swap"),
        (lambda net, x: F.pixel_shuffle(x, 2).flatten(1), 256, "pixel_shuffle"),
        (lambda net, x: x.sort(1).values.flatten(1), 256, "sort"),
        (lambda net, x: torch.fft.rfft(x, dim=1).abs().flatten(1), 192, "fft_rfft"),
        (lambda net, x: x.roll(1, 1).flatten(1), 256, "roll"),
        (lambda net, x: torch.einsum("nchw,cd->ndhw", x, x.new_ones(4, 4)).flatten(1), 256, "einsum"),
    ],
)
def test_operators_without_a_rule_are_named_and_leave_their_neighbours_private(between, features, name):
    make = lambda: Calls(between, features)  # noqa: E731
    _, found = corresponding((seeded(make), PICTURES), (seeded(make, 1), PICTURES))
    assert axes_of(found) == {}
    for task in (0, 1):
        reasons = why(found, task)
        assert name in reasons
        assert name in reasons["conv"]
        assert set(reasons) >= {"conv", "head"}


@pytest.mark.parametrize(
    "between, features",
    [
        (lambda net, x: x[:, :2].flatten(1), 128),
        (lambda net, x: x[:, 1].flatten(1), 64),
        (lambda net, x: x.view(-1, 2, 2, 64).flatten(1), 256),
        (lambda net, x: torch.cat(x.chunk(2, 1)[::-1], 1).flatten(1), 256),
        (lambda net, x: (x + x.mean((2, 3)).view(-1, 4, 1, 1).flip(1)).flatten(1), 256),
        (lambda net, x: x.flatten(1) @ x.flatten(1).T[:, :3], 3),
    ],
)
def test_an_axis_whose_order_matters_is_pinned(between, features):
    network = seeded(lambda: Calls(between, features))
    if features == 3:
        network.head = nn.Linear(3, 3)
    analysis = analysed(network, PICTURES)
    assert analysis.axes[analysis.layers["conv"].rows[0].atom].pinned


def test_layers_without_a_leaf_class_are_private_and_named():
    class Mine(nn.Linear):
        pass

    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = Mine(6, 5), nn.Linear(5, 4)
            self.weight = nn.Parameter(torch.randn(5, 4))
            self.head = nn.Linear(5, 3)

        def forward(self, x):
            return self.head(F.linear(self.second(self.first(x).relu()).relu(), self.weight).relu())

    x = noise(4, 6)
    _, found = corresponding((seeded(Root), x), (seeded(Root, 1), x))
    assert axes_of(found) == {"second": (4, 4)}
    reasons = why(found, 0)
    assert "Mine, for which there is no leaf class" in reasons["first.weight"]
    assert "Root, for which there is no leaf class" in reasons["weight"]
    assert "output" in reasons["head"]


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


def test_an_axis_first_written_by_a_private_layer_is_shared_by_its_other_writers():
    class Stem(nn.Conv2d):
        pass

    plain, other = seeded(Residual), seeded(lambda: Residual(stem=Stem), 1)
    _, found = corresponding((plain, PICTURES), (other, PICTURES))
    assert axes_of(found) == {"outs.0": (6, 6), "ins.0": (5, 5), "ins.1": (5, 5)}
    assert [writers.name for writers in found.axes[1].writers] == ["outs.0", "outs.1"]
    assert "no leaf class" in why(found, 1)["stem.weight"]


# -- networks that are hard to export --------------------------------------------------------------------------


def test_a_fixed_batch_size_is_noticed():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def forward(self, x):
            return self.net(x.view(3, 6))

    assert analysed(seeded(Fixed), noise(4, 6)).exported.fixed_batch == 3
    assert analysed(seeded(mlp), noise(4, 6)).exported.fixed_batch is None


def test_control_flow_on_values_cannot_be_exported():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def forward(self, x):
            return self.net(x) if x.sum() > 0 else x

    with pytest.raises(ZipError, match=r"task 'b': Branching cannot be exported(.|\n)*wrap it"):
        analysed(seeded(Branching), noise(4, 6), "b")
    with pytest.raises(ZipError, match="'b'"):
        analysed(seeded(mlp), noise(4, 7), "b")


def test_a_graph_inside_the_graph():
    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.top = nn.Linear(6, 5), mlp(5)

        def forward(self, x):
            with torch.no_grad():
                x = self.body(x).relu()
            return self.top(x)

    _, found = corresponding((seeded(Frozen), noise(4, 6)), (seeded(Frozen, 1), noise(4, 6)))
    assert axes_of(found) == {"top.0": (8, 8), "top.2": (5, 5)}
    assert "wrap_with_set_grad_enabled" in why(found, 0)


def test_the_network_traced_is_a_frozen_copy():
    network = seeded(Functional).train()
    before = copy.deepcopy(network.state_dict())
    analysis = analysed(network, PICTURES)
    assert network.training
    assert all(p.requires_grad for p in network.parameters())
    assert not any(p.requires_grad for p in analysis.exported.network.parameters())
    assert not analysis.exported.network.training
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


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


# -- the proof on the example ----------------------------------------------------------------------------------


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


# -- which layer answers to which ------------------------------------------------------------------------------


def test_a_class_answers_to_a_sequential():
    """Other names, other activations, other widths, other heads: the same graph."""
    pair = (seeded(Functional), PICTURES), (seeded(lambda: functional_as_sequential((4, 5, 9), 10), 1), PICTURES)
    _, found = corresponding(*pair)
    assert axes_of(found) == {"conv1": (6, 4), "conv2": (5, 5), "fc": (7, 9)}
    assert why(found, 0) == {"head": "it is an output of the network"}
    assert why(found, 1) == {"out": "it is an output of the network"}


def test_another_depth_leaves_the_rest_private_by_name():
    x = noise(4, 6)
    _, found = corresponding((seeded(lambda: mlp(hidden=(8, 5, 4))), x), (seeded(lambda: mlp(hidden=(7, 5)), 1), x))
    assert axes_of(found) == {"0": (8, 7), "2": (5, 5)}
    assert why(found, 0) == {
        "4": "its counterpart cannot be shared",
        "6": "no layer of the other networks answers to it",
    }
    assert why(found, 1) == {"4": "it is an output of the network"}


def test_another_kernel_leaves_everything_behind_it_private():
    def make(kernel):
        return nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, kernel), nn.ReLU(), nn.Conv2d(4, 3, 1), nn.Flatten()
        )

    _, found = corresponding((seeded(lambda: make(3)), PICTURES), (seeded(lambda: make(1), 1), PICTURES))
    assert axes_of(found) == {"0": (4, 4)}
    assert set(why(found, 0)) == {"2", "4"}


def test_other_input_sizes_still_share_rows():
    _, found = corresponding((seeded(lambda: mlp(6)), noise(4, 6)), (seeded(lambda: mlp(9), 1), noise(4, 9)))
    assert axes_of(found) == {"0": (8, 8), "2": (5, 5)}


def test_operands_of_an_addition_may_change_places():
    class Swapped(Residual):
        def forward(self, x):
            x = F.relu(self.stem_bn(self.stem(x)))
            for enter, mid, leave, end in zip(self.ins, self.mids, self.outs, self.ends, strict=True):
                x = F.relu(end(leave(F.relu(mid(enter(x))))) + x)
            return self.head(x.mean((2, 3)))

    _, found = corresponding((seeded(Residual), PICTURES), (seeded(Swapped, 1), PICTURES))
    assert axes_of(found) == {"stem": (6, 6), "ins.0": (5, 5), "ins.1": (5, 5)}


def test_residual_streams_tied_differently_stay_apart():
    """What is one axis in one network and two in the other: never an error, and never one axis in both."""

    class Plain(nn.Module):
        def __init__(self, skip):
            super().__init__()
            self.a, self.b, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
            self.skip = skip

        def forward(self, x):
            x = self.a(x).relu()
            y = self.b(x).relu()
            return self.head(y + x if self.skip else y)

    x = noise(4, 6)
    _, found = corresponding((seeded(lambda: Plain(True)), x), (seeded(lambda: Plain(False), 1), x))
    assert axes_of(found) == {"a": (6, 6)}
    assert "tied to another axis" in why(found, 1)["b"]


def test_three_networks_have_an_axis_in_common():
    x = noise(4, 6)
    _, found = corresponding(*[(seeded(lambda w=w: mlp(hidden=(w, 5)), w), x) for w in (8, 7, 9)])
    assert axes_of(found) == {"0": (8, 7, 9), "2": (5, 5, 5)}


def test_two_inputs_and_keywords():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right, self.head = nn.Linear(3, 4), nn.Linear(5, 6), nn.Linear(10, 2)

        def forward(self, first, second=None):
            return {"logits": self.head(torch.cat([self.left(first), self.right(second)], 1).relu())}

    from mtzip.inputs import as_batch
    from mtzip.leaf import LEAVES
    from mtzip.trace.analysis import Analysis
    from mtzip.trace.export import export

    batch = as_batch({"first": noise(4, 3), "second": noise(4, 5)})
    analysis = Analysis(export("t", seeded(Two), batch), tuple(LEAVES))
    assert list(free_axes(analysis).values()) == [["left"], ["right"]]
