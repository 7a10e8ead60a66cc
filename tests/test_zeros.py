"""Zeros of pruned networks: kept in a zip, its retraining and its file, and reported."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from nets import IMAGE, Branches, Functional, Residual, conv1d_net, mlp, noise, seeded
from torch import nn
from zipping import METHODS, calibrated, errors, inputs, pair, some

import mtzip
from mtzip.merging.grouped import _restricted
from mtzip.network.leaf import leaves
from mtzip.reports.page import page
from mtzip.reports.report import Report

KINDS = {
    "mlp": (lambda: mlp(6, (16, 12)), (6,)),
    "mlp with BatchNorm": (lambda: mlp(6, (16, 12), norm=True), (6,)),
    "convolutions": (lambda: Functional((8, 6, 9)), IMAGE),
    "conv1d": (conv1d_net, (3, 16)),
    "residual": (lambda: Residual(8, 6), IMAGE),
    "grouped": (Branches, IMAGE),
}
KEPT = [True, "count"]


def pruned_(network: nn.Module, seed: int, density: float = 0.4) -> nn.Module:
    """Some weights of every layer set to zero, in place."""
    for at, parameter in enumerate(network.parameters()):
        if parameter.dim() > 1:
            keep = noise(*parameter.shape, seed=100 * seed + at).abs()
            parameter.data *= keep >= keep.flatten().kthvalue(round((1 - density) * keep.numel())).values
    return network


def sparse(kind: str, tasks: str = "ab"):
    """Pruned networks whose BatchNorms fit their inputs, and those inputs."""
    make, shape = KINDS[kind]
    data = {task: x for task, x in inputs(*shape).items() if task in tasks}
    return {t: calibrated(pruned_(seeded(make, at), at), data[t]) for at, t in enumerate(tasks)}, data


def weights(network: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach() for parameter in network.parameters() if parameter.dim() > 1]


def nonzero(tensors) -> int:
    return sum(int((tensor != 0).sum()) for tensor in tensors)


def originals_rows(networks, zipped, task: str, layers=("0", "2")) -> list[torch.Tensor]:
    """Weights of the hidden layers of an mlp as it was, in the zip's order of neurons."""
    columns, found = torch.arange(6), []
    for path in layers:
        rows = zipped.orders[task].get(path, torch.arange(networks[task].get_submodule(path).out_features))
        found.append(networks[task].get_submodule(path).weight.detach()[rows][:, columns])
        columns = rows
    return found


# -- which zeros ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_a_weight_is_zero_where_all_tasks_that_store_it_had_a_zero(method, share):
    networks, data = sparse("mlp")
    zipped = mtzip.zip_networks(networks, data, share, method, keep_zeros=True)
    before = {task: originals_rows(networks, zipped, task) for task in "ab"}
    for at, path in enumerate(("0", "2")):
        a, b = (zipped[task].get_submodule(path) for task in "ab")
        blocks = {name: block for leaf in (a, b) for name, block in leaf.named_parameters() if block.dim() > 1}
        rows = sum(run.size for run in a.layout.rows if len(run.tasks) == 2)
        columns = sum(run.size for run in a.layout.columns if len(run.tasks) == 2)
        own = {task: before[task][at] != 0 for task in "ab"}
        expected = {
            "weight_rows_0_1_columns_0_1": own["a"][:rows, :columns] | own["b"][:rows, :columns],
            "weight_rows_0_1_columns_0": own["a"][:rows, columns:],
            "weight_rows_0_1_columns_1": own["b"][:rows, columns:],
            "weight_rows_0_columns_0": own["a"][rows:],
            "weight_rows_1_columns_1": own["b"][rows:],
        }
        assert blocks.keys() == {name for name, support in expected.items() if support.numel()}
        for name, block in blocks.items():
            assert torch.equal(block != 0, expected[name]), name
    for task in "ab":  # the heads are nobody else's
        assert nonzero([zipped[task][4].weight]) == nonzero([networks[task][4].weight])


@pytest.mark.parametrize("method", METHODS)
def test_shared_rows_have_no_more_weights_than_the_task_with_most(method):
    networks, data = sparse("mlp")
    zipped = mtzip.zip_networks(networks, data, 1.0, method, keep_zeros="count")
    before = {task: originals_rows(networks, zipped, task) for task in "ab"}
    for at, path in enumerate(("0", "2")):
        most = torch.maximum(*((before[task][at] != 0).sum(1) for task in "ab"))
        stored = zipped["a"].get_submodule(path).unscaled_weight() != 0
        assert torch.equal(stored.sum(1), most)
        assert not (stored & (before["a"][at] == 0) & (before["b"][at] == 0)).any()


