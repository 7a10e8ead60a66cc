"""How good a zip is, and that hard numbers neither break nor spoil it."""

from __future__ import annotations

import pytest
import torch
from nets import (
    IMAGE,
    Functional,
    Residual,
    mlp,
    noise,
    seeded,
)
from scipy.optimize import linear_sum_assignment
from torch import nn
from torch.nn import functional as F
from zipping import KINDS, METHODS, assert_finite, errors, inputs, pair, zip_pair

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
    zipped = zip_pair(networks, data, affine=False, follow=False)
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
