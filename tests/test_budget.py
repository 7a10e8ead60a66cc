"""Budgets, plans and trade-offs: exact arithmetic, kept promises, and refusals."""

from __future__ import annotations

import pytest
import torch
from nets import IMAGE, Branches, Functional, Residual, mlp, noise, seeded
from test_grouped import Inverted
from test_plan import settled

import mtzip
from mtzip.planning.budget import PlannedAxis, counts_for_parameters, path_of_counts

KINDS = {
    "functional": (lambda: Functional(widths=(8, 6, 9)), IMAGE),
    "mlp": (lambda: mlp(hidden=(9, 7)), (6,)),
    "mlp without bias": (lambda: mlp(hidden=(9, 7), bias=False), (6,)),
    "residual": (lambda: Residual(width=8, inner=6), IMAGE),
    "branches": (Branches, IMAGE),
    "depthwise": (lambda: Inverted(), (2, 6, 6)),
    "groups": (lambda: Inverted(groups=4, norm=False), (2, 6, 6)),
}


def pair(kind: str):
    make, shape = KINDS[kind]
    x = {task: noise(120, *shape, seed=seed) for seed, task in enumerate("ab")}
    return {task: settled(seeded(make, seed), x[task]) for seed, task in enumerate("ab")}, x


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_plan_knows_the_parameters_to_the_last(kind, affine):
    networks, x = pair(kind)
    plan = mtzip.plan(networks, x, affine=affine)
    for share in (1.0, 0.5, 0.0):
        plan.counts = {axis.name: round(share * axis.width) for axis in plan.axes}
        zipped = mtzip.zip_networks(networks, x, plan, affine=affine)
        assert plan.parameters == zipped.report.parameters_after == zipped.parameter_count()
        assert zipped.report.planned["error"] == pytest.approx(plan.error)


def test_budget_of_parameters():
    networks, x = pair("functional")
    sizes, errors = [], []
    for fraction in (0.6, 0.75, 1.0):
        report = mtzip.zip_networks(networks, x, mtzip.Budget(parameters=fraction)).report
        assert report.ratio <= fraction
        assert report.planned["parameters"] == pytest.approx(report.ratio)
        assert "measured output error: a" in str(report)
        sizes.append(report.ratio)
        errors.append(sum(report.output_error.values()))
    assert sizes == sorted(sizes)
    assert errors[0] > errors[-1]
    with pytest.raises(ValueError, match=r"at least 0\.5"):
        mtzip.zip_networks(networks, x, mtzip.Budget(parameters=0.3))


def test_budget_of_error_is_kept_and_a_looser_one_stores_less():
    networks, x = pair("mlp")
    ratios = []
    for error in (0.3, 0.01, 0.0):
        zipped = mtzip.zip_networks(networks, x, mtzip.Budget(error=error))
        found = zipped.report.output_error
        for task, network in networks.items():
            with torch.no_grad():
                wanted, got = network(x[task]), zipped[task](x[task])
            relative = (got - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum()
            assert found[task] == pytest.approx(float(relative), rel=1e-3, abs=1e-9)
        assert sum(found.values()) / 2 <= error
        ratios.append(zipped.report.ratio)
    assert ratios[0] < ratios[1] <= ratios[2]


def test_the_path_gives_up_first_what_costs_most_for_a_parameter():
    class Flat:
        total = 100

        def stored(self, counts):
            return 100 - counts["dear"] - counts["cheap"]

    axes = [PlannedAxis(n, {"a": 16, "b": 16}, [c] * 16) for n, c in (("cheap", 0.1), ("dear", 1.0))]
    path = path_of_counts(axes, Flat())
    assert path[0] == {"cheap": 16, "dear": 16} and path[16] == {"cheap": 16, "dear": 0}
    assert path[-1] == {"cheap": 0, "dear": 0}
    assert counts_for_parameters(axes, Flat(), 0.8) == {"cheap": 16, "dear": 4}


def test_a_plan_can_be_read_and_changed():
    networks, x = pair("mlp")
    plan = mtzip.plan(networks, x, mtzip.Budget(error=0.05))
    assert plan.error <= 0.05
    assert "predicted relative output error" in str(plan) and "0" in plan.counts
    plan.counts["0"] = 3
    assert mtzip.zip_networks(networks, x, plan).report.axes[0].shared == 3
    plan.counts["0"] = 100
    with pytest.raises(ValueError, match="at most its smaller width"):
        mtzip.zip_networks(networks, x, plan)
    plan.counts = {"nowhere": 1}
    with pytest.raises(ValueError, match="must name axes"):
        mtzip.zip_networks(networks, x, plan)


@pytest.mark.parametrize(
    "arguments", [{}, {"parameters": 0.5, "error": 0.1}, {"parameters": 0.0}, {"parameters": 1.5}, {"error": -1.0}]
)
def test_a_budget_that_says_nothing_or_nonsense(arguments):
    with pytest.raises(ValueError, match="Budget"):
        mtzip.Budget(**arguments)


def test_tradeoff(tmp_path):
    networks, x = pair("mlp")
    points = mtzip.tradeoff(networks, x, (0.85, 0.95), evaluate=lambda z: z.parameter_count(), path=tmp_path / "t.png")
    assert [point.parameters <= point.budget.parameters for point in points] == [True, True]
    assert points[0].score < points[1].score
    assert (tmp_path / "t.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="at least one"):
        mtzip.tradeoff(networks, x, ())
