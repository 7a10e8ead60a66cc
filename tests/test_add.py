"""A task added to a zipped network: weighed by stored second moments, everything else as it was."""

from __future__ import annotations

import copy
import pickle
from itertools import pairwise

import pytest
import torch
from nets import IMAGE, Branches, Functional, Residual, mlp, noise, seeded
from torch import nn
from zipping import calibrated, errors, inputs, some

import mtzip
from mtzip.merging.kept import sharers
from mtzip.network.leaf import leaves

KINDS = {
    "mlp": (lambda: mlp(6, (16, 12)), (6,)),
    "convolutions": (lambda: Functional((8, 6, 9)), IMAGE),
    "residual": (lambda: Residual(8, 6), IMAGE),
    "grouped": (Branches, IMAGE),
}


def three(kind: str):
    """Networks a, b, c whose BatchNorms fit their inputs, and those inputs."""
    make, shape = KINDS[kind]
    data = inputs(*shape)
    return {task: calibrated(seeded(make, seed), data[task]) for seed, task in enumerate("abc")}, data


def zipped_pair(networks, data, *args, **options):
    pair = {task: networks[task] for task in "ab"}
    return mtzip.zip_networks(pair, some(data, pair), *args, keep_moments=True, **options)


def outputs(zipped, data) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return {task: zipped[task](data[task]) for task in zipped}


def state(network: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in network.state_dict().items()}


def assert_same(first, second) -> None:
    assert list(first) == list(second)
    assert all(torch.equal(first[key], second[key]) for key in first)


# -- what it costs ---------------------------------------------------------------------------------------------------


def quadratic(kept) -> torch.Tensor:
    """Q = alpha (H + lambda I) of a kept layer about zero, with a column of ones for a bias that all tasks share."""
    moment = kept.moment
    covariance = moment.covariance if moment.samples is None else moment.samples.T @ moment.samples
    mean = torch.cat([moment.mean, moment.mean.new_ones(1)])
    second = torch.outer(mean, mean)
    second[:-1, :-1] += covariance
    return kept.alpha * (second + kept.damping * second.diagonal().mean() * torch.eye(len(mean), dtype=torch.float64))


def cost(merged, weights, quadratics) -> float:
    pairs = zip(weights, quadratics, strict=True)
    return sum(float(((merged - w) @ q * (merged - w)).sum()) / 2 for w, q in pairs)


def merge(weights, quadratics) -> torch.Tensor:
    right = sum(w @ q for w, q in zip(weights, quadratics, strict=True))
    return torch.linalg.solve(sum(quadratics), right.T).T


def stored_weights(zipped, networks, path: str, before: str | None) -> list[torch.Tensor]:
    """The originals' weights of a linear layer, rows and columns in the order the zipped network stores."""
    found = []
    for task in zipped:
        weight = networks[task].get_submodule(path).weight.detach().double()[zipped.orders[task][path]]
        found.append(weight if before is None else weight[:, zipped.orders[task][before]])
    return found


def test_joining_costs_what_a_joint_merge_costs_and_less_than_a_chain(assert_within):
    """Every layer, in float64, at the same pairing and the same second moments."""
    make = lambda: mlp(6, (16, 12, 10))  # noqa: E731
    networks = {task: seeded(make, seed) for seed, task in enumerate("abc")}
    networks = {task: network.double() for task, network in networks.items()}
    data = inputs(6, dtype=torch.float64)
    zipped = mtzip.add_network(zipped_pair(networks, data, 1.0, "mtz", affine=False), "c", networks["c"], data["c"])
    for before, path in pairwise([None, "0", "2", "4"]):
        q = [quadratic(zipped.moments.layers[task][path]) for task in "abc"]
        w = stored_weights(zipped, networks, path, before)
        biases = [networks[t].get_submodule(path).bias.detach()[zipped.orders[t][path]] for t in "abc"]
        w = [torch.cat([weight, bias[:, None]], 1) for weight, bias in zip(w, biases, strict=True)]
        leaf = zipped["a"].get_submodule(path)
        added = torch.cat([leaf.weight, leaf.bias[:, None]], 1).detach()
        joint = cost(merge(w, q), w, q)
        ab = merge(w[:2], q[:2])
        chain = merge([ab, w[2]], [(q[0] + q[1]) / 2, q[2]])
        assert_within(torch.tensor(cost(added, w, q)), torch.tensor(joint), 1e-6)
        assert cost(added, w, q) < cost(chain, w, q)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_a_copy_of_a_network_costs_nothing(kind, share):
    """Also after the shared weights have changed: tasks are held to what they compute now, not to their originals."""
    networks, data = three(kind)
    zipped = zipped_pair(networks, data, share)
    with torch.no_grad():
        for at, parameter in enumerate(zipped.parameters()):
            parameter.mul_(1 + 0.1 * noise(*parameter.shape, seed=at))
    expected = outputs(zipped, data)
    added = mtzip.add_network(zipped, "c", zipped.extract("a"), data["a"])
    expected["c"], data["c"] = expected["a"], data["a"]
    for task, got in outputs(added, data).items():
        assert (got - expected[task]).abs().max() < 1e-4 * expected[task].abs().max()
    own = sum(p.numel() for p in networks["c"].parameters())
    assert added.parameter_count() < zipped.parameter_count() + (1.0 if kind == "grouped" else 0.75) * own


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize("method", ["refit", "mtz", "average"])
def test_adding_is_about_as_good_as_zipping_together(kind, share, method):
    networks, data = three(kind)
    zipped = zipped_pair(networks, data, share, method)
    before, layouts, moments = state(zipped), zipped.layouts(), copy.deepcopy(zipped.moments)
    report = zipped.report.to_dict()
    original = state(networks["c"])
    added = mtzip.add_network(zipped, "c", networks["c"], data["c"], share)
    assert_same(before, state(zipped))
    assert_same(original, state(networks["c"]))
    assert zipped.tasks == ("a", "b") and zipped.layouts() == layouts and zipped.report.to_dict() == report
    assert_moments_alike(zipped.moments, moments)
    assert added.tasks == ("a", "b", "c")
    assert all(x.isfinite().all() for x in outputs(added, data).values())
    assert added.parameter_count() == added.report.parameters_after < added.report.parameters_before
    together = mtzip.zip_networks(networks, data, share, method)
    total = {name: sum(errors(z, networks, data).values()) for name, z in (("add", added), ("together", together))}
    # Measured up to 1.98 on these random networks, which are the hardest: nothing of them is alike.
    assert total["add"] < 2.2 * total["together"]


