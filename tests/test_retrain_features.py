"""Distillation at the zipped layers: the right values are compared, in the right order."""

from __future__ import annotations

import copy

import pytest
import torch
from handmade import images, small, zipped_pair
from nets import Functional, Residual, mlp, noise, seeded
from retraining import assert_same, distance, inputs, weights_of
from torch import nn
from torch.utils.checkpoint import checkpoint

import mtzip
from mtzip.retraining.features import captured, in_stored_order, linear_paths
from mtzip.retraining.retrain import retrain


def features(zipped, task, x):
    """Path to (zipped, original) values in stored order."""
    orders = zipped.orders[task]
    with torch.no_grad(), captured(zipped[task], orders, task, "network") as got:
        zipped[task](x)
    with torch.no_grad(), captured(zipped.originals[task], orders, task, "teacher") as wanted:
        zipped.originals[task](x)
    assert got.keys() == wanted.keys() == orders.keys()
    last = linear_paths(zipped[task], orders)
    stored = {path: in_stored_order(torch.cat(wanted[path]), orders[path], path in last, path) for path in orders}
    return {path: (torch.cat(got[path]), stored[path]) for path in orders}


NETWORKS = {
    "mlp": (lambda classes: mlp(6, (8, 7), classes), (6,), {"0", "2"}),
    "mlp with BatchNorm": (lambda classes: mlp(6, (8, 7), classes, norm=True), (6,), {"1", "4"}),
    "functional": (lambda classes: Functional(classes=classes), (2, 8, 8), {"bn1", "conv2", "fc"}),
    "residual": (
        lambda classes: Residual(classes=classes),
        (2, 8, 8),
        {"stem_bn", "mids.0", "ends.0", "mids.1", "ends.1"},
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_features_are_those_of_the_same_neurons(name):
    """A network and its copy zip without loss: every feature must be the original's, but for the damping."""
    make, shape, paths = NETWORKS[name]
    network = seeded(lambda: make(3))
    twin = copy.deepcopy(network)
    x = noise(512, *shape)
    zipped = mtzip.zip_networks({"a": network, "b": twin}, {"a": x, "b": x}, damping=1e-9)
    for task in zipped:
        assert zipped.orders[task].keys() == paths
        for path, (got, wanted) in features(zipped, task, x).items():
            scale = wanted.std()
            assert (got - wanted).abs().max() < 0.02 * scale, path


@pytest.mark.parametrize("name", NETWORKS)
def test_a_wrong_order_would_be_noticed(name):
    """Zipped with another network the stored order is not the original one, and another order fits far worse."""
    make, shape, _ = NETWORKS[name]
    x = noise(512, *shape)
    networks = {task: seeded(lambda: make(3), seed) for seed, task in enumerate("ab")}
    zipped = mtzip.zip_networks(networks, {"a": x, "b": x}, share=0.5)
    moved = 0
    for path, (got, wanted) in features(zipped, "b", x).items():
        order = zipped.orders["b"][path]
        moved += int((order != torch.arange(len(order))).sum())
        channel = -1 if path in linear_paths(zipped["b"], zipped.orders["b"]) else 1
        as_it_was = torch.empty_like(wanted).index_copy_(channel, order, wanted)
        error = (got - wanted).square().mean()
        assert error < 0.5 * wanted.var()
        assert error < 0.7 * (got - as_it_was).square().mean() or torch.equal(wanted, as_it_was)
    assert moved > 0


@pytest.mark.parametrize("distill", ["features", "both"])
def test_features_come_closer(distill):
    x = {task: noise(256, 6, seed=seed) for seed, task in enumerate("ab")}
    networks = {task: seeded(lambda: mlp(6, (16, 12), 3), seed) for seed, task in enumerate("ab")}
    zipped = mtzip.zip_networks(networks, x)

    def error():
        found = [pair for task in zipped for pair in features(zipped, task, x[task]).values()]
        return sum(float((got - wanted).square().mean() / wanted.var()) for got, wanted in found)

    before, outputs = error(), distance(zipped, x)
    history = retrain(zipped, x, 150, distill=distill, lr=3e-3)
    assert error() < 0.9 * before
    assert history[-1].total < history[0].total
    assert distill == "features" or distance(zipped, x) < outputs


def test_the_terms_are_relative_and_their_mean_over_layers():
    x = {task: noise(32, 6, seed=seed) for seed, task in enumerate("ab")}
    networks = {task: seeded(lambda: mlp(6, (8, 7), 3), seed) for seed, task in enumerate("ab")}
    zipped = mtzip.zip_networks(networks, x)
    expected = {}
    for task in zipped:
        terms = [
            (got - wanted).square().mean() / wanted.var(0, correction=0).mean()
            for got, wanted in features(zipped, task, x[task]).values()
        ]
        out, teacher = zipped[task](x[task]).detach(), zipped.originals[task](x[task])
        outputs = (out - teacher).square().mean() / teacher.var(0, correction=0).mean()
        expected[task] = float(sum(terms) / len(terms)), float(outputs)
    for distill, parts in (("features", (0,)), ("outputs", (1,)), ("both", (0, 1))):
        history = retrain(copy.deepcopy(zipped), x, 1, distill=distill, batch_size=32)
        for task in zipped:
            assert history[0].losses[task] == pytest.approx(sum(expected[task][part] for part in parts), rel=1e-4)


def test_hooks_are_gone_afterwards():
    x = {task: noise(32, 6) for task in "ab"}
    zipped = mtzip.zip_networks({task: seeded(lambda: mlp(6, (8, 7), 3), seed) for seed, task in enumerate("ab")}, x)
    retrain(zipped, x, 2, distill="both")
    modules = [*zipped.modules(), *zipped.originals["a"].modules()]
    assert not any(module._forward_hooks for module in modules)
    with pytest.raises(ZeroDivisionError):
        with captured(zipped["a"], zipped.orders["a"], "a", "network"):
            raise ZeroDivisionError
    assert not any(module._forward_hooks for module in modules)


def test_copies_keep_the_orders():
    x = {task: noise(32, 6) for task in "ab"}
    zipped = mtzip.zip_networks({task: seeded(lambda: mlp(6, (8, 7), 3), seed) for seed, task in enumerate("ab")}, x)
    twin = copy.deepcopy(zipped)
    retrain(zipped, x, 2, distill="features")
    retrain(twin, x, 2, distill="features")
    for key, value in weights_of(zipped).items():
        assert torch.equal(twin.state_dict()[key], value)


def test_a_network_that_was_saved_retrains_to_the_same_weights(tmp_path):
    x = {task: noise(32, 6) for task in "ab"}
    networks = {task: seeded(lambda: mlp(6, (8, 7), 3), seed) for seed, task in enumerate("ab")}
    zipped = mtzip.zip_networks(networks, x)
    assert any(not torch.equal(o, torch.arange(len(o))) for paths in zipped.orders.values() for o in paths.values())
    mtzip.save(zipped, tmp_path / "z.safetensors")
    loaded = mtzip.load(tmp_path / "z.safetensors", networks)
    retrain(zipped, x, 3, distill="features")
    retrain(loaded, x, 3, distill="features", teachers=networks)
    for key, value in weights_of(zipped).items():
        assert torch.equal(loaded.state_dict()[key], value)
    with pytest.raises(ValueError, match="teachers"):
        retrain(mtzip.load(tmp_path / "z.safetensors", networks), x, 1, distill="features")


def test_what_has_no_features_is_said():
    with pytest.raises(ValueError, match=r"layers that tasks share.*got a network that has none; zip with share > 0"):
        retrain(zipped_pair(), inputs(8), 1, distill="features")
    x = {task: noise(32, 6) for task in "ab"}
    networks = {task: seeded(lambda: mlp(6, (8, 7), 3), seed) for seed, task in enumerate("ab")}
    zipped = mtzip.zip_networks(networks, x)
    callables = {task: (lambda v, network=network: network(v)) for task, network in networks.items()}
    with pytest.raises(ValueError, match="needs the teacher of task 'a' to be a module with a layer '0', got function"):
        retrain(zipped, x, 1, distill="both", teachers=callables)
    other = {task: nn.Sequential(nn.Flatten(), network) for task, network in networks.items()}
    with pytest.raises(ValueError, match="a module with a layer '2', it has none; pass the network that was zipped"):
        retrain(zipped, x, 1, distill="both", teachers=other)
    wider = {task: seeded(lambda: mlp(6, (8, 9), 3)) for task in networks}
    with pytest.raises(ValueError, match="layer '2' must have 7 channels as the network's, got 9"):
        retrain(zipped, x, 1, distill="both", teachers=wider)
    assert len(retrain(zipped, {t: (v, torch.zeros(32).long()) for t, v in x.items()}, 1, distill="both", teachers={}))


def test_layers_whose_weights_are_used_without_calling_them():
    class Direct(nn.Module):
        """Calls one of its hidden layers, and uses the other's weights itself."""

        def __init__(self, calls: bool):
            super().__init__()
            self.first, self.second, self.head = nn.Linear(6, 8), nn.Linear(8, 7), nn.Linear(7, 3)
            self.calls = calls

        def forward(self, x):
            x = self.first(x) if self.calls else nn.functional.linear(x, self.first.weight, self.first.bias)
            return self.head(nn.functional.linear(x.relu(), self.second.weight, self.second.bias).relu())

    x = {task: noise(64, 6) for task in "ab"}
    for calls in (True, False):
        networks = {task: seeded(lambda calls=calls: Direct(calls), seed) for seed, task in enumerate("ab")}
        zipped = mtzip.zip_networks(networks, x)
        if calls:
            assert len(retrain(zipped, x, 2, distill="features")) == 2
        else:
            with pytest.raises(ValueError, match=r"found none of .* called as a module"):
                retrain(zipped, x, 2, distill="features")


def test_an_activation_in_place_does_not_reach_the_features():
    network = nn.Sequential(nn.Linear(4, 3), nn.ReLU(inplace=True))
    x = noise(16, 4)
    with captured(network, {"0": None}, "a", "network") as got:
        network(x)
    assert torch.equal(got["0"][0], network[0](x))
    assert (got["0"][0] < 0).any()


def test_activations_in_place_change_no_step():
    def make(in_place: bool):
        def network():
            return nn.Sequential(
                nn.Linear(6, 8), nn.ReLU(in_place), nn.Linear(8, 7), nn.ReLU(in_place), nn.Linear(7, 3)
            )

        return {task: seeded(network, seed) for seed, task in enumerate("ab")}

    x = {task: noise(64, 6, seed=seed) for seed, task in enumerate("ab")}
    found = [mtzip.zip_networks(make(in_place), x) for in_place in (False, True)]
    for zipped in found:
        retrain(zipped, x, 3, distill="both", lr=1e-2)
    assert_same(*map(weights_of, found))


def test_networks_that_recompute_their_activations():
    """Their second forward pass has no hooks, and must find as many tensors as the first one kept."""

    class Recomputing(nn.Sequential):
        recomputes = False

        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=False) if self.recomputes else super().forward(x)

    def make():
        hidden = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU()
        return Recomputing(*hidden, nn.Linear(7, 3))

    x = {task: noise(64, 6, seed=seed) for seed, task in enumerate("ab")}
    zipped = mtzip.zip_networks({task: seeded(make, seed) for seed, task in enumerate("ab")}, x)
    twin = copy.deepcopy(zipped)
    for network in twin.networks.values():
        network.recomputes = True
    for each in (zipped, twin):
        retrain(each, x, 3, distill="both", lr=1e-2)
    assert_same(weights_of(zipped), weights_of(twin))


@pytest.mark.parametrize("more", ["teacher", "network"])
def test_a_teacher_that_calls_a_layer_more_or_less_often(more):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.head, self.calls = nn.Linear(6, 8), nn.Linear(8, 3), 1

        def forward(self, x):
            for _ in range(self.calls):
                y = self.first(x)
            return self.head(y.relu())

    x = {task: noise(64, 6) for task in "ab"}
    zipped = mtzip.zip_networks({task: seeded(Twice, seed) for seed, task in enumerate("ab")}, x)
    (zipped.originals if more == "teacher" else zipped.networks)["a"].calls = 2
    with pytest.raises(ValueError, match="must call its layer 'first' as often as the network"):
        retrain(zipped, x, 1, distill="both")


def test_small_networks_of_the_other_tests():
    data = {task: images(seed, 64) for seed, task in enumerate("ab")}
    zipped = mtzip.zip_networks({"a": small(3, 0), "b": small(4, 1)}, data)
    assert zipped.orders["a"].keys() == {"norm", "hidden"}
    assert len(retrain(zipped, data, 2, distill="both", accumulate=2)) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3, 5, 4, 6), (4, 5), (2, 90, 3, 3)], ids=str)
@pytest.mark.parametrize("half", [False, True], ids=["", "autocast"])
def test_reordered_channels_are_the_same_numbers_in_the_same_layout(dtype, shape, half):
    """Some are a product with ones and zeros, which must not round, whatever a script allows."""
    value = noise(*shape).to(dtype)
    if value.dim() == 4:
        value = value.to(memory_format=torch.channels_last)
    order = torch.randperm(shape[1], generator=torch.Generator().manual_seed(0))
    allowed = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            got = in_stored_order(value, order, False, "layer")
    finally:
        torch.set_float32_matmul_precision(allowed)
    assert torch.equal(got, value[:, order])
    assert got.stride() == value.stride()
