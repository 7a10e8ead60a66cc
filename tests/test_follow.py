"""Tasks that follow others: who does, that it pays, what they end with, and who cannot."""

from __future__ import annotations

import copy

import pytest
import torch
from nets import IMAGE, Functional, Residual, mlp, noise, seeded
from torch import nn
from torch.nn import functional as F
from zipping import inputs, pair, zip_pair

import mtzip
from mtzip.planning.follow import Followers
from mtzip.prepare import prepare
from mtzip.trace.alike import common_trunk

INPUTS = 6


def small(outputs: int = 3) -> nn.Sequential:
    return mlp(INPUTS, (8, 8, 8), outputs)


@pytest.fixture(scope="module")
def one_task() -> tuple[dict[str, nn.Module], dict[str, torch.Tensor]]:
    """Two networks trained apart to put out the same, and inputs of each.

    In float64: rounding of float32 grows in 400 steps to other networks on another processor.
    """
    wanted = seeded(lambda: mlp(INPUTS, (4,), 3), 5).double()
    wanted[0].weight.data *= 2
    networks = {}
    for seed, task in enumerate("ab"):
        network = seeded(small, seed).double()
        x = noise(1024, INPUTS, seed=20 + seed).double()
        with torch.no_grad():
            y = wanted(x)
        optimizer = torch.optim.Adam(network.parameters(), 0.02)
        for _ in range(400):
            optimizer.zero_grad()
            F.mse_loss(network(x), y).backward()
            optimizer.step()
        networks[task] = network.float().eval()
    return networks, {task: noise(600, INPUTS, seed=30 + at) for at, task in enumerate("ab")}


