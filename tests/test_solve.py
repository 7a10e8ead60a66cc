"""Joint systems against dense float64 least squares written independently."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from nets import noise

from mtzip.merging.moments import Moment
from mtzip.merging.solve import MOST_SCALES, JointSystem, Side, automatic_damping, fit_scales, joint_rows

ROWS = 4


def moment_of(x: torch.Tensor, samples: bool) -> Moment:
    centred = (x - x.mean(0)) / len(x) ** 0.5
    if samples:
        return Moment(len(x), x.mean(0), samples=centred)
    return Moment(len(x), x.mean(0), covariance=centred.T @ centred)


class Problem:
    """Tasks with inputs x_t, targets z_t and old weights w_t; each reads its own selection of the unknown columns."""

    def __init__(self, count: int, samples: bool, indices, size: int, alphas, dampings):
        self.size, self.indices = size, [torch.tensor(index) for index in indices]
        self.alphas, self.dampings = alphas, dampings
        self.x, self.z, self.w = [], [], []
        for seed, index in enumerate(indices):
            mixing = noise(len(index), len(index), seed=90 + seed, dtype=torch.float64)
            self.x.append(noise(count + seed, len(index), seed=seed, dtype=torch.float64) @ mixing)
            self.w.append(noise(ROWS, len(index), seed=20 + seed, dtype=torch.float64))
            self.z.append(
                self.x[-1] @ self.w[-1].T + 0.3 * noise(count + seed, ROWS, seed=40 + seed, dtype=torch.float64)
            )
        sides = [
            Side(moment_of(x, samples), index, alpha, damping)
            for x, index, alpha, damping in zip(self.x, self.indices, alphas, dampings, strict=True)
        ]
        self.system = JointSystem(sides, size)
        self.right = [
            side.right_hand_side((x - x.mean(0)).T @ (z - z.mean(0)) / len(x), w)
            for side, x, z, w in zip(sides, self.x, self.z, self.w, strict=True)
        ]

    def dense(self, row: int, scales: list[float]) -> torch.Tensor:
        """theta of one row."""
        equations, values = self.equations(row, scales)
        return torch.linalg.lstsq(equations, values[:, None]).solution[:, 0]

    def equations(self, row: int, scales: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
        """Every sample and every damping term an equation of one least-squares problem: [e, size] and [e]."""
        equations, values = [], []
        for x, z, w, index, alpha, damping, scale in zip(
            self.x, self.z, self.w, self.indices, self.alphas, self.dampings, scales, strict=True
        ):
            choose = torch.zeros(len(index), self.size, dtype=torch.float64)
            choose[torch.arange(len(index)), index] = 1
            weight = (alpha / len(x)) ** 0.5
            equations.append(weight * scale * (x - x.mean(0)) @ choose)
            values.append(weight * (z - z.mean(0))[:, row])
            equations.append((alpha * damping) ** 0.5 * scale * choose)
            values.append((alpha * damping) ** 0.5 * w[row])
        return torch.cat(equations), torch.cat(values)

    def cost(self, theta: torch.Tensor, scales) -> torch.Tensor:
        """What the rows cost, [ROWS], written out."""
        total = torch.zeros(ROWS, dtype=torch.float64)
        for at, (x, z, w) in enumerate(zip(self.x, self.z, self.w, strict=True)):
            own = theta[self.indices[at]] * scales[at]
            error = (x - x.mean(0)) @ own - (z - z.mean(0))
            total += self.alphas[at] * (error.square().mean(0) + self.dampings[at] * (own - w.T).square().sum(0))
        return total


LAYOUTS = {
    "all shared": ([[0, 1, 2, 3, 4]] * 2, 5),
    "private columns": ([[0, 1, 2, 3, 4], [2, 1, 0, 5, 6, 7]], 8),
    "nothing shared": ([[0, 1], [2, 3, 4]], 5),
    "one task": ([[2, 0, 1]], 3),
    "three tasks": ([[0, 1, 2, 3], [0, 1, 4, 5], [0, 4, 6]], 7),
}


@pytest.fixture(params=LAYOUTS)
def layout(request):
    return LAYOUTS[request.param]


@pytest.fixture(params=[name for name in LAYOUTS if name != "one task"])
def several(request):
    return LAYOUTS[request.param]


@pytest.mark.parametrize("count, samples", [(60, False), (60, True), (1, True)])
def test_joint_rows_are_the_least_squares_solution(layout, count, samples, assert_within):
    indices, size = layout
    problem = Problem(count, samples, indices, size, [1.0, 0.3, 2.0][: len(indices)], [0.05, 0.2, 0.1][: len(indices)])
    positions = sum(len(x) for x in problem.x)
    assert problem.system.in_sample_space == (samples and positions < size)
    theta, scales = joint_rows(problem.system, problem.right)
    expected = torch.stack([problem.dense(row, [1.0] * len(indices)) for row in range(ROWS)], 1)
    assert_within(theta, expected, 1e-9, torch.ones(()))
    assert all(torch.equal(scale, torch.ones(ROWS, dtype=torch.float64)) for scale in scales)


@pytest.mark.parametrize("count, samples", [(60, False), (1, True)])
def test_rows_at_given_scales(several, count, samples, assert_within):
    """Scales of either sign, equal for some rows and not for others."""
    indices, size = several
    problem = Problem(count, samples, indices, size, [1.0, 0.3, 2.0][: len(indices)], [0.05, 0.2, 0.1][: len(indices)])
    scales = [
        torch.ones(ROWS).double(),
        torch.tensor([0.5, -0.5, 2.0, -1.0]).double(),
        torch.tensor([1, 1, -3, 1.0]).double(),
    ]
    scales = scales[: len(indices)]
    theta, unchanged = joint_rows(problem.system, problem.right, scales, fit=False)
    for row in range(ROWS):
        expected = problem.dense(row, [float(scale[row]) for scale in scales])
        assert_within(theta[:, row], expected, 1e-8, torch.ones(()))
    assert all(torch.equal(a, b) for a, b in zip(unchanged, scales, strict=True))


def test_private_scales_are_those_of_the_optimum(several):
    """Sweeps never cost more; at the end no scale can be moved for the better."""
    indices, size = several
    problem = Problem(60, False, indices, size, [1.0, 0.3, 2.0][: len(indices)], [0.05, 0.2, 0.1][: len(indices)])
    problem.z[1].mul_(-2)
    problem.w[1].mul_(-2)
    problem.right[1].mul_(-2)
    start = [torch.ones(ROWS).double()] * len(indices)
    costs = []
    for sweeps in (0, 1, 4, 30):
        theta, scales = joint_rows(problem.system, problem.right, start, sweeps=sweeps, steps=20)
        costs.append(problem.cost(theta, scales))
    for before, after in pairwise(costs):
        assert (after <= before + 1e-9).all()
    for at in range(len(indices)):
        for factor in (0.99, 1.01):
            moved = [scale * factor if other == at else scale for other, scale in enumerate(scales)]
            assert (problem.cost(theta, moved) >= costs[-1] - 1e-12).all()
    for scale, fitted in zip(scales, fit_scales(problem.system, theta, problem.right), strict=True):
        torch.testing.assert_close(scale, fitted)


def test_without_targets_of_its_own_the_closed_form_is_regmean(assert_within):
    """With z_t = w_t x_t and moments about zero: m = (sum H_t)^-1 sum H_t w_t (RegMean; MTZ with equal weights)."""
    x = [noise(50, 4, seed=seed, dtype=torch.float64) + 0.5 for seed in (0, 1, 2)]
    w = [noise(ROWS, 5, seed=seed, dtype=torch.float64) for seed in (3, 4, 5)]
    damping = 0.01
    wide = [torch.cat([x_t, torch.ones(50, 1, dtype=torch.float64)], 1) for x_t in x]
    second = [x_t.T @ x_t / 50 + damping * torch.eye(5, dtype=torch.float64) for x_t in wide]
    expected = torch.linalg.inv(sum(second)) @ sum(h @ w_t.T for h, w_t in zip(second, w, strict=True))
    sides = [Side(moment_of(x_t, False).raw(True), torch.arange(5), 1.0, damping) for x_t in x]
    system = JointSystem(sides, 5)
    theta, _ = joint_rows(system, [side.apply(w_t.T.contiguous()) for side, w_t in zip(sides, w, strict=True)])
    assert_within(theta, expected, 1e-10, torch.ones(()))


def test_damping_grows_until_the_factor_exists():
    """A matrix that rounding has left indefinite: escalated and said so, no exception."""
    covariance = -0.5 * torch.eye(3, dtype=torch.float64)
    side = Side(Moment(9, torch.zeros(3).double(), covariance=covariance), torch.arange(3), 1.0, 1e-3)
    system = JointSystem([side], 3)
    solved = system.factor([1.0]).solve(torch.ones(3, 1).double())
    assert system.escalation == 1000
    torch.testing.assert_close(solved, torch.full((3, 1), 2.0).double())
    broken = Side(Moment(9, torch.zeros(3).double(), covariance=covariance * torch.nan), torch.arange(3), 1.0, 1e-3)
    with pytest.raises(FloatingPointError, match="3 columns"):
        JointSystem([broken], 3).factor([1.0])


def test_singular_moments_give_the_old_weights_where_nothing_varies(assert_within):
    """Columns without variance end at the mean of the old weights, weighted by damping."""
    x = noise(40, 4, dtype=torch.float64)
    x[:, 2] = -0.4
    moment = moment_of(x, False)
    w = [noise(1, 4, seed=seed, dtype=torch.float64) for seed in (1, 2)]
    sides = [Side(moment, torch.arange(4), alpha, 0.1) for alpha in (1.0, 3.0)]
    system = JointSystem(sides, 4)
    right = [side.right_hand_side(moment.covariance @ w_t.T, w_t) for side, w_t in zip(sides, w, strict=True)]
    theta, _ = joint_rows(system, right)
    assert_within(theta[2], (w[0][:, 2] + 3 * w[1][:, 2]) / 4, 1e-12)


def test_large_systems_in_float32_are_refined_to_float64():
    size = 400
    x = noise(900, size, dtype=torch.float64) @ noise(size, size, seed=1, dtype=torch.float64)
    moment = moment_of(x, False)
    damping = 1e-3 * float(moment.diagonal().mean())
    sides = [Side(moment, torch.arange(size), 1.0, damping), Side(moment, torch.arange(size), 0.5, damping)]
    system = JointSystem(sides, size)
    truth = noise(size, 3, seed=2, dtype=torch.float64)
    scales = [torch.ones(3).double(), torch.tensor([1.0, -2.0, 2.0]).double()]
    assert not system.factor([1.0, 2.0]).is_exact
    image = sum(side.apply(truth) * scale.square() for side, scale in zip(sides, scales, strict=True))
    right = [image / (2 * scale) for scale in scales]
    theta, _ = joint_rows(system, right, scales, fit=False)
    assert (theta - truth).norm() < 1e-4 * truth.norm()


def test_sample_space_forms_nothing_of_the_size_of_the_columns():
    """20,000 columns, 30 samples: 3.2 GB if a square matrix were formed."""
    size = 20_000
    samples = [noise(30, size, seed=seed, dtype=torch.float64) for seed in (0, 1)]
    sides = [Side(Moment(30, torch.zeros(size).double(), samples=z), torch.arange(size), 1.0, 0.1) for z in samples]
    system = JointSystem(sides, size)
    assert system.in_sample_space
    truth = noise(size, 2, seed=3, dtype=torch.float64)
    ones = [torch.ones(2).double()] * 2
    solved = system.factor([1.0, 1.0]).solve(system.apply(truth, ones))
    assert (solved - truth).abs().max() < 1e-8


def test_automatic_damping():
    assert automatic_damping(10, 10_000_000) == 1e-3
    assert automatic_damping(785, 1000) == pytest.approx(0.0785)
    assert automatic_damping(785, 10) == 0.1


@pytest.mark.parametrize("samples", [False, True])
def test_rows_of_many_different_scales_are_solved_exactly(samples, assert_within):
    """More scales than factors are taken for, a thousandth and zero among them: every row against a dense solve."""
    d, rows = 12, MOST_SCALES + 36
    x = [noise(5, d, seed=seed, dtype=torch.float64) for seed in (1, 2)]
    sides = [Side(moment_of(x[at], samples), torch.arange(d), 1.0 + at, 0.3) for at in (0, 1)]
    system = JointSystem(sides, d)
    assert system.in_sample_space == samples
    right = [noise(d, rows, seed=seed, dtype=torch.float64) for seed in (3, 4)]
    scales = [torch.ones(rows, dtype=torch.float64), 2 * noise(rows, seed=5, dtype=torch.float64)]
    scales[1][:2] = torch.tensor([0.0, 1e-3])
    theta, got = joint_rows(system, right, scales, fit=False)
    assert all(map(torch.equal, got, scales))
    q = [side.apply(torch.eye(d, dtype=torch.float64)) for side in sides]
    for row in range(rows):
        s = [float(scale[row]) for scale in scales]
        expected = torch.linalg.solve(
            s[0] ** 2 * q[0] + s[1] ** 2 * q[1], s[0] * right[0][:, row] + s[1] * right[1][:, row]
        )
        assert_within(theta[:, row], expected, 1e-5, expected.abs().max())
