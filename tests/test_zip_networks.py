"""`zip_networks` of networks that differ from each other, of one, and of three."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from nets import (
    IMAGE,
    Functional,
    Residual,
    functional_as_sequential,
    mlp,
    seeded,
)
from torch import nn
from zipping import KINDS, METHODS, assert_finite, bare_norms, calibrated, errors, inputs, pair, zip_pair

import mtzip
from mtzip.network.leaf import SharedLayer, leaves

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
