"""``zip_networks`` from end to end, on small networks of every supported kind."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from nets import (
    IMAGE,
    Branches,
    Functional,
    Residual,
    analysed,
    conv1d_net,
    functional_as_sequential,
    mlp,
    noise,
    seeded,
)
from scipy.optimize import linear_sum_assignment
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import mtzip
from mtzip.network.leaf import SharedLayer, leaves
from mtzip.trace.permute import permute_

METHODS = ("refit", "mtz", "average")


def inputs(*shape: int, count: int = 200, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Correlated calibration inputs with a mean, another set for each task."""
    result = {}
    for seed, task in enumerate("abc"):
        x = noise(count, *shape, seed=seed)
        mixing = noise(shape[-1], shape[-1], seed=9) / shape[-1] ** 0.5
        result[task] = (x @ mixing + 0.3).to(dtype)
    return result


def calibrated(network: nn.Module, x: torch.Tensor) -> nn.Module:
    """The network with the BatchNorm statistics of ``x``, as if it had been trained on it."""
    norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    handles = [norm.register_forward_pre_hook(_take_statistics) for norm in norms]
    with torch.no_grad():
        network(x)
    for handle in handles:
        handle.remove()
    return network


def _take_statistics(norm, args) -> None:
    if not norm.track_running_stats:
        return
    x = args[0]
    variance, mean = torch.var_mean(x.double(), [0, *range(2, x.dim())], correction=0)
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(variance)


def pair(make, other=None) -> dict[str, nn.Module]:
    return {"a": seeded(make, 0), "b": seeded(other or make, 1)}


def some(data: dict, networks: dict) -> dict:
    return {task: data[task] for task in networks}


def zip_pair(networks, data, *args, **options):
    return mtzip.zip_networks(networks, some(data, networks), *args, **options)


@torch.no_grad()
def errors(zipped, networks, data) -> dict[str, float]:
    """Squared error of every task's outputs relative to their variance."""
    result = {}
    for task, network in networks.items():
        expected = network.eval()(data[task])
        result[task] = float((zipped[task].eval()(data[task]) - expected).square().mean() / expected.var(0).mean())
    return result


def assert_finite(zipped, data) -> None:
    for task in zipped:
        for name, tensor in zipped[task].state_dict().items():
            assert torch.isfinite(tensor.double()).all(), f"{task}.{name}"
        assert torch.isfinite(zipped[task](data[task]).double()).all(), task


def bare_norms(track_running_stats: bool) -> nn.Sequential:
    norm = {"affine": False, "track_running_stats": track_running_stats}
    layers = [nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6, **norm), nn.ReLU()]
    layers += [nn.Conv2d(6, 5, 3, bias=False), nn.BatchNorm2d(5, **norm), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(80, 3))


KINDS = {
    "mlp": (mlp, (6,)),
    "mlp without bias": (lambda: mlp(bias=False), (6,)),
    "mlp with BatchNorm": (lambda: mlp(norm=True), (6,)),
    "convolutions": (Functional, IMAGE),
    "convolutions without BatchNorm": (lambda: Functional(batchnorm=False), IMAGE),
    "sequential": (functional_as_sequential, IMAGE),
    "conv1d": (conv1d_net, (3, 16)),
    "BatchNorm without affine": (lambda: bare_norms(track_running_stats=True), IMAGE),
    "BatchNorm without statistics": (lambda: bare_norms(track_running_stats=False), IMAGE),
    "residual": (Residual, IMAGE),
    "branches": (Branches, IMAGE),
}


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


# -- quality ---------------------------------------------------------------------------------------------------------