def assert_moments_alike(first, second) -> None:
    for task, layers in first.layers.items():
        assert list(layers) == list(second.layers[task])
        for path, layer in layers.items():
            assert torch.equal(layer.moment.mean, second.layers[task][path].moment.mean)


# -- what stays as it was --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_share_0_leaves_everything_as_it_was(kind):
    networks, data = three(kind)
    zipped = zipped_pair(networks, data, 0.75)
    expected = {**outputs(zipped, data), "c": networks["c"](data["c"]).detach()}
    added = mtzip.add_network(zipped, "c", networks["c"], data["c"], 0)
    for task, got in outputs(added, data).items():
        assert torch.equal(got, expected[task])
    assert_same(state(networks["c"]), state(added["c"]))
    assert added.parameter_count() == zipped.parameter_count() + sum(p.numel() for p in networks["c"].parameters())


@pytest.mark.parametrize("kind", ["mlp", "convolutions", "residual"])
def test_rows_that_the_new_task_has_not_joined_stay_bit_for_bit(kind):
    networks, data = three(kind)
    zipped = zipped_pair(networks, data, 0.75)
    added = mtzip.add_network(zipped, "c", networks["c"], data["c"], 0.5)
    seen = set()
    for task in "ab":
        old, new = dict(zipped[task].named_modules()), dict(added[task].named_modules())
        for path, leaf in leaves(added[task]):
            owners = [run.tasks for run in leaf.layout.rows for _ in range(run.size)]
            kept = torch.tensor([at for at, tasks in enumerate(owners) if 2 not in tasks])
            assert len(kept) and len(kept) < len(owners)
            assert torch.equal(leaf.weight[kept], old[path].weight[kept])
            assert not torch.equal(leaf.weight, old[path].weight)
            seen |= set(owners)
        for path, norm in new.items():
            if isinstance(norm, nn.BatchNorm2d):
                same = (norm.running_mean == old[path].running_mean) & (norm.weight == old[path].weight)
                assert 0 < same.sum() < len(same)
        for path in ("head", "4"):
            if path in new:
                assert_same(state(old[path]), state(new[path]))
    assert {(0, 1, 2), (0, 1), (0, 2), (1, 2)} & seen > {(0, 1)}  # slots that some tasks share only


def test_what_is_frozen_stays_frozen_and_modes_stay():
    networks, data = three("convolutions")
    for task in "ab":
        networks[task].conv1.requires_grad_(False)
    networks["c"].conv1.requires_grad_(False)
    with torch.no_grad():
        added = mtzip.add_network(zipped_pair(networks, data).eval(), "c", networks["c"], data["c"])
    assert not added.training and not any(module.training for module in added.modules())
    for task in "abc":
        assert not any(p.requires_grad for p in added[task].conv1.parameters())
        assert all(p.requires_grad for p in added[task].conv2.parameters())


# -- what comes out --------------------------------------------------------------------------------------------------


def test_one_after_another_saved_loaded_pickled_and_retrained(tmp_path):
    networks, data = three("convolutions")
    networks["d"] = calibrated(seeded(KINDS["convolutions"][0], 3), data["a"])
    data["d"] = data["a"]
    zipped = mtzip.add_network(zipped_pair(networks, data), "c", networks["c"], data["c"], 0.75)
    again = mtzip.add_network(zipped_pair(networks, data), "c", networks["c"], data["c"], 0.75)
    assert_same(state(zipped), state(again))
    zipped = mtzip.add_network(pickle.loads(pickle.dumps(zipped)), "d", networks["d"], data["d"], {"fc": 4})
    assert zipped.tasks == ("a", "b", "c", "d")
    assert {axis.name: set(axis.neurons) for axis in zipped.report.axes}["fc"] == set("abcd")
    mtzip.save(zipped, tmp_path / "z.safetensors")
    loaded = mtzip.load(tmp_path / "z.safetensors", {task: KINDS["convolutions"][0]() for task in "abcd"}).eval()
    for task, got in outputs(loaded, data).items():
        assert torch.equal(got, outputs(zipped, data)[task])
    with pytest.raises(ValueError, match=r"zipped must have the second moments .* keep_moments=True"):
        mtzip.add_network(loaded, "e", seeded(KINDS["convolutions"][0], 9), data["a"])