@torch.no_grad()
def output_error(zipped, networks, task, x) -> float:
    """Mean squared change of the outputs over their variance."""
    got, wanted = zipped[task](x).double(), networks[task](x).double()
    return float((got - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum())


def test_networks_of_one_task_follow_and_keep_their_outputs_better(one_task):
    networks, data = one_task
    before = {task: copy.deepcopy(network.state_dict()) for task, network in networks.items()}
    merged = zip_pair(networks, data, follow=False)
    found = zip_pair(networks, data)
    assert merged.report.follows == {} and len(found.report.follows) == 1
    assert found.parameter_count() == merged.parameter_count()
    fresh = noise(1000, INPUTS, seed=40)
    errors = [sum(output_error(z, networks, t, fresh) for t in "ab") for z in (found, merged)]
    assert errors[0] < 0.5 * errors[1]  # 0.0021 and 0.023
    ((follower, leader),) = found.report.follows.items()
    assert output_error(found, networks, leader, fresh) < 1e-6
    assert f"{follower} follows {leader}" in str(found.report)
    for task in "ab":
        assert found.report.output_error[task] == pytest.approx(output_error(found, networks, task, data[task]), 1e-4)
        assert all(torch.equal(value, before[task][key]) for key, value in networks[task].state_dict().items())
        assert torch.equal(found.originals[task](fresh), networks[task](fresh))


def test_the_head_is_the_ridge_regression_on_the_leaders_features(one_task):
    networks, data = one_task
    zipped = zip_pair(networks, data, follow={"b": "a"})
    with torch.no_grad():
        features, wanted = networks["a"][:-1](data["b"]).double(), networks["b"](data["b"]).double()
    n, d = features.shape
    centred = features - features.mean(0)
    moment = centred.T @ centred / n
    damping = min(0.1, max(1e-3, 0.1 * d / n)) * moment.diagonal().mean()
    weight = torch.linalg.inv(moment + damping * torch.eye(d)) @ (centred.T @ (wanted - wanted.mean(0)) / n)
    expected = (networks["a"][:-1](data["a"]).double() - features.mean(0)) @ weight + wanted.mean(0)
    torch.testing.assert_close(zipped["b"](data["a"]).double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(zipped["a"](data["a"]), networks["a"](data["a"]), rtol=1e-4, atol=1e-5)


def test_networks_of_other_tasks_are_merged_as_before():
    networks, data = pair(small), inputs(INPUTS)
    with_it, without = zip_pair(networks, data), zip_pair(networks, data, follow=False)
    assert with_it.report.follows == {}
    for task in "ab":
        assert torch.equal(with_it[task](data[task]), without[task](data[task]))


def test_nothing_shared_follows_nobody(one_task):
    networks, data = one_task
    zipped = zip_pair(networks, data, 0)
    assert zipped.report.follows == {}
    assert all(torch.equal(zipped[task](data[task]), networks[task](data[task])) for task in "ab")


@pytest.mark.parametrize("make", [Residual, Functional], ids=["residual", "functional"])
def test_convolutions_and_batchnorm_follow(make):
    networks, data = pair(lambda: make(classes=3), lambda: make(classes=5)), inputs(*IMAGE)
    zipped = zip_pair(networks, data, 0.5, follow={"b": "a"})
    x = data["a"]
    # Half of each trunk is merged with itself, seen through other inputs and scales: up to 1.3e-4 of the variance.
    assert output_error(zipped, networks, "a", x) < 5e-4
    read = []
    for network in (networks["a"], zipped["b"]):
        handle = network.head.register_forward_pre_hook(lambda _, arguments: read.append(arguments[0].double()))
        network(x)
        handle.remove()
    assert zipped["b"](x).shape[1] == 5
    order = torch.cdist(read[1].T, read[0].T).argmin(1)
    assert sorted(order.tolist()) == list(range(read[0].shape[1]))
    wanted = read[0][:, order]
    assert (read[1] - wanted).square().sum() < 5e-4 * (wanted - wanted.mean(0)).square().sum()


class Named(nn.Module):
    """The same graph as a Sequential, by other names, and the head defined first."""

    def __init__(self):
        super().__init__()
        self.head, self.enter = nn.Linear(8, 4), nn.Linear(INPUTS, 8)

    def forward(self, x):
        return self.head(F.relu(self.enter(x)))


def test_a_class_follows_a_sequential():
    networks, data = pair(lambda: mlp(INPUTS, (8,), 3), Named), inputs(INPUTS)
    zipped = zip_pair(networks, data, follow={"b": "a"})
    assert isinstance(zipped["b"], Named) and zipped.report.follows == {"b": "a"}
    assert output_error(zipped, networks, "a", data["a"]) < 1e-6
    with torch.no_grad():
        features = [network[:-1](data["b"]) for network in (networks["a"], zipped["a"])]
    assert torch.cdist(features[0].T, features[1].T).amin(1).max() < 1e-3  # the trunk of a, whatever its order


@pytest.mark.parametrize(
    "follow, error, message",
    [
        ("b", TypeError, "follow must be True, False or a mapping"),
        ({"c": "a"}, KeyError, "follow"),
        ({"b": "c"}, KeyError, "follow"),
        ({"b": "a", "a": "b"}, ValueError, "must be a task that follows none"),
        ({"b": "b"}, ValueError, "must be a task that follows none"),
    ],
)
def test_follow_is_checked(follow, error, message):
    with pytest.raises(error, match=message):
        zip_pair(pair(small), inputs(INPUTS), follow=follow)


def test_other_methods_refuse_to_follow():
    with pytest.raises(ValueError, match="follow needs method='refit'"):
        zip_pair(pair(small), inputs(INPUTS), method="mtz", follow={"b": "a"})
    assert zip_pair(pair(small), inputs(INPUTS), method="mtz").report.follows == {}


class Strided(nn.Module):
    def __init__(self, stride: int = 1, scale: float = 1.0):
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 4, 3, stride, 1), nn.Linear(4, 3)
        self.scale = torch.tensor(scale)  # no buffer: the graph holds it

    def forward(self, x):
        return self.head((self.conv(x) * self.scale).relu().amax((2, 3)))


class Tied(nn.Module):
    """Two layers, the second perhaps the first once more."""

    def __init__(self, tied: bool):
        super().__init__()
        self.first, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.second = self.first if tied else nn.Linear(4, 4)

    def forward(self, x):
        return self.head(self.second(self.first(x).relu()).relu())


class Norms(nn.Module):
    """A network whose outputs no layer writes."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm = nn.Linear(4, 3), nn.LayerNorm(3)

    def forward(self, x):
        return self.norm(self.layer(x)).softmax(1)


@pytest.mark.parametrize(
    "first, second, sizes, message",
    [
        (small, lambda: mlp(INPUTS, (8, 8, 7), 3), (INPUTS,), "another shape"),
        (small, lambda: mlp(INPUTS, (8,), 3), (INPUTS,), "other operators"),
        (Strided, lambda: Strided(2), IMAGE, "other settings"),
        (Strided, lambda: Strided(1, 2.0), IMAGE, "reads something else"),
        (lambda: Tied(False), lambda: Tied(True), (4,), None),
        (lambda: Tied(True), lambda: Tied(False), (4,), "used elsewhere too"),
    ],
    ids=["width", "depth", "stride", "constant", "follows tied", "tied"],
)
def test_networks_that_differ_cannot_follow(first, second, sizes, message):
    networks, data = pair(first, second), inputs(*sizes)
    if message is None:  # taking one layer over twice is no harm
        assert zip_pair(networks, data, follow={"a": "b"}).report.follows == {"a": "b"}
        return
    with pytest.raises(ValueError, match=f"'a' cannot follow 'b'.*{message}"):
        zip_pair(networks, data, follow={"a": "b"})


def test_inputs_of_another_form_cannot_follow():
    networks = {"a": seeded(lambda: mlp(6, (5,), 3)), "b": seeded(lambda: mlp(7, (5,), 3), 1)}
    with pytest.raises(ValueError, match="other shapes or types"):
        zip_pair(networks, {"a": inputs(6)["a"], "b": inputs(7)["b"]}, follow={"b": "a"})


def test_few_samples_follow_only_if_they_can_be_held_apart():
    networks, data = pair(small), inputs(INPUTS, count=3)
    with pytest.raises(ValueError, match=r"'b' cannot follow 'a'.*expected 4 samples"):
        zip_pair(networks, data, follow={"b": "a"})
    assert zip_pair(networks, data).report.follows == {}


def test_leaders_follow_nobody():
    """Three tasks: the closest pair first, and no chain."""
    networks = {**pair(small), "c": seeded(small, 2)}
    prepared = prepare(networks, inputs(INPUTS), None)
    followers = Followers(prepared.analyses, prepared.chunks)
    errors = {(0, 1): 0.1, (1, 2): 0.2, (2, 0): 0.3, (2, 1): 0.4, (1, 0): 0.5, (0, 2): 0.6}
    followers.error = lambda follower, leader, samples=None: errors[follower, leader]
    assert followers.best({0: 1.0, 1: 1.0, 2: 1.0}) == {0: 1, 2: 1}
    assert followers.best({0: 0.04, 1: 0.05, 2: 0.05}) == {}


def test_a_trunk_is_everything_but_the_heads():
    networks = pair(lambda: Functional((4, 6, 8), 3), lambda: Functional((4, 6, 8), 5))
    analyses = prepare(networks, inputs(*IMAGE), None).analyses
    trunk = common_trunk(*analyses)
    assert all(path == other for path, other in trunk.tensors.items())
    assert [(one.path, other.path) for one, other in trunk.heads] == [("head", "head")]
    used = {path for path in analyses[0].exported.tensors.values() if not path.startswith("head")}
    assert set(trunk.tensors) == used - {path for path in used if path.endswith("num_batches_tracked")}


def test_what_follows_is_saved_retrained_and_exported(one_task, tmp_path):
    networks, data = one_task
    zipped = zip_pair(networks, data, 0.75, follow={"b": "a"})
    before = output_error(zipped, networks, "b", data["b"])
    for distill in ("features", "both"):  # b has no neurons to compare: its outputs are imitated
        mtzip.retrain(zipped, data, 60, distill=distill, progress=False)
    assert output_error(zipped, networks, "b", data["b"]) < before
    mtzip.save(zipped, tmp_path / "z.safetensors")
    loaded = mtzip.load(tmp_path / "z.safetensors", pair(small))
    assert loaded.report.follows == {"b": "a"}
    assert torch.equal(loaded["b"](data["b"]), zipped["b"](data["b"]))


def test_budgets_count_followers(one_task):
    networks, data = one_task
    merged = zip_pair(networks, data, mtzip.Budget(parameters=0.8), follow=False)
    found = zip_pair(networks, data, mtzip.Budget(parameters=0.8))
    assert found.parameter_count() == merged.parameter_count()
    assert sum(found.report.output_error.values()) <= sum(merged.report.output_error.values())
    allowed = (
        sum(zip_pair(networks, data).report.output_error.values()) / 2 * 2.5
    )  # the measured error is a little more than that of the fit
    exact = zip_pair(networks, data, mtzip.Budget(error=allowed))
    assert exact.report.follows and sum(exact.report.output_error.values()) / 2 <= allowed
    plain = zip_pair(networks, data, mtzip.Budget(error=allowed), follow=False)
    assert exact.parameter_count() < plain.parameter_count()
