"""Functional differences against their definition, and which neurons end in which slot."""

from __future__ import annotations

import pytest
import torch
from nets import noise

from mtzip.merging.match import (
    euclidean,
    functional_difference,
    joining_difference,
    merge_runs,
    scale_free_difference,
    slots_of,
)
from mtzip.merging.moments import Moment
from mtzip.merging.solve import JointSystem, Side
from mtzip.network.layout import Run

D = 6


def side(seed: int, count: int, alpha: float, damping: float, samples: bool = False, d: int = D) -> Side:
    x = noise(count, d, seed=seed, dtype=torch.float64) @ noise(d, d, seed=70 + seed, dtype=torch.float64)
    centred = (x - x.mean(0)) / count**0.5
    moment = Moment(count, x.mean(0), samples=centred)
    if not samples:
        moment = Moment(count, x.mean(0), covariance=centred.T @ centred)
    return Side(moment, torch.arange(d), alpha, damping)


def dense(s: Side) -> torch.Tensor:
    """Q = alpha (H + lambda I)."""
    return s.apply(torch.eye(len(s.index), dtype=torch.float64))


def parallel_sum(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.linalg.inv(torch.linalg.inv(a) + torch.linalg.inv(b))


def distances(first: torch.Tensor, second: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """1/2 (a - b)^T M (a - b), one pair after another."""
    return torch.stack([torch.stack([(a - b) @ matrix @ (a - b) / 2 for b in second]) for a in first])


ROWS = noise(5, D, seed=11, dtype=torch.float64), noise(7, D, seed=12, dtype=torch.float64)


@pytest.mark.parametrize("counts", [(50, 40), (50, 4)])
def test_functional_difference_is_the_parallel_sum(counts, assert_within):
    """1/2 (a - b)^T (Q_A^-1 + Q_B^-1)^-1 (a - b); with 4 samples Q_B is singular but for its damping."""
    sides = [side(0, counts[0], 1.3, 0.1), side(1, counts[1], 0.4, 1e-3)]
    got = functional_difference(JointSystem(sides, D), *ROWS)
    assert_within(got, distances(*ROWS, parallel_sum(*map(dense, sides))), 1e-7)


def test_functional_difference_in_sample_space(assert_within):
    d = 40
    rows = noise(5, d, seed=1, dtype=torch.float64), noise(4, d, seed=2, dtype=torch.float64)
    sides = [side(0, 9, 1.3, 0.1, True, d), side(1, 6, 0.4, 0.02, True, d)]
    system = JointSystem(sides, d)
    assert system.in_sample_space
    expected = distances(*rows, parallel_sum(*map(dense, sides)))
    assert_within(functional_difference(system, *rows), expected, 1e-9)
    features = [
        Side(Moment(9, s.moment.mean, covariance=s.moment.samples.T @ s.moment.samples), s.index, s.alpha, s.damping)
        for s in sides
    ]
    assert_within(functional_difference(JointSystem(features, d), *rows), expected, 1e-6)


def test_merging_costs_what_the_difference_says(assert_within):
    """Both rows replaced by the best common one: the least of the quadratic cost."""
    sides = [side(0, 50, 1.3, 0.1), side(1, 40, 0.4, 0.2)]
    q = [dense(s) for s in sides]
    got = functional_difference(JointSystem(sides, D), *ROWS)
    for i, a in enumerate(ROWS[0]):
        for j, b in enumerate(ROWS[1]):
            m = torch.linalg.solve(q[0] + q[1], q[0] @ a + q[1] @ b)
            cost = ((m - a) @ q[0] @ (m - a) + (m - b) @ q[1] @ (m - b)) / 2
            assert_within(got[i, j], cost, 1e-8)


def targets(sides, rows) -> list[torch.Tensor]:
    """b = Q w: the targets are what the old rows put out."""
    return [s.apply(w.T.contiguous()) for s, w in zip(sides, rows, strict=True)]


@pytest.mark.parametrize("ratios", [(), (1.0,)])
def test_scale_free_difference_at_ratio_one_is_the_functional_difference(ratios, assert_within):
    sides = [side(0, 50, 1.3, 0.1), side(1, 40, 0.4, 0.2)]
    system = JointSystem(sides, D)
    got, ratio = scale_free_difference(system, targets(sides, ROWS), ratios)
    plain = functional_difference(system, *ROWS)
    if ratios:  # a neuron and its negative are the same
        negative = functional_difference(system, ROWS[0], -ROWS[1])
        assert torch.equal(ratio, torch.where(negative < plain, -1.0, 1.0).double())
        plain = torch.minimum(plain, negative)
    else:
        assert (ratio == 1).all()
    assert_within(got, plain, 1e-7, plain.mean())


def test_scale_free_difference_finds_scaled_and_flipped_neurons():
    """Rows times a scale of either sign cost nothing, wherever the scale is on the grid."""
    moment = side(0, 50, 1.0, 0.05)
    sides = [moment, Side(moment.moment, moment.index, 1.0, 0.05)]
    factors = torch.tensor([1.0, -1.0, 0.5, -2.0, 1.0]).double()
    second = ROWS[0] * factors[:, None]
    got, ratio = scale_free_difference(JointSystem(sides, D), targets(sides, (ROWS[0], second)), (0.5, 1.0, 2.0))
    assert got.diagonal().max() < 1e-9 * got.mean()
    torch.testing.assert_close(ratio.diagonal(), factors)
    assert (got.argmin(1) == torch.arange(5)).all()


@pytest.mark.parametrize("count", [50, 2])
def test_gains_of_pairs_are_the_dense_ones(count, assert_within):
    """In feature space, and in sample space with fewer positions than columns."""
    sides = [side(0, count, 1.3, 0.1, count == 2), side(1, count, 0.4, 0.2, count == 2)]
    system = JointSystem(sides, D)
    assert system.in_sample_space == (count == 2)
    first, second = (b.contiguous() for b in targets(sides, ROWS))
    inverse = torch.linalg.inv(dense(sides[0]) + 0.36 * dense(sides[1]))
    one, two, across = system.factor([1.0, 0.6]).gains(first, second)
    assert_within(across, first.T @ inverse @ second, 1e-9, across.abs().mean())
    assert_within(one, (first.T @ inverse @ first).diagonal(), 1e-9)
    assert_within(two, (second.T @ inverse @ second).diagonal(), 1e-9)
    shortest = min(first.shape[1], second.shape[1])
    paired = system.factor([1.0, 0.6]).gains(first[:, :shortest], second[:, :shortest], paired=True)[2]
    assert_within(paired, across.diagonal(), 1e-9, across.abs().mean())


def test_layers_without_a_column_in_common_cost_nothing_to_share():
    sides = [side(0, 50, 1.3, 0.1), side(1, 40, 0.4, 0.2)]
    apart = [Side(s.moment, s.index + at * D, s.alpha, s.damping) for at, s in enumerate(sides)]
    assert JointSystem(sides, D).coupled and not JointSystem(apart, 2 * D).coupled
    got, ratio = scale_free_difference(JointSystem(apart, 2 * D), targets(sides, ROWS))
    assert (got == 0).all() and (ratio == 1).all()


def test_a_private_scale_costs_no_more(assert_within):
    sides = [side(0, 50, 1.3, 0.1), side(1, 40, 0.4, 0.2)]
    system = JointSystem(sides, D)
    got, ratio = scale_free_difference(system, targets(sides, ROWS), (0.5, 1.0, 2.0))
    assert (got <= functional_difference(system, *ROWS) + 1e-9).all()
    q = [dense(s) for s in sides]
    for i, a in enumerate(ROWS[0]):
        for j, b in enumerate(ROWS[1]):
            r = ratio[i, j]
            theta = torch.linalg.solve(q[0] + r * r * q[1], q[0] @ a + r * q[1] @ b)
            cost = ((theta - a) @ q[0] @ (theta - a) + (r * theta - b) @ q[1] @ (r * theta - b)) / 2
            assert_within(got[i, j], cost, 1e-7)


@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize("ratios", [(), (0.5, 1.0, 2.0)])
def test_tasks_that_join_one_after_another_cost_the_joint_optimum(private, ratios, assert_within):
    """Cost of the first pair and of the third's joining: together that of one fit of all three."""
    sides = [side(0, 50, 1.3, 0.1), side(1, 40, 0.4, 0.2), side(2, 30, 0.8, 0.3)]
    rows = [ROWS[0], ROWS[1][:5], noise(4, D, seed=13, dtype=torch.float64)]
    size = D
    if private:  # the third task shares its first four columns only
        sides[2] = Side(sides[2].moment, torch.tensor([0, 1, 2, 3, 6, 7]), 0.8, 0.3)
        size = 8
    system = JointSystem(sides, size)
    right = targets(sides, rows)
    scales = torch.stack([torch.ones(5), torch.tensor([1, -1, 2, 1, 0.5])], 1).double()
    if not ratios:
        scales = torch.ones_like(scales)
    cost, ratio = joining_difference(system, right, scales, ratios)
    choose = [torch.eye(size, dtype=torch.float64)[s.index] for s in sides]
    q = [dense(s) for s in sides]

    def least(weights, factors):
        tasks = range(len(weights))
        total = sum(factors[t] ** 2 * choose[t].T @ q[t] @ choose[t] for t in tasks)
        theta = torch.linalg.pinv(total) @ sum(factors[t] * choose[t].T @ q[t] @ weights[t] for t in tasks)
        differences = [factors[t] * choose[t] @ theta - weights[t] for t in tasks]
        return sum(d @ q[t] @ d for t, d in enumerate(differences)) / 2

    for slot in range(5):
        pair = least([rows[0][slot], rows[1][slot]], scales[slot].tolist())
        for j in range(4):
            together = least(
                [rows[0][slot], rows[1][slot], rows[2][j]], [*scales[slot].tolist(), float(ratio[slot, j])]
            )
            assert_within(cost[slot, j], together - pair, 1e-6, cost.mean())


def test_identical_networks_match_to_themselves():
    moment = side(0, 50, 1.0, 0.05)
    sides = [moment, Side(moment.moment, moment.index, 1.0, 0.05)]
    order = torch.tensor([3, 1, 4, 0, 2])
    for distance in (
        functional_difference(JointSystem(sides, D), ROWS[0], ROWS[0][order]),
        euclidean(ROWS[0], ROWS[0][order]),
    ):
        assert (distance.argmin(1) == order.argsort()).all()
        assert distance[torch.arange(5), order.argsort()].max() < 1e-12


def test_near_neurons_keep_their_digits(assert_within):
    """Rows that differ by 1e-6: the difference is right, not what cancellation leaves of it."""
    sides = [side(0, 50, 1.3, 0.1), side(1, 40, 0.4, 0.2)]
    step = 1e-6 * noise(5, D, seed=5, dtype=torch.float64)
    got = functional_difference(JointSystem(sides, D), ROWS[0], ROWS[0] + step).diagonal()
    matrix = parallel_sum(*map(dense, sides))
    assert_within(got, torch.stack([row @ matrix @ row / 2 for row in step]), 1e-6)


# -- slots -----------------------------------------------------------------------------------------------------


def test_slots_of_two_tasks():
    pairs = torch.tensor([[2, 0], [0, 3]])
    slots = slots_of(pairs, (0, 1), (4, 5), torch.tensor([1.0, 0.5]), torch.tensor([[1.0, -2.0], [1.0, 0.5]]))
    assert slots.shared == 2
    assert slots.difference == 1.5
    assert slots.order(0).tolist() == [0, 2, 1, 3]
    assert slots.order(1).tolist() == [3, 0, 1, 2, 4]
    assert slots.scale(1).tolist() == [0.5, -2.0, 1, 1, 1]
    assert slots.scale(0).tolist() == [1, 1, 1, 1]
    assert slots.runs(0, (0, 1)) == (Run((0, 1), 2), Run((0,), 2))
    assert slots.runs(1, (0, 1)) == (Run((0, 1), 2), Run((1,), 3))


def test_slots_of_some_of_several_tasks():
    """Tasks 0 and 2 of three have the axis; task 2 alone may read it with them."""
    slots = slots_of(torch.tensor([[1, 1, 0]]), (0, 1, 3), (2, 2, 3))
    assert slots.order(3).tolist() == [0, 1, 2]
    assert slots.order(2).tolist() == []
    assert slots.runs(3, (0, 1, 3)) == (Run((0, 1, 3), 1), Run((3,), 2))
    assert slots.runs(3, (1, 3)) == (Run((1, 3), 1), Run((3,), 2))
    assert slots.runs(3, (3,)) == (Run((3,), 3),)


@pytest.mark.parametrize("count", [0, 3])
def test_nothing_and_everything_shared(count):
    shared = torch.arange(count)[:, None].expand(-1, 2)
    slots = slots_of(shared, (0, 1), (3, 3))
    assert slots.shared == count
    assert slots.order(0).tolist() == slots.order(1).tolist() == [0, 1, 2]
    assert len(slots.runs(0, (0, 1))) == 1


def test_merge_runs():
    assert merge_runs([Run((0,), 1), Run((0,), 2), Run((0, 1), 0), Run((0, 1), 1)]) == (Run((0,), 3), Run((0, 1), 1))
