"""Rows that keep zeros, against dense float64 least squares over the columns of each row, written independently."""

from __future__ import annotations

import pytest
import torch
from test_solve import LAYOUTS, ROWS, Problem

from mtzip.merging import restricted
from mtzip.merging.restricted import restricted_rows
from mtzip.merging.solve import joint_rows

ALPHAS, DAMPINGS = [1.0, 0.3, 2.0], [0.05, 0.2, 0.1]
SCALES = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.5, -0.5, 2.0, -1.0], [1.0, 1.0, -3.0, 1.0]]).double()


def problem_of(layout: str, count: int, samples: bool) -> Problem:
    indices, size = LAYOUTS[layout]
    return Problem(count, samples, indices, size, ALPHAS[: len(indices)], DAMPINGS[: len(indices)])


def some_support(size: int, seed: int = 0) -> torch.Tensor:
    """A row without any weight, a row with all of them, two with some."""
    generator = torch.Generator().manual_seed(seed)
    support = torch.rand(size, ROWS, generator=generator) < 0.5
    support[:, 0], support[:, 1], support[0, 2], support[-1, 3] = False, True, True, True
    return support


def expected_rows(problem: Problem, support: torch.Tensor, scales) -> torch.Tensor:
    """Every sample and every damping term an equation, over the columns of each row's support alone."""
    theta = torch.zeros(problem.size, ROWS, dtype=torch.float64)
    for row in range(ROWS):
        keep = support[:, row].nonzero().flatten()
        equations, values = problem.equations(row, [float(scale[row]) for scale in scales])
        if len(keep):
            theta[keep, row] = torch.linalg.lstsq(equations[:, keep], values[:, None]).solution[:, 0]
    return theta


@pytest.fixture(params=["a factorisation a row", "conjugate gradients"])
def way(request, monkeypatch):
    if request.param == "conjugate gradients":
        monkeypatch.setattr(restricted, "WORTH", 0)
    return request.param


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("count, samples", [(60, False), (60, True), (1, True)])
def test_rows_are_the_least_squares_solution_over_their_support(layout, count, samples, way, assert_within):
    problem = problem_of(layout, count, samples)
    support = some_support(problem.size)
    scales = list(SCALES[: len(problem.x)])
    theta, found = restricted_rows(problem.system, problem.right, scales, support, fit=False)
    if len(problem.x) == 1:
        scales = list(torch.ones(1, ROWS).double())  # one task needs no scale
    assert_within(theta, expected_rows(problem, support, scales), 1e-6, torch.ones(()))
    assert not theta[~support].any()
    assert all(torch.equal(a, b) for a, b in zip(found, scales, strict=True))


def test_restricted_rows_cost_less_than_masked_ones(way):
    """What the others would have done falls to the columns that stay; setting to zero afterwards leaves it undone."""
    problem = problem_of("private columns", 60, False)
    support = some_support(problem.size)
    ones = [torch.ones(ROWS).double()] * 2
    theta, _ = restricted_rows(problem.system, problem.right, None, support)
    masked = joint_rows(problem.system, problem.right)[0] * support
    restricted_cost, masked_cost = (problem.cost(rows, ones)[2:] for rows in (theta, masked))  # 0 and 1 have no choice
    assert (restricted_cost < masked_cost).all() and restricted_cost.sum() < 0.9 * masked_cost.sum()
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):  # and nothing near it is better
        other = theta + 1e-3 * torch.randn(theta.shape, generator=generator, dtype=theta.dtype) * support
        assert (problem.cost(theta, ones) <= problem.cost(other, ones)).all()


def test_full_support_is_the_unrestricted_fit(way, assert_within):
    problem = problem_of("three tasks", 60, False)
    everywhere = torch.ones(problem.size, ROWS, dtype=torch.bool)
    theta, _ = restricted_rows(problem.system, problem.right, None, everywhere)
    assert_within(theta, joint_rows(problem.system, problem.right)[0], 1e-8, torch.ones(()))


def test_alternating_rows_and_scales_only_gets_better(way):
    problem = problem_of("private columns", 60, False)
    support = some_support(problem.size)
    start = list(SCALES[:2])
    costs = []
    for sweeps in (0, 1, 2, 5):
        theta, scales = restricted_rows(problem.system, problem.right, start, support, sweeps=sweeps)
        assert not theta[~support].any()
        costs.append(problem.cost(theta, scales).sum())
    assert costs[0] > costs[1] > costs[2] >= costs[3] * (1 - 1e-9)


def test_batches_have_every_row_with_weights_once_and_keep_to_their_size(monkeypatch):
    monkeypatch.setattr(restricted, "BATCH", 50)
    sizes = torch.tensor([0, 3, 7, 1, 1, 2, 9, 0, 3])
    for samples in (0, 6):
        batches = restricted._batches(sizes, torch.arange(9), samples)
        assert sorted(torch.cat(batches).tolist()) == [1, 2, 3, 4, 5, 6, 8]
        for rows in batches:
            most = int(sizes[rows].max())
            assert len(rows) == 1 or len(rows) * most * max(most, samples) <= 50


def test_float32_moments_and_a_batch_of_its_own_for_every_row(monkeypatch, assert_within):
    monkeypatch.setattr(restricted, "BATCH", 1)
    problem = problem_of("all shared", 60, False)
    for side in problem.system.sides:
        side.moment.covariance = side.moment.covariance.float()
    support = some_support(problem.size)
    theta, _ = restricted_rows(problem.system, problem.right, list(SCALES[:2]), support, fit=False)
    assert theta.dtype == torch.float64
    assert_within(theta, expected_rows(problem, support, SCALES[:2]), 1e-5, torch.ones(()))