def test_zeros_are_counted_where_no_place_is_zero_in_all_tasks():
    """Complementary supports: in common there is no zero, in number each has half."""
    networks, data = pair(mlp), inputs(6)
    for parity, network in enumerate(networks.values()):
        for layer in network[::2]:
            odd = (torch.arange(layer.out_features)[:, None] + torch.arange(layer.in_features) + parity) % 2
            layer.weight.data *= odd
    count = [(network[0].weight != 0).sum(1) for network in networks.values()]
    zipped = mtzip.zip_networks(networks, some(data, networks), {"0": 1.0}, keep_zeros="count")
    stored = zipped["a"][0].unscaled_weight() != 0
    assert [set(c.tolist()) for c in count] == [{3}, {3}] and set(stored.sum(1).tolist()) == {3}


@pytest.mark.parametrize("keep", KEPT)
@pytest.mark.parametrize("kind", KINDS)
def test_with_its_copy_a_network_keeps_exactly_its_zeros(kind, keep):
    networks, data = sparse(kind, "a")
    networks["b"], data["b"] = copy.deepcopy(networks["a"]), data["a"]
    zipped = mtzip.zip_networks(networks, data, 1.0, keep_zeros=keep)
    for task in "ab":
        before, after = (
            sorted(nonzero([w]) for w in weights(network)) for network in (networks[task], zipped.extract(task))
        )
        assert after == before
    assert max(errors(zipped, networks, data).values()) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_pruned_networks_have_no_more_weights_when_zipped(kind):
    networks, data = sparse(kind)
    before = sum(nonzero(weights(network)) for network in networks.values())
    stored = {
        keep: nonzero(weights(mtzip.zip_networks(networks, data, 0.7, keep_zeros=keep))) for keep in (*KEPT, False)
    }
    assert stored["count"] < stored[True] <= before
    assert stored[False] > 1.2 * before


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keep", KEPT)
def test_dense_networks_are_zipped_as_ever(kind, keep):
    """Bit for bit; also where a BatchNorm's scale of zero makes a folded row zero."""
    make, shape = KINDS[kind]
    networks, data = pair(make), inputs(*shape)
    for network in networks.values():
        for module in network.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.weight.data[0] = 0
    data = some(data, networks)
    plain = mtzip.zip_networks(networks, data, 0.6)
    kept = mtzip.zip_networks(networks, data, 0.6, keep_zeros=keep)
    assert list(plain.state_dict()) == list(kept.state_dict())
    for before, after in zip(plain.state_dict().values(), kept.state_dict().values(), strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("keep", KEPT)
def test_share_nothing_is_bit_for_bit(keep):
    networks, data = sparse("residual")
    zipped = mtzip.zip_networks(networks, data, 0, keep_zeros=keep)
    for task in "ab":
        assert torch.equal(zipped[task](data[task]), networks[task](data[task]))
        for after, before in zip(zipped[task].state_dict().values(), networks[task].state_dict().values(), strict=True):
            assert torch.equal(after, before)


@pytest.mark.parametrize("value", [None, 1, "counts", ["a"]])
def test_another_value_is_refused(value):
    networks, data = sparse("mlp")
    with pytest.raises(ValueError, match="keep_zeros must be True, False or 'count', got"):
        mtzip.zip_networks(networks, data, keep_zeros=value)


# -- the fit ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def masked_(zipped: mtzip.ZippedNetwork, like: mtzip.ZippedNetwork) -> mtzip.ZippedNetwork:
    """Zeros of another zip in the same places."""
    for tensor, other in zip(zipped.parameters(), like.parameters(), strict=True):
        if tensor.dim() > 1:
            tensor *= other != 0
    return zipped


@pytest.mark.parametrize("method", ["refit", "mtz"])
@pytest.mark.parametrize("kind", ["mlp", "convolutions"])
def test_fitting_under_zeros_is_better_than_masking_a_fit(kind, method):
    networks, data = sparse(kind)
    kept = mtzip.zip_networks(networks, data, 1.0, method, keep_zeros=True)
    masked = masked_(mtzip.zip_networks(networks, data, 1.0, method), kept)
    assert nonzero(weights(masked)) == nonzero(weights(kept))
    ours, theirs = (sum(errors(zipped, networks, data).values()) for zipped in (kept, masked))
    assert ours < 0.9 * theirs  # 0.12 and 0.37 of it with a refit, 0.79 and 0.75 without


def test_mtz_rows_are_the_constrained_optimum():
    """m_S = (sum Q)_SS^-1 (sum Q w)_S of the first layer, written out in float64."""
    networks, data = sparse("mlp")
    damping = 0.01
    zipped = mtzip.zip_networks(networks, data, 1.0, "mtz", keep_zeros=True, damping=damping)
    before = {task: originals_rows(networks, zipped, task, ("0",))[0].double() for task in "ab"}
    merged = zipped["a"][0]
    total, right = 0, 0
    for task in "ab":
        x = torch.cat([data[task], torch.ones(len(data[task]), 1)], 1).double()
        moment = x.T @ x / len(x)
        q = moment + damping * moment.diagonal().mean() * torch.eye(7, dtype=torch.float64)
        bias = networks[task][0].bias.detach()[zipped.orders[task]["0"]].double()
        total, right = total + q, right + torch.cat([before[task], bias[:, None]], 1) @ q
    for row in range(16):
        keep = [*((before["a"][row] != 0) | (before["b"][row] != 0)).nonzero().flatten().tolist(), 6]
        expected = torch.zeros(7, dtype=torch.float64)
        expected[keep] = torch.linalg.solve(total[keep][:, keep], right[row, keep])
        got = torch.cat([merged.weight[row], merged.bias[row : row + 1]]).double()
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_rows_of_groups_are_the_constrained_optimum():
    x = noise(3, 20, 5, dtype=torch.float64)
    system, right = x.mT @ x, noise(3, 5, 2, seed=1, dtype=torch.float64)
    support = noise(5, 6, seed=2) > -0.3
    theta = _restricted(system, right, support)
    for group in range(3):
        for row in range(2):
            keep = support[:, 2 * group + row]
            expected = torch.zeros(5, dtype=torch.float64)
            expected[keep] = torch.linalg.solve(system[group][keep][:, keep], right[group, keep, row])
            torch.testing.assert_close(theta[group, :, row], expected)


def test_counted_zeros_are_better_than_those_of_the_task_with_most_weights():
    """The published rule gives a shared row the support of one of its tasks."""
    networks, data = sparse("mlp")
    counted = mtzip.zip_networks(networks, data, {"0": 1.0}, "mtz", keep_zeros="count")
    before = {task: originals_rows(networks, counted, task, ("0",))[0] for task in "ab"}
    common = mtzip.zip_networks(networks, data, {"0": 1.0}, "mtz", keep_zeros=True)
    own = {task: before[task] != 0 for task in "ab"}
    denser = torch.where((own["a"].sum(1) >= own["b"].sum(1))[:, None], own["a"], own["b"])
    with torch.no_grad():
        next(p for p in common["a"][0].parameters() if p.dim() > 1).mul_(denser)
    ours, theirs = (sum(errors(zipped, networks, data).values()) for zipped in (counted, common))
    assert nonzero([counted["a"][0].unscaled_weight()]) == nonzero([denser])
    assert ours < theirs


# -- retraining -------------------------------------------------------------------------------------------------------


class Pushing(torch.optim.SGD):
    """Moves every weight, whatever its gradient."""

    def step(self, closure=None):
        super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter += 0.01


@pytest.mark.parametrize("optimizer", [None, lambda p: torch.optim.SGD(p, 1e-3, 0.9), lambda p: Pushing(p, 1e-3)])
def test_retraining_keeps_zeros_and_moves_all_else(optimizer):
    networks, data = sparse("convolutions")
    zipped = mtzip.zip_networks(networks, data, 0.7, keep_zeros=True)
    before = [weight.clone() for weight in weights(zipped)]
    mtzip.retrain(zipped, data, 4, optimizer=optimizer, progress=False)
    for old, new in zip(before, weights(zipped), strict=True):
        assert torch.equal(old == 0, new == 0)
        assert (old != new)[old != 0].any()


def test_retraining_with_validation_and_without_the_option():
    networks, data = sparse("mlp")
    kept = mtzip.zip_networks(networks, data, 0.7, keep_zeros=True)
    count = nonzero(weights(kept))
    scores = iter([3.0, 2.0, 1.0, 2.0, 3.0])
    mtzip.retrain(kept, data, 4, validate=lambda _: next(scores), validate_every=1, progress=False)
    assert nonzero(weights(kept)) == count
    lost = copy.deepcopy(kept)
    lost.keep_zeros = False
    mtzip.retrain(lost, data, 4, progress=False)
    assert nonzero(weights(lost)) > count


def test_zeros_for_a_loop_of_ones_own():
    networks, data = sparse("mlp")
    zipped = mtzip.zip_networks(networks, data, 0.7, keep_zeros=True)
    zeros, before = zipped.zeros(), [weight.clone() for weight in weights(zipped)]
    with torch.no_grad():
        for parameter in zipped.parameters():
            parameter += 1
    assert nonzero(weights(zipped)) == sum(weight.numel() for weight in before)
    zeros.restore_()
    for old, new in zip(before, weights(zipped), strict=True):
        assert torch.equal(new, torch.where(old == 0, 0, old + 1))


# -- files and copies -------------------------------------------------------------------------------------------------


def test_zeros_are_kept_behind_a_file_and_cost_nothing_in_it(tmp_path):
    networks, data = sparse("convolutions")
    zipped = mtzip.zip_networks(networks, data, 0.7, keep_zeros=True)
    plain = mtzip.zip_networks(networks, data, 0.7)
    assert list(zipped.state_dict()) == list(plain.state_dict())
    assert zipped.parameter_count() == plain.parameter_count()
    mtzip.save(zipped, tmp_path / "z.safetensors")
    loaded = mtzip.load(tmp_path / "z.safetensors", networks)
    assert loaded.keep_zeros and copy.deepcopy(zipped).keep_zeros and pickle.loads(pickle.dumps(zipped)).keep_zeros
    count = nonzero(weights(loaded))
    assert count == nonzero(weights(zipped))
    mtzip.retrain(loaded, data, 3, teachers=networks, progress=False)
    assert nonzero(weights(loaded)) == count
    mtzip.save(plain, tmp_path / "p.safetensors")
    assert not mtzip.load(tmp_path / "p.safetensors", networks).keep_zeros


@pytest.mark.parametrize("keep", KEPT)
def test_a_task_that_joins_keeps_zeros_too(keep):
    networks, data = sparse("mlp", "abc")
    first = {task: networks[task] for task in "ab"}
    zipped = mtzip.zip_networks(first, some(data, first), 1.0, keep_zeros=keep, keep_moments=True)
    joined = mtzip.add_network(zipped, "c", networks["c"], data["c"])
    assert joined.keep_zeros and joined.moments.keep_zeros == keep
    a, c = (joined[task][0] for task in "ac")
    own = networks["c"][0].weight.detach()[joined.orders["c"]["0"]]
    stored = zipped["a"][0].unscaled_weight()
    assert a.layout.rows == c.layout.rows and sum(run.size for run in a.layout.rows if 2 in run.tasks) == 16
    support = (own != 0) | (stored != 0)
    assert not a.unscaled_weight()[~support].any()
    most = torch.maximum((own != 0).sum(1), (stored != 0).sum(1)) if keep == "count" else support.sum(1)
    assert torch.equal((a.unscaled_weight() != 0).sum(1), most)
    report = joined.report
    assert report.nonzero_before == sum(nonzero(n.parameters()) for n in networks.values())
    assert report.nonzero_after == nonzero(joined.parameters())
    layer = report.layers[0]
    assert layer.nonzero_before == sum(nonzero(n[0].parameters()) for n in networks.values())


# -- the report -------------------------------------------------------------------------------------------------------


def test_the_report_counts_what_is_not_zero():
    networks, data = sparse("convolutions")
    zipped = mtzip.zip_networks(networks, data, 0.7, keep_zeros=True)
    report = zipped.report
    assert report.nonzero_before == sum(nonzero(network.parameters()) for network in networks.values())
    assert report.nonzero_after == nonzero(zipped.parameters())
    layer = next(layer for layer in report.layers if layer.name == "conv2")
    assert layer.nonzero_before == sum(nonzero(network.conv2.parameters()) for network in networks.values())
    stored = {
        id(p): p for task in "ab" for path, leaf in leaves(zipped[task]) if path == "conv2" for p in leaf.parameters()
    }
    assert layer.nonzero_after == nonzero(stored.values())
    head = next(layer for layer in report.layers if layer.name == "head (a)")
    assert head.nonzero_after == nonzero(zipped["a"].head.parameters())
    text, html = str(report), page(report)
    for count in (report.nonzero_before, report.nonzero_after, layer.nonzero_before, layer.nonzero_after):
        assert f"{count:,}" in text
    for count in (layer.nonzero_before, layer.nonzero_after):
        assert f"<td>{count:,}</td>" in html
    assert "parameters that are not zero" in html


def test_dense_networks_are_reported_as_ever():
    networks, data = pair(mlp), inputs(6)
    report = mtzip.zip_networks(networks, some(data, networks)).report
    assert report.nonzero_before is not None and not report.is_sparse
    assert "zero" not in str(report) and "not zero" not in page(report)


def test_reports_of_earlier_files_have_no_counts():
    networks, data = sparse("mlp")
    report = mtzip.zip_networks(networks, data, keep_zeros=True).report
    saved = json.loads(json.dumps(report.to_dict()))
    assert Report.from_dict(saved).to_dict() == report.to_dict()
    for holder in (saved, *saved["layers"]):
        del holder["nonzero_before"], holder["nonzero_after"]
    back = Report.from_dict(saved)
    assert back.nonzero_after is None and back.layers[0].nonzero_before is None
    assert str(back) and page(back) and not back.is_sparse
    with pytest.raises(ValueError, match="nonzero_after"):
        Report.from_dict({**report.to_dict(), "nonzero_after": -1})