def test_retraining_takes_the_new_task_along():
    networks, data = three("convolutions")
    zipped = mtzip.add_network(zipped_pair(networks, data), "c", networks["c"], data["c"])
    before = errors(zipped, networks, data)
    for task in zipped:
        zipped[task].drop.p = 0.0
    mtzip.retrain(zipped, data, steps=30, progress=False)
    assert sum(errors(zipped, networks, data).values()) < sum(before.values())


def test_ten_samples():
    networks, data = three("residual")
    few = {task: x[:10] for task, x in data.items()}
    added = mtzip.add_network(zipped_pair(networks, few), "c", networks["c"], few["c"])
    assert all(x.isfinite().all() for x in outputs(added, data).values())


def test_inputs_of_another_form_and_width():
    """An axis that several layers write, with no inputs that both networks would take."""
    networks, data = three("residual")
    other, x = seeded(lambda: Residual(10, 7), 5), noise(100, 2, 12, 12, seed=8)
    added = mtzip.add_network(zipped_pair(networks, data), "c", other, x)
    assert {axis.name: axis.neurons["c"] for axis in added.report.axes} == {"stem": 10, "ins.0": 7, "ins.1": 7}
    assert [run.tasks for run in added["c"].stem.layout.rows] == [(0, 1, 2), (2,)]
    assert added["c"](x).isfinite().all()


def test_convolutions_with_groups_are_left_private_and_named():
    networks, data = three("grouped")
    added = mtzip.add_network(zipped_pair(networks, data), "c", networks["c"], data["c"])
    reasons = {item.name: item.reason for item in added.report.private if item.task == "c"}
    assert "groups" in reasons["depth"]
    assert "left" in dict(leaves(added["c"])) and "depth" not in dict(leaves(added["c"]))
    assert "depth" in dict(leaves(added["a"]))


def test_layers_shared_with_others_are_not_taken_apart():
    networks, data = three("mlp")
    zipped = mtzip.zip_networks(networks, data)
    found = {task: zipped[name].get_submodule("0") for task, name in enumerate("abc")}
    assert sharers([0, 1, 2], found) == (0, 1, 2)
    assert sharers([0, 1], found) == ()


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, kind, message",
    [
        ({"zipped": nn.Linear(2, 2)}, TypeError, "zipped must be a ZippedNetwork, got Linear"),
        ({"task": "a"}, ValueError, "task must be none of ['a', 'b'], got 'a'; give the new one another name"),
        ({"task": "c.d"}, ValueError, "without '.'"),
        ({"task": 3}, ValueError, "got 3"),
        ({"network": "c"}, TypeError, "networks['c'] must be an nn.Module, got str"),
        ({"inputs": 3}, TypeError, "inputs['c'] must be a tensor, an iterable of batches or a DataLoader, got int"),
        ({"share": 1.5}, ValueError, "share must be a fraction in [0, 1], got 1.5"),
        ({"share": {"nowhere": 0.5}}, ValueError, "share must name axes among ['0', '2'], got 'nowhere'"),
        ({"share": {"2": 99}}, ValueError, "share['2'] must be at most its smaller width 12, got 99"),
        ({"share": mtzip.Budget(parameters=0.5)}, TypeError, "share must be a fraction or a mapping, got a Budget"),
        ({"samples": 0}, ValueError, "samples must be at least 1, got 0"),
    ],
)
def test_refusals(change, kind, message):
    networks, data = three("mlp")
    given = {"task": "c", "network": networks["c"], "inputs": data["c"], **change}
    if "zipped" not in given:
        given["zipped"] = zipped_pair(networks, data)
    with pytest.raises(kind) as caught:
        mtzip.add_network(**given)
    assert message in str(caught.value)


def test_networks_that_are_in_it_are_refused():
    networks, data = three("mlp")
    zipped = zipped_pair(networks, data)
    with pytest.raises(ValueError, match="network must be an object of its own"):
        mtzip.add_network(zipped, "c", zipped["a"], data["a"])
    with pytest.raises(ValueError, match="network must share no module with zipped"):
        mtzip.add_network(zipped, "c", nn.Sequential(*zipped["a"]), data["a"])
    plain = mtzip.zip_networks({task: networks[task] for task in "ab"}, some(data, "ab"))
    assert plain.moments is None
    with pytest.raises(ValueError, match="zipped must have the second moments of its layers, got none"):
        mtzip.add_network(plain, "c", networks["c"], data["c"])
