"""Joint merges against chained ones, on systems written down here and on small networks."""

from __future__ import annotations

import pytest
import torch
from nets import Residual, mlp, noise, seeded

from bench.tasks import chained, compare, jointly, summed
from mtzip.merging.moments import Moment
from mtzip.merging.solve import JointSystem, Side

D, ROWS = 7, 5


def problem(seed: int, tasks: int = 3):
    """A joint system, the rows [d, r] of every task, and the dense Q of every task written out from its samples."""
    sides, weights, dense = [], [], []
    generator = torch.Generator().manual_seed(seed)
    for task in range(tasks):
        x = torch.randn(int(torch.randint(3, 30, (), generator=generator)), D, generator=generator).double()
        x = x @ torch.randn(D, D, generator=generator).double()
        centred = (x - x.mean(0)) / len(x) ** 0.5
        alpha, damping = (float(10 ** (2 * torch.rand((), generator=generator) - 1)) for _ in range(2))
        moment = Moment(len(x), x.mean(0), covariance=centred.T @ centred)
        sides.append(Side(moment, torch.arange(D), alpha, damping))
        weights.append(noise(D, ROWS, seed=100 * seed + task, dtype=torch.float64))
        dense.append(alpha * (centred.T @ centred + damping * torch.eye(D, dtype=torch.float64)))
    return JointSystem(sides, D), weights, dense


def cost(merged, weights, dense) -> float:
    """Sum over tasks and rows, one quadratic form after another."""
    pairs = zip(weights, dense, strict=True)
    return sum(float((merged - w)[:, r] @ q @ (merged - w)[:, r]) / 2 for w, q in pairs for r in range(ROWS))


@pytest.mark.parametrize("seed", range(20))
def test_joint_is_never_higher_than_a_chain_or_anything_near_it(seed, assert_within):
    system, weights, dense = problem(seed)
    joint, chain = jointly(system, weights), chained(system, weights)
    least = cost(joint, weights, dense)
    assert least < cost(chain, weights, dense)
    for step in range(5):
        assert least < cost(joint + 1e-3 * noise(D, ROWS, seed=step, dtype=torch.float64), weights, dense)
    assert_within(torch.tensor(summed(system, weights, joint)), torch.tensor(least), 1e-12)
    assert_within(torch.tensor(summed(system, weights, chain)), torch.tensor(cost(chain, weights, dense)), 1e-12)


def test_the_chain_is_two_merges_in_closed_form(assert_within):
    """The second with the mean of the first two tasks' Q: one network of one task."""
    system, (a, b, c), (qa, qb, qc) = problem(3)
    ab = torch.linalg.inv(qa + qb) @ (qa @ a + qb @ b)
    mean = (qa + qb) / 2
    assert_within(chained(system, [a, b, c]), torch.linalg.inv(mean + qc) @ (mean @ ab + qc @ c), 1e-9)


def test_two_tasks_are_no_chain(assert_within):
    system, weights, _ = problem(4, tasks=2)
    assert_within(chained(system, weights), jointly(system, weights), 1e-9)


def wide():
    """Layers of so many columns that planning takes their weights in float32."""
    return mlp(400, (12, 8))


@pytest.mark.parametrize(
    "make, shape, layers",
    [(mlp, (6,), 2), (Residual, (2, 8, 8), 5), (wide, (400,), 2)],
    ids=["mlp", "residual", "wide"],
)
def test_every_layer_of_three_networks(make, shape, layers):
    networks = {task: seeded(make, seed) for seed, task in enumerate("abc")}
    rows = compare("small", networks, {task: noise(500, *shape, seed=at) for at, task in enumerate("abc")})
    assert len(rows) == layers
    assert all(0 < row.joint < row.chained for row in rows)
