"""``zip_networks`` from end to end, on small networks of every supported kind."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from nets import (
    IMAGE,
    Functional,
    Residual,
    analysed,
    functional_as_sequential,
    mlp,
    seeded,
)
from torch import nn
from zipping import KINDS, METHODS, assert_finite, bare_norms, calibrated, errors, inputs, pair, zip_pair

import mtzip
from mtzip.network.leaf import SharedLayer, leaves
from mtzip.trace.permute import permute_

# -- what must hold for every kind of network and every method -------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_on_every_kind_of_network(kind, method):
    """Originals unchanged, finite weights, no more parameters than before, copies that are right to the last layer."""
    make, shape = KINDS[kind]
    networks, data = pair(make), inputs(*shape)
    networks["a"].train()
    networks["b"][0].weight.requires_grad_(False) if isinstance(networks["b"], nn.Sequential) else None
    before = {task: copy.deepcopy(network.state_dict()) for task, network in networks.items()}
    flags = {task: [p.requires_grad for p in network.parameters()] for task, network in networks.items()}
    zipped = zip_pair(networks, data, method=method)
    for task, network in networks.items():
        assert network.training == (task == "a") == zipped[task].training
        assert [p.requires_grad for p in network.parameters()] == flags[task]
        assert network.state_dict().keys() == before[task].keys()
        assert all(torch.equal(value, before[task][key]) for key, value in network.state_dict().items())
        assert type(zipped[task]) is type(network)
    assert zipped.training
    assert zipped.report.axes
    assert all(axis.shared == min(axis.neurons.values()) for axis in zipped.report.axes)
    assert zipped.report.parameters_before == sum(p.numel() for n in networks.values() for p in n.parameters())
    assert zipped.report.parameters_after == zipped.parameter_count() < zipped.report.parameters_before
    zipped.eval()
    assert_finite(zipped, data)
    if method == "refit":
        assert max(errors(zipped, networks, data).values()) < 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_a_copy_zips_onto_the_original(kind, method):
    """A network and its copy with every hidden axis in another order are one network, whatever the method."""
    make, shape = KINDS[kind]
    data = inputs(*shape)
    data["b"] = data["a"]
    networks = {task: calibrated(seeded(make), data[task]) for task in "ab"}
    analysis = analysed(networks["b"], data["b"])
    generator = torch.Generator().manual_seed(3)
    orders = {
        atom: torch.randperm(analysis.axes[atom].size, generator=generator)
        for atom in analysis.axes.roots()
        if analysis.axes[atom].pinned is None
    }
    permute_(networks["b"], analysis, orders)
    zipped = zip_pair(networks, data, method=method, reconstructions=0)
    assert max(errors(zipped, networks, data).values()) < 1e-8


@pytest.mark.parametrize("share", [0, 0.0, {}])
@pytest.mark.parametrize("method", METHODS)
def test_nothing_shared_is_the_originals_bit_for_bit(share, method):
    networks, data = pair(Functional), inputs(*IMAGE)
    zipped = zip_pair(networks, data, share, method)
    for task, network in networks.items():
        assert not list(leaves(zipped[task]))
        state = zipped[task].state_dict()
        assert all(torch.equal(state[key], value) for key, value in network.state_dict().items())
        assert torch.equal(zipped[task](data[task]), network(data[task]))
    assert zipped.report.parameters_after == zipped.report.parameters_before


@pytest.mark.parametrize("method", METHODS)
def test_the_same_call_gives_the_same_bits(method):
    networks, data = pair(Functional), inputs(*IMAGE)
    torch.manual_seed(5)
    first = zip_pair(networks, data, 0.7, method)
    torch.manual_seed(6)
    state = torch.get_rng_state()
    second = zip_pair(networks, data, 0.7, method)
    assert torch.equal(torch.get_rng_state(), state)
    first, second = first.state_dict(), second.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


# -- how much is shared ----------------------------------------------------------------------------------------------


def stored(widths_a, widths_b, counts, columns, inner, norms, biases, classes, affine: bool) -> int:
    """Parameters a zipped pair of chains stores, by arithmetic: shared blocks once.

    Args:
        widths_a, widths_b, counts: of every hidden axis, and how many neurons of it are shared.
        columns: inputs of the first layer, all shared.
        inner: columns of every layer for each unit of the axis before it, head included.
        norms, biases: whether a BatchNorm follows each hidden layer, whether each layer has a bias, head included.
        classes: outputs of the two heads.
        affine: private scale and shift.
    """
    total, before = 0, (columns, columns, columns)
    for a, b, k, each, norm, bias in zip(widths_a, widths_b, counts, inner, norms, biases, strict=False):
        columns_a, columns_b, shared = (size * each for size in before)
        total += k * (shared + (columns_a - shared) + (columns_b - shared))  # shared rows
        total += (a - k) * columns_a + (b - k) * columns_b
        if norm:
            total += 2 * (a + b) + (a + b - k if bias else 0)
        elif affine and k:
            total += a + b + 2 * k
        elif bias:
            total += a + b - k
        before = a, b, k
    for width, size in zip(before, classes, strict=False):
        total += size * (width * inner[-1] + biases[-1])
    return total


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("share", [1.0, 0.5, {"fc": 0.5, "conv1": 3}])
def test_stored_parameters_are_what_arithmetic_says(method, share):
    networks = pair(lambda: Functional((6, 5, 7)), lambda: Functional((4, 5, 9), 10))
    zipped = zip_pair(networks, inputs(*IMAGE), share, method)
    smaller = {"conv1": 4, "conv2": 5, "fc": 7}
    if isinstance(share, float):
        counts = [round(share * width) for width in smaller.values()]
    else:
        counts = [3, 0, 4]
    assert {axis.name: axis.shared for axis in zipped.report.axes} == {
        name: count for name, count in zip(smaller, counts, strict=True) if count
    }
    expected = stored(
        (6, 5, 7), (4, 5, 9), counts, 2, (9, 9, 4, 1), (1, 0, 0), (0, 1, 1, 1), (3, 10), method == "refit"
    )
    assert zipped.parameter_count() == zipped.report.parameters_after == expected
    assert zipped.report.parameters_after - zipped.report.parameters_before == sum(
        layer.after - layer.before for layer in zipped.report.layers
    )


def test_counts_fractions_and_axes_not_named():
    networks = pair(lambda: mlp(hidden=(8, 5)), lambda: mlp(hidden=(6, 7), classes=4))
    zipped = zip_pair(networks, inputs(6), {"0": 1})
    assert {axis.name: axis.shared for axis in zipped.report.axes} == {"0": 1}
    assert isinstance(zipped["a"][0], SharedLayer)
    assert type(zipped["a"][2]) is nn.Linear
    zipped = zip_pair(networks, inputs(6), {"0": 1.0, "2": 0.25})
    assert {axis.name: (axis.neurons, axis.shared) for axis in zipped.report.axes} == {
        "0": ({"a": 8, "b": 6}, 6),
        "2": ({"a": 5, "b": 7}, 1),
    }


def test_shared_weights_are_one_tensor():
    zipped = zip_pair(pair(lambda: mlp(norm=True)), inputs(6))
    a, b = zipped["a"][0], zipped["b"][0]
    assert a.is_whole
    assert a.weight is b.weight
    assert isinstance(a, nn.Linear)
    assert "shared.0.weight_rows_0_1_columns_0_1" in zipped.state_dict()


def test_less_sharing_costs_less():
    networks, data = pair(lambda: mlp(hidden=(24, 16))), inputs(6, count=1000)
    worst = [max(errors(zip_pair(networks, data, share), networks, data).values()) for share in (0.25, 0.5, 1.0)]
    assert worst[0] < worst[1] < worst[2]


# -- networks that differ --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_networks_that_differ_in_everything_but_the_graph(method):
    networks = pair(Functional, lambda: functional_as_sequential((4, 7, 9), 10))
    data = inputs(*IMAGE)
    zipped = zip_pair(networks, data, method=method)
    assert [axis.name for axis in zipped.report.axes] == ["conv1", "conv2", "fc"]
    assert zipped["b"](data["b"]).shape == (200, 10)
    assert_finite(zipped, data)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("first, second", [(True, False), (False, True)])
def test_a_batchnorm_or_bias_in_one_network_only(method, first, second):
    """Only one task's layer is followed by a BatchNorm: the other keeps its bias."""
    networks = pair(lambda: Functional(batchnorm=first), lambda: Functional(batchnorm=second))
    networks["a"].conv1.weight.data.copy_(networks["b"].conv1.weight)
    data = inputs(*IMAGE)
    zipped = zip_pair(networks, data, {"conv1": 1.0}, method)
    assert_finite(zipped, data)
    plain = "b" if first else "a"
    x = data[plain]
    got, expected = zipped[plain].conv1(x), networks[plain].conv1(x)
    order = torch.cdist(got.detach().transpose(0, 1).flatten(1), expected.detach().transpose(0, 1).flatten(1)).argmin(1)
    assert sorted(order.tolist()) == list(range(6))
    if method == "average":
        torch.testing.assert_close(got.mean((0, 2, 3)), expected.mean((0, 2, 3))[order], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_other_depth_and_other_input_size(method):
    networks = {"a": seeded(lambda: mlp(6, (8, 5, 4))), "b": seeded(lambda: mlp(9, (7, 5), 4), 1)}
    data = {"a": inputs(6)["a"], "b": inputs(9)["b"]}
    zipped = zip_pair(networks, data, method=method)
    assert {axis.name: axis.shared for axis in zipped.report.axes} == {"0": 7, "2": 5}
    private = {(item.task, item.name): item.reason for item in zipped.report.private}
    assert "answers" in private["a", "6"]
    assert "output" in private["b", "4"]
    layout = zipped["a"][0].layout
    assert [run.tasks for run in layout.columns] == [(0,)]  # its inputs are others: rows shared, columns private
    assert_finite(zipped, data)


def test_another_input_size_keeps_all_its_columns():
    """Rows that share no column with another task cost nothing to share."""
    networks = {"a": seeded(lambda: mlp(6, (8,))), "b": seeded(lambda: mlp(9, (8,)), 1)}
    data = {"a": inputs(6)["a"], "b": inputs(9)["b"]}
    assert max(errors(zip_pair(networks, data), networks, data).values()) < 1e-4


def test_an_unknown_operator_between_shared_layers():
    class Sorted(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.head = nn.Linear(6, 8), nn.Linear(8, 5), nn.Linear(5, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(self.c(self.b(self.a(x).relu()).sort(-1).values).relu())

    networks, data = pair(Sorted), inputs(6)
    zipped = zip_pair(networks, data)
    assert [axis.name for axis in zipped.report.axes] == ["a", "c"]
    reasons = {item.name: item.reason for item in zipped.report.private if item.task == "b"}
    assert "no rule" in reasons["b"]
    assert "sort" in reasons
    assert max(errors(zipped, networks, data).values()) < 1


def test_a_private_layer_inside_is_refitted_and_so_is_its_batchnorm():
    """The layer in the middle is not to be shared, but what it reads has changed."""

    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(2, 5, 3, padding=1)
            self.mine = nn.Conv2d(5, 6, 3)
            self.norm = nn.BatchNorm2d(6)
            self.last = nn.Conv2d(6, 4, 3)
            self.head = nn.Linear(4, 3)

        def forward(self, x):
            x = self.norm(self.mine(self.first(x).relu())).relu()
            return self.head(self.last(x).relu().mean((2, 3)))

    networks, data = pair(Deep), inputs(*IMAGE)
    share = {"first": 1.0, "last": 1.0}
    made = {m: zip_pair(networks, data, share=share, method=m) for m in ("refit", "mtz")}
    worst = {m: sum(errors(zipped, networks, data).values()) for m, zipped in made.items()}
    assert worst["refit"] < worst["mtz"]
    assert type(made["refit"]["a"].mine) is nn.Conv2d
    assert not torch.equal(made["refit"]["a"].norm.running_mean, networks["a"].norm.running_mean)


class Stem(nn.Conv2d):
    """A user's own subclass: importable, as pickle wants it."""


def test_a_layer_of_the_users_own_class_is_shared():
    networks, data = pair(Residual, lambda: Residual(stem=Stem)), inputs(*IMAGE)
    zipped = zip_pair(networks, data)
    assert [axis.name for axis in zipped.report.axes] == ["stem", "ins.0", "ins.1"]
    assert max(errors(zipped, networks, data).values()) < 0.5
    own = zipped["b"].stem
    assert isinstance(own, Stem) and isinstance(own, SharedLayer)
    for other in (copy.deepcopy(zipped), pickle.loads(pickle.dumps(zipped))):
        assert type(other["b"].stem) is type(own)
        assert other["b"].stem.weight_rows_0_1_columns_0_1 is other["a"].stem.weight_rows_0_1_columns_0_1
        assert torch.equal(other["b"](data["b"]), zipped["b"](data["b"]))
    assert type(zipped.extract("b").stem) is Stem


class Repeats(nn.Module):
    """A layer called twice, tied weights and grouped convolutions between layers that can be shared."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 6, 1)
        self.groups = nn.Conv2d(6, 6, 3, padding=1, groups=3)
        self.again = nn.Conv2d(6, 6, 1)
        self.norm = nn.BatchNorm2d(6)
        self.middle = nn.Conv2d(6, 6, 1)
        self.tied = nn.Conv2d(6, 6, 1)
        self.tied.weight = self.middle.weight
        self.last = nn.Conv2d(6, 5, 1)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        x = self.groups(self.first(x).relu()).relu()
        x = self.norm(self.again(self.norm(self.again(x)).relu())).relu()
        x = self.tied(self.middle(x).relu()).relu()
        return self.head(self.last(x).relu().mean((2, 3)))


@pytest.mark.parametrize("method", METHODS)
def test_layers_called_twice_tied_weights_and_groups(method):
    networks, data = pair(Repeats), inputs(*IMAGE)
    zipped = zip_pair(networks, data, method=method)
    assert [axis.name for axis in zipped.report.axes] == ["first", "last"]
    assert zipped["a"].tied.weight is zipped["a"].middle.weight
    reasons = {item.name: item.reason for item in zipped.report.private if item.task == "a"}
    for name in ("again", "norm", "head"):
        assert name in reasons, name
    assert_finite(zipped, data)
    blocks = [name for name, _ in zipped["a"].groups.named_parameters() if name.startswith("weight")]
    assert blocks == ["weight_rows_0_1_columns_0_1"]  # the groups are shared with the layer before them
    for key, value in networks["a"].again.state_dict().items():
        assert torch.equal(zipped["a"].again.state_dict()[key], value)


def test_a_tied_layer_behind_a_shared_one_is_not_refitted():
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.enter, self.loop, self.head = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 3)

        def forward(self, x):
            x = self.enter(x).relu()
            return self.head(self.loop(self.loop(x).relu()).relu())

    networks, data = pair(Loop), inputs(6)
    zipped = zip_pair(networks, data)
    assert torch.equal(zipped["a"].loop.bias, networks["a"].loop.bias)
    assert max(errors(zipped, networks, data).values()) < 1.5


# -- one network, three networks -------------------------------------------------------------------------------------


def test_one_network_stays_as_it_is():
    network, data = seeded(mlp), inputs(6)
    zipped = mtzip.zip_networks({"a": network}, {"a": data["a"]})
    assert torch.equal(zipped["a"](data["a"]), network(data["a"]))
    assert not zipped.report.axes


@pytest.mark.parametrize("kind", ["mlp", "convolutions", "residual"])
@pytest.mark.parametrize("method", METHODS)
def test_three_networks(kind, method):
    make, shape = KINDS[kind]
    networks, data = {task: seeded(make, seed) for seed, task in enumerate("abc")}, inputs(*shape)
    zipped = zip_pair(networks, data, 0.75, method)
    assert zipped.report.axes
    for axis in zipped.report.axes:
        assert axis.shared == round(0.75 * min(axis.neurons.values()))
    assert_finite(zipped, data)
    if method == "refit":
        assert max(errors(zipped, networks, data).values()) < 1.5
    first = next(leaf for _, leaf in leaves(zipped["a"]))
    assert [run.tasks for run in first.layout.rows] == [(0, 1, 2), (0,)]


def test_three_networks_are_saved_loaded_and_retrained(tmp_path):
    networks, data = {task: seeded(Functional, seed) for seed, task in enumerate("abc")}, inputs(*IMAGE)
    zipped = zip_pair(networks, data, 0.75)
    mtzip.save(zipped, tmp_path / "z.safetensors")
    loaded = mtzip.load(tmp_path / "z.safetensors", {task: Functional() for task in "abc"}).eval()
    assert all(torch.equal(loaded[task](data[task]), zipped[task](data[task])) for task in "abc")
    before = sum(errors(zipped, networks, data).values())
    for task in zipped:
        zipped[task].drop.p = 0.0  # of seven neurons
    mtzip.retrain(zipped, data, steps=30, progress=False)
    assert sum(errors(zipped, networks, data).values()) < before


def test_a_batchnorm_without_affine_cannot_turn_a_sign():
    """A neuron and its negative are the same to a private scale, but not where there is none."""
    data = inputs(*IMAGE)
    data["b"] = data["a"]
    networks = {task: calibrated(seeded(lambda: bare_norms(True)), data["a"]) for task in "ab"}
    assert max(errors(zip_pair(networks, data), networks, data).values()) < 1e-4
    networks["b"][0].weight.data[:3].neg_()
    calibrated(networks["b"], data["b"])
    assert max(errors(zip_pair(networks, data), networks, data).values()) < 1


@pytest.mark.parametrize("kind", ["mlp", "convolutions", "residual"])
@pytest.mark.parametrize("method", METHODS)
def test_float64_networks_come_out_as_float32_ones(kind, method):
    """The same neurons, the same pairs: what differs is rounding."""
    make, shape = KINDS[kind]
    networks, data = pair(make), inputs(*shape)
    single = zip_pair(networks, data, 0.75, method)
    double = {task: copy.deepcopy(network).double() for task, network in networks.items()}
    double = zip_pair(double, {task: x.double() for task, x in data.items()}, 0.75, method)
    for task in networks:
        with torch.no_grad():
            got, expected = double[task](data[task].double()), single[task](data[task]).double()
        assert (got - expected).abs().max() < 1e-3 * expected.abs().max()


def test_three_copies_are_one():
    networks, data = {task: seeded(Functional) for task in "abc"}, inputs(*IMAGE)
    data = dict.fromkeys("abc", data["a"])
    zipped = zip_pair(networks, data, reconstructions=0)
    assert max(errors(zipped, networks, data).values()) < 1e-8


def test_three_networks_of_which_one_is_shorter():
    networks = {"a": seeded(mlp), "b": seeded(lambda: mlp(hidden=(7,)), 1), "c": seeded(lambda: mlp(hidden=(9, 6)), 2)}
    zipped = zip_pair(networks, inputs(6))
    assert {axis.name: axis.neurons for axis in zipped.report.axes} == {
        "0": {"a": 8, "b": 7, "c": 9},
        "2": {"a": 5, "c": 6},
    }
    assert_finite(zipped, inputs(6))