def trained(make, seed: int, x: torch.Tensor, y: torch.Tensor, steps: int = 150) -> nn.Module:
    network = seeded(make, seed).train()
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    for step in range(steps):
        at = slice(64 * (step % (len(x) // 64)), 64 * (step % (len(x) // 64)) + 64)
        optimizer.zero_grad()
        F.cross_entropy(network(x[at]), y[at]).backward()
        optimizer.step()
    return network.eval()


@pytest.fixture(scope="module")
def trained_pair():
    """Two networks for two labellings of the same kind of pictures."""
    data = inputs(*IMAGE, count=640)
    networks = {}
    for seed, task in enumerate("ab"):
        teacher = seeded(lambda: Functional((8, 8, 8)), 50 + seed)
        with torch.no_grad():
            logits = teacher(data[task])
            labels = (logits - logits.mean(0)).argmax(1)
        networks[task] = trained(lambda: Functional((12, 12, 12)), seed, data[task], labels)
    return networks, data


def test_refit_beats_the_paper_beats_the_average(trained_pair):
    networks, data = trained_pair
    total = {m: sum(errors(zip_pair(networks, data, 0.6, m), networks, data).values()) for m in METHODS}
    assert total["refit"] < 0.5 * total["mtz"]
    assert total["mtz"] < total["average"]


def test_optimal_matching_costs_no_more_than_greedy(trained_pair):
    networks, data = trained_pair
    cost = {}
    for matching in ("optimal", "greedy"):
        zipped = zip_pair(networks, data, {"conv1": 0.7}, "mtz", matching=matching)
        cost[matching] = zipped.report.axes[0].difference
    assert 0 < cost["optimal"] <= cost["greedy"]


@pytest.mark.parametrize("method", METHODS)
def test_batchnorm_statistics_are_those_of_the_data(method):
    """In the zipped network running mean and variance are those of what the BatchNorm reads."""
    networks, data = pair(Residual), inputs(*IMAGE)
    zipped = zip_pair(networks, data, 0.6, method).eval()
    for task in zipped:
        for name, module in zipped[task].named_modules():
            if isinstance(module, nn.BatchNorm2d):
                seen = []
                handle = module.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
                zipped[task](data[task])
                handle.remove()
                variance, mean = torch.var_mean(seen[0].double(), (0, 2, 3), correction=0)
                torch.testing.assert_close(
                    module.running_mean.double(), mean, rtol=1e-3, atol=1e-4, msg=f"{task} {name}"
                )
                torch.testing.assert_close(module.running_var.double(), variance, rtol=1e-3, atol=1e-5)


def test_refitted_batchnorm_puts_out_the_targets_mean():
    networks, data = pair(lambda: mlp(norm=True)), inputs(6)
    zipped = zip_pair(networks, data)
    for task in zipped:
        got = zipped[task][:2](data[task])
        expected = networks[task][:2](data[task])
        difference = torch.cdist(got.mean(0)[:, None], expected.mean(0)[:, None]).min(1).values
        assert difference.max() < 1e-4


def test_without_affine_the_bias_is_shared_and_right():
    """affine=False: one bias for both tasks, solved jointly with the rows; no scale."""
    networks, data = pair(mlp), inputs(6)
    zipped = zip_pair(networks, data, affine=False)
    a, b = zipped["a"][0], zipped["b"][0]
    assert a.layout.scaled == 0
    assert a.bias is b.bias
    # At the optimum of a fit with a common bias the residuals, weighted as the tasks are, have mean zero.
    residual = {}
    for task in "ab":
        z = networks[task][0](data[task])
        out = zipped[task][0](data[task])
        weight = 1 / z.var(0, correction=0).mean()
        cost = torch.cdist(out.T.contiguous(), z.T.contiguous())
        columns = torch.as_tensor(linear_sum_assignment(cost.detach().numpy())[1])
        residual[task] = weight * (out - z[:, columns]).mean(0)
    scale = sum(abs(r).mean() for r in residual.values())
    assert (residual["a"] + residual["b"]).abs().max() < 0.1 * scale


# -- hard numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_dead_and_constant_inputs(method):
    networks, data = pair(mlp), inputs(6)
    for task in "ab":
        data[task][:, 1] = -0.4
        data[task][:, 2] = 0
        data[task][:, 3] = 1e4
    zipped = zip_pair(networks, data, method=method)
    assert_finite(zipped, data)
    if method == "refit":
        assert max(errors(zipped, networks, data).values()) < 1


def test_a_constant_column_costs_nothing():
    """A pixel that is always -0.4 has a large diagonal and no variance: what its weights are must not matter."""
    networks, data = pair(lambda: mlp(hidden=(8,))), inputs(6, count=2000)
    for task in "ab":
        data[task][:, 1] = -0.4
    before = errors(zip_pair(networks, data), networks, data)
    for seed, task in enumerate("ab"):
        networks[task][0].weight.data[:, 1] += noise(8, seed=seed)
        networks[task][0].bias.data += 0.4 * noise(8, seed=seed)  # what the column adds, taken away again
    after = errors(zip_pair(networks, data), networks, data)
    assert after["a"] == pytest.approx(before["a"], rel=2e-2)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["mlp", "convolutions"])
@pytest.mark.parametrize("count", [1, 4])
def test_fewer_samples_than_columns(method, kind, count):
    make, shape = KINDS[kind]
    networks, data = pair(make), inputs(*shape, count=count)
    zipped = zip_pair(networks, data, method=method)
    assert_finite(zipped, data)
    if kind == "mlp":
        tasks = 2  # the samples of both are solved for together
        assert zipped.report.layers[0].space == ("sample" if tasks * count < 6 else "feature")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_huge_and_tiny_scales(method, scale):
    """Weights up by a factor, inputs down by it: the same functions, so the same zip."""
    networks, data = pair(mlp), inputs(6)
    expected = errors(zip_pair(networks, data, method=method), networks, data)
    for task, network in networks.items():
        network[0].weight.data.mul_(scale)
        data[task] = data[task] / scale
    got = errors(zip_pair(networks, data, method=method), networks, data)
    for task in networks:
        assert got[task] == pytest.approx(expected[task], rel=0.1, abs=1e-6) or method != "refit"


@pytest.mark.parametrize("method", METHODS)
def test_tasks_of_very_different_scale(method):
    networks, data = pair(mlp), inputs(6)
    data["b"] *= 1e5
    zipped = zip_pair(networks, data, method=method)
    assert_finite(zipped, data)
    if method == "refit":
        assert max(errors(zipped, networks, data).values()) < 1


@pytest.mark.parametrize("method", METHODS)
def test_neurons_that_are_all_zero(method):
    networks, data = pair(lambda: Functional((6, 5, 7))), inputs(*IMAGE)
    for network in networks.values():
        network.conv1.weight.data[:3] = 0
        network.fc.weight.data.zero_()
        network.bn1.weight.data[4] = 0
    zipped = zip_pair(networks, data, method=method)
    assert_finite(zipped, data)


@pytest.mark.parametrize("kind", ["mlp", "convolutions"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["refit", "average"])
def test_other_precisions(kind, dtype, method):
    make, shape = KINDS[kind]
    networks = {task: network.to(dtype) for task, network in pair(make).items()}
    data = inputs(*shape, dtype=dtype)
    zipped = zip_pair(networks, data, method=method)
    assert len(zipped.report.axes) == (3 if kind == "convolutions" else 2)
    assert_finite(zipped, data)
    assert {p.dtype for p in zipped.parameters()} == {dtype}
    if method == "refit":
        single = {task: network.float() for task, network in pair(make).items()}
        bound = max(errors(zip_pair(single, inputs(*shape)), single, inputs(*shape)).values())
        assert max(errors(zipped, networks, data).values()) < 2 * bound + 0.05


def test_gradients_that_overflow_half_precision_do_not_spoil_the_fit():
    networks = {task: network.half() for task, network in pair(mlp).items()}
    data = inputs(6, dtype=torch.float16)
    expected = zip_pair(networks, data)
    for network in networks.values():  # squares of gradients beyond 65504
        network[4].weight.data.mul_(1024)
        network[4].bias.data.mul_(1024)
    zipped = zip_pair(networks, data)
    assert torch.equal(zipped["b"][2].weight, expected["b"][2].weight)


def test_an_operator_without_a_derivative():
    """Sensitivities cannot be taken through it: rows count alike."""

    class Opaque(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.head = nn.Linear(6, 8), nn.Linear(8, 5), nn.Linear(5, 3)

        def forward(self, x):
            return self.head(opaque(self.second(self.first(x).relu())))

    networks, data = pair(Opaque), inputs(6)
    zipped = zip_pair(networks, data)
    assert [axis.name for axis in zipped.report.axes] == ["first"]
    assert "opaque" in {item.name for item in zipped.report.private}
    assert max(errors(zipped, networks, data).values()) < 0.5


@torch.library.custom_op("mtzip_tests::opaque", mutates_args=())
def opaque(x: torch.Tensor) -> torch.Tensor:
    return x.flip(1).clone()


opaque.register_fake(lambda x: torch.empty_like(x))


def test_flags_of_frozen_layers():
    networks, data = pair(mlp), inputs(6)
    for network in networks.values():
        network[0].requires_grad_(False)
    networks["a"][2].requires_grad_(False)  # the other task's copy of it may be trained
    zipped = zip_pair(networks, data)
    assert not any(p.requires_grad for p in zipped["a"][0].parameters())
    assert zipped["a"][2].weight_rows_0_1_columns_0_1.requires_grad
    assert not zipped["a"][2].scale.requires_grad
    assert zipped["b"][2].scale.requires_grad


# -- inputs ----------------------------------------------------------------------------------------------------------


def test_every_form_of_calibration_inputs_is_the_same():
    networks, data = pair(mlp), inputs(6)
    x, y = data["a"], torch.zeros(200)
    expected = zip_pair(networks, data).state_dict()
    for form in (
        (x, y),
        [x],
        [(x, y)],
        (part for part in [x]),
        DataLoader(TensorDataset(x, y), 200),
        DataLoader(TensorDataset(x), 200),
        TensorDataset(x, y),
        {"input": x, "labels": y},
    ):
        got = mtzip.zip_networks(networks, {"a": form, "b": data["b"]}).state_dict()
        assert all(torch.equal(got[key], value) for key, value in expected.items()), type(form)


def test_uneven_batches_and_a_limit_on_samples():
    networks, data = pair(mlp), inputs(6, count=100)
    uneven = {task: [data[task][:1], data[task][1:70], data[task][70:]] for task in "ab"}
    got, expected = (
        zip_pair(networks, given, method="mtz", samples=samples)
        for given, samples in ((uneven, 80), ({t: data[t][:80] for t in "ab"}, None))
    )
    assert got.report.layers[0].samples == {"a": 80, "b": 80}
    for key, value in expected.state_dict().items():
        torch.testing.assert_close(got.state_dict()[key], value, rtol=1e-4, atol=1e-5)


def test_a_network_that_fixes_its_batch_size():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def forward(self, x):
            return self.net(x.view(20, 6))

    networks, data = pair(Fixed), inputs(6, count=50)
    pieces = {"a": list(data["a"].split(20)), "b": data["b"]}
    with pytest.raises(mtzip.ZipError, match="'b': Fixed cannot be exported"):
        zip_pair(networks, pieces)
    pieces["b"] = [data["b"][:20], data["b"][20:45]]
    zipped = zip_pair(networks, pieces)
    assert zipped.report.layers[0].samples == {"a": 40, "b": 40}
    assert zipped["a"](data["a"][:20]).shape == (20, 3)


def test_networks_with_several_inputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right, self.head = nn.Linear(3, 4), nn.Linear(5, 6), nn.Linear(10, 2)

        def forward(self, first, second):
            return self.head(torch.cat([self.left(first), self.right(second)], 1).relu())

    networks = pair(Two)
    x, y = noise(90, 3), noise(90, 5)
    zipped = mtzip.zip_networks(networks, {"a": [((x, y), None)], "b": {"first": x, "second": y}})
    assert {axis.name: axis.shared for axis in zipped.report.axes} == {"left": 4, "right": 6}
    assert torch.isfinite(zipped["b"](x, y)).all()


GOOD = {"networks": lambda: pair(mlp), "inputs": lambda: some(inputs(6), "ab")}


@pytest.mark.parametrize(
    "change, error, match",
    [
        ({"networks": [1]}, TypeError, "networks must be a mapping"),
        ({"networks": {}}, ValueError, "at least one network"),
        ({"networks": {"a": 1, "b": seeded(mlp)}}, TypeError, r"networks\['a'\] must be an nn.Module"),
        ({"networks": {"a.c": seeded(mlp), "b": seeded(mlp)}}, ValueError, "without '.'"),
        ({"networks": {"items": seeded(mlp), "a": seeded(mlp), "b": seeded(mlp)}}, ValueError, "choose another name"),
        ({"inputs": [1]}, TypeError, "inputs must be a mapping"),
        ({"inputs": {"a": noise(3, 6)}}, ValueError, r"\['a', 'b'\], got \['a'\]"),
        ({"inputs": {"a": 3, "b": noise(3, 6)}}, TypeError, r"inputs\['a'\] must be a tensor"),
        ({"inputs": {"a": [3], "b": noise(3, 6)}}, TypeError, r"inputs\['a'\]: a batch must be"),
        ({"inputs": {"a": noise(3, 6), "b": []}}, ValueError, r"inputs\['b'\] must hold at least one sample"),
        ({"inputs": {"a": noise(3, 6), "b": noise(0, 6)}}, ValueError, r"inputs\['b'\] must hold at least one sample"),
        ({"inputs": {"a": torch.tensor(1.0), "b": noise(3, 6)}}, ValueError, r"inputs\['a'\].*batch dimension"),
        ({"inputs": {"a": (noise(4, 6), noise(3)), "b": noise(3, 6)}}, ValueError, "as many targets"),
        ({"inputs": {"a": noise(3, 6) / 0, "b": noise(3, 6)}}, ValueError, r"inputs\['a'\] must be finite"),
        ({"inputs": {"a": noise(3, 6), "b": [noise(3, 6) * torch.nan]}}, ValueError, r"inputs\['b'\] must be finite"),
        ({"inputs": {"a": noise(3, 6), "b": noise(3, 7)}}, mtzip.ZipError, "'b'"),
        ({"share": 1.5}, ValueError, r"fraction in \[0, 1\], got 1.5"),
        ({"share": -0.1}, ValueError, "got -0.1"),
        ({"share": float("nan")}, ValueError, "got nan"),
        ({"share": True}, ValueError, "got True"),
        ({"share": "all"}, ValueError, "got 'all'"),
        ({"share": 2}, ValueError, "got 2"),
        ({"share": {"nowhere": 1}}, ValueError, r"axes among \['0', '2'\], got 'nowhere'"),
        ({"share": {"0": 9}}, ValueError, "smaller width 8, got 9"),
        ({"share": {"0": 1.1}}, ValueError, "got 1.1"),
        ({"method": "zipit"}, ValueError, "method must be one of"),
        ({"matching": "random"}, ValueError, "matching must be one of"),
        ({"damping": 0}, ValueError, "damping must be a positive"),
        ({"damping": float("inf")}, ValueError, "damping must be a positive"),
        ({"reconstructions": -1}, ValueError, "reconstructions must be"),
        ({"samples": 0}, ValueError, "samples must be at least 1"),
    ],
)
def test_errors_say_what_was_wrong(change, error, match):
    with pytest.raises(error, match=match):
        mtzip.zip_networks(**{name: make() for name, make in GOOD.items()} | change)


def test_the_same_object_twice_and_weights_that_are_not_finite():
    network = seeded(mlp)
    with pytest.raises(ValueError, match="different objects"):
        mtzip.zip_networks({"a": network, "b": network}, some(inputs(6), "ab"))
    broken = seeded(mlp, 1)
    broken[2].bias.data[1] = torch.nan
    with pytest.raises(ValueError, match=r"networks\['b'\]: 2.bias must be finite"):
        mtzip.zip_networks({"a": network, "b": broken}, some(inputs(6), "ab"))


def test_activations_that_overflow_are_an_error_and_not_a_network_of_nans():
    networks, data = pair(mlp), inputs(6)
    networks["b"][0].weight.data.mul_(1e30)
    networks["b"][2].weight.data.mul_(1e30)
    with pytest.raises(ValueError, match=r"'b'.*NaN or Inf"):
        zip_pair(networks, data)


# -- report ----------------------------------------------------------------------------------------------------------


def test_report():
    networks, data = pair(Functional), inputs(*IMAGE)
    report = zip_pair(networks, data, 0.8, damping=0.02).report
    assert report.tasks == ("a", "b")
    assert [axis.name for axis in report.axes] == ["conv1", "conv2", "fc"]
    assert all(0 < axis.difference < 1 for axis in report.axes)
    names = [layer.name for layer in report.layers]
    assert names == ["conv1", "conv2", "fc", "head (a)", "head (b)"]
    assert all(layer.damping == pytest.approx(0.02) for layer in report.layers)
    assert report.layers[0].samples == {"a": 200 * 64, "b": 200 * 64}
    assert all(0 <= error < 1 for layer in report.layers for error in layer.error.values())
    assert {(item.task, item.name) for item in report.private} == {("a", "head"), ("b", "head")}
    assert set(report.seconds) >= {"trace", "zip"}
    assert "conv1" in str(report)
    assert mtzip.Report.from_dict(report.to_dict()) == report


def test_progress_is_silent_unless_asked(capsys):
    zip_pair(pair(mlp), inputs(6))
    assert capsys.readouterr() == ("", "")
