"""Which neuron of one task stands for which of another.

The functional difference of neurons a and b is the least error that merging them costs. With the second moments Q of
their inputs (He, Zhou, Thiele 2018, sec. 3.2, in the form of a parallel sum) it is::

    d(a, b) = 1/2 (a - b)^T M (a - b),    M = Q_A (Q_A + Q_B)^-1 Q_B

Where each task keeps a private scale of its own, b also stands for r b, and the difference is the least over r: the
parallel sum of Q_A and r^2 Q_B between a and b / r.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import mtz_ext

from ..network.layout import Run, merge_runs
from .solve import JointSystem

#: Ratios of the private scales that matching tries, with either sign: the gain is flat between them.
RATIOS = (0.35, 0.6, 1.0, 1.7, 3.0)
#: The same for a third and any later task, whose joining is tried beside every combination of scales there is.
FEW_RATIOS = (0.5, 1.0, 2.0)


@dataclass
class Slots:
    """How the neurons of an axis are stored: slot to its neuron in every task, -1 where a task is not part of it.

    Args:
        table: [slots, tasks] int64, slots of more tasks first.
        costs: [shared slots] functional difference of each, in units of the layers' output variances.
        scales: [slots, tasks] private scales that matching found, ones where it tried none.
        energy: half the summed variance of what all neurons put out, in the same units.
    """

    table: Tensor
    costs: Tensor | None = None
    scales: Tensor | None = None
    energy: float = 0.0
    _known: dict[object, Any] = field(default_factory=dict, repr=False, compare=False)  # asked for again and again

    @property
    def difference(self) -> float:
        """Summed functional difference of all merged slots."""
        return 0.0 if self.costs is None else float(self.costs.sum())

    def order(self, task: int) -> Tensor:
        """Neurons of a task in stored order, [n]."""
        if task not in self._known:
            column = self.table[:, task]
            self._known[task] = column[column >= 0]
        return self._known[task]

    def scale(self, task: int) -> Tensor:
        """Private scale of every neuron of a task in stored order, [n]."""
        column = self.table[:, task]
        return self.scales[column >= 0, task]

    def runs(self, task: int, members: Sequence[int]) -> tuple[Run, ...]:
        """Runs of a task's stored order when only the tasks of ``members`` share."""
        key = task, tuple(members)
        if key not in self._known:
            rows = self.table[self.table[:, task] >= 0].tolist()
            self._known[key] = merge_runs([Run(tuple(t for t in members if row[t] >= 0), 1) for row in rows])
        return self._known[key]

    @property
    def shared(self) -> int:
        """Number of slots that more than one task uses."""
        return sum(self.sets.values())

    @property
    def sets(self) -> dict[tuple[int, ...], int]:
        """Sets of tasks, of two and more, to the number of slots that exactly they share."""
        if "sets" not in self._known:
            rows = [tuple(t for t, neuron in enumerate(row) if neuron >= 0) for row in self.table.tolist()]
            self._known["sets"] = dict(Counter(tasks for tasks in rows if len(tasks) > 1))
        return self._known["sets"]


def slots_of(
    shared: Tensor,
    tasks: Sequence[int],
    sizes: Sequence[int],
    costs: Tensor | None = None,
    scales: Tensor | None = None,
) -> Slots:
    """Slots of several tasks: those that most of them share first, in the order of the first of their tasks.

    Args:
        shared: [k, tasks] neuron of every task in each of them, -1 where it is not part of one.
        tasks: indices of the tasks, ascending.
        sizes: number of neurons of each task; those that are in no shared slot have one of their own.
        costs: [k] functional difference of each.
        scales: [k, tasks] private scales of the shared slots.
    """
    shared = shared.cpu()
    rows = [[(at, neuron) for at, neuron in enumerate(row) if neuron >= 0] for row in shared.tolist()]
    keys = [(-len(row), [at for at, _ in row], row) for row in rows]
    order = torch.tensor(sorted(range(len(rows)), key=keys.__getitem__), dtype=torch.int64)
    shared = shared[order]
    columns = torch.as_tensor(tasks)
    table = torch.full((len(shared), int(columns.max()) + 1), -1)
    table[:, columns] = shared
    parts = [table]
    for at, task in enumerate(tasks):
        free = torch.ones(sizes[at], dtype=torch.bool)
        free[shared[shared[:, at] >= 0, at]] = False
        single = torch.full((int(free.sum()), table.shape[1]), -1)
        single[:, task] = free.nonzero().flatten()
        parts.append(single)
    table = torch.cat(parts)
    full = torch.ones(table.shape, dtype=torch.float64)
    if scales is not None:
        full[: len(shared), columns] = scales[order.to(scales.device)].cpu().double()
    return Slots(table, None if costs is None else costs[order.to(costs.device)], full)


def euclidean(first: Tensor, second: Tensor) -> Tensor:
    """Half the squared distance between rows [n, d] and [m, d]: the baseline that knows nothing of the inputs."""
    return mtz_ext.neuron_distances(first, second)


def functional_difference(system: JointSystem, first: Tensor, second: Tensor) -> Tensor:
    """Functional differences [n, m] of rows [n, s] and [m, s] over the columns both tasks share.

    Args:
        system: joint system of the two tasks over exactly the shared columns.
        first: rows of side 0, [n, s].
        second: rows of side 1, [m, s].
    """
    if system.in_sample_space:
        return _difference_in_sample_space(system, first, second)
    q_first, q_second = (_dense(side) for side in system.sides)
    lower = system.factor([1.0, 1.0], exact=True)
    # M = Q_A S^-1 Q_B as a product of half solves; symmetric up to rounding.
    parallel = lower.half(q_first).T @ lower.half(q_second)
    parallel = (parallel + parallel.T) / 2
    floor = parallel.diagonal().mean() * 1e-12
    factor, status = torch.linalg.cholesky_ex(
        parallel + torch.eye(len(parallel), dtype=parallel.dtype, device=parallel.device) * floor
    )
    if int(status):
        values, vectors = torch.linalg.eigh(parallel)
        factor = vectors * values.clamp_min(0).sqrt()
    return mtz_ext.neuron_distances(first.to(factor.dtype), second.to(factor.dtype), factor)


def _dense(side) -> Tensor:
    moment = side.moment
    covariance = moment.samples.T @ moment.samples if moment.covariance is None else moment.covariance
    damped = covariance.to(torch.float64, copy=True)
    damped.diagonal().add_(side.damping)
    return damped.mul_(side.alpha)


def _difference_in_sample_space(system: JointSystem, first: Tensor, second: Tensor) -> Tensor:
    """The same from n x n matrices: with dampings la, lb, s = la + lb, Z the stacked samples and K = s I + Z Z^T,

    M = c I + Z^T C Z,  c = la lb / s,  C = -c K^-1 + lb Ja K^-1 + (la I + Ja G) K^-1 Jb.
    """
    a, b = system.sides
    la, lb = a.alpha * a.damping, b.alpha * b.damping
    samples = torch.cat([a.moment.samples * a.alpha**0.5, b.moment.samples * b.alpha**0.5])
    gram = samples @ samples.T
    count = len(a.moment.samples)
    total, c = la + lb, la * lb / (la + lb)
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram + total * eye))
    is_a = (torch.arange(len(gram), device=gram.device) < count).to(gram.dtype)
    core = -c * inverse + lb * is_a[:, None] * inverse + (la * eye + is_a[:, None] * gram) @ inverse * (1 - is_a)
    values, vectors = torch.linalg.eigh((core + core.T) / 2)
    half = vectors * values.clamp_min(0).sqrt()

    def embed(rows: Tensor) -> Tensor:
        return torch.cat([rows * c**0.5, (rows @ samples.T) @ half], 1)

    return mtz_ext.neuron_distances(embed(first), embed(second))


def scale_free_difference(
    system: JointSystem,
    right: list[Tensor],
    ratios: Sequence[float] = RATIOS,
    alone: Sequence[Tensor] | None = None,
    rests: Rests | None = None,
) -> tuple[Tensor, Tensor]:
    """Functional difference [n, m] and best ratio [n, m] where each task keeps a private scale.

    The error of a joint fit is a constant less its gain b^T (sum s_t^2 Q_t)^-1 b with b = sum s_t b_t, so the
    difference is half of what the two neurons gain alone less what they gain together, at the best ratio of scales.

    Args:
        system: joint system of two tasks.
        right: b_t of the two sides, [d_0, n] and [d_1, m].
        ratios: scales of the second task to try, the first one's being 1; a neuron and its negative are the same to a
            private scale, so each is tried with both signs. None: there are no private scales.
        alone: what the rows of each side gain alone, [n] and [m], where that is known (:func:`gain_alone`).
        rests: of the rows, outside of what the system spans.

    Both are in the precision of the system's factors.
    """
    if not system.coupled:
        nothing = right[0].new_zeros(right[0].shape[1], right[1].shape[1])
        return nothing, torch.ones_like(nothing)
    signed, ratios = bool(ratios), ratios or (1.0,)
    both = [system.scatter(at, b) for at, b in enumerate(right)]
    best = ratio = None
    for r in ratios:
        one, two, across = system.factor([1.0, r]).gains(*both)
        if rests is not None:
            one, two, across = (a.add_(b) for a, b in zip((one, two, across), rests.gains(r), strict=True))
        sign = torch.where(across < 0, -1.0, 1.0).to(across) if signed else torch.ones_like(across)
        gain = across.mul_(sign).mul_(2 * r).add_(one[:, None]).add_(two, alpha=r * r)
        if best is None:
            best, ratio = gain, sign.mul_(r)
        else:
            better = gain > best
            best, ratio = torch.where(better, gain, best), torch.where(better, r * sign, ratio)
    alone = alone or [gain_alone(system, at, b) for at, b in enumerate(right)]
    if rests is not None:
        alone = [gain + rest for gain, rest in zip(alone, rests.alone, strict=True)]
    first, second = (gain.to(best.dtype) for gain in alone)
    return best.neg_().add_(first[:, None]).add_(second).clamp_min_(0).div_(2), ratio


@dataclass
class Rests:
    """What rows of two sides are beside the columns of a system: columns of which no sample has anything, only damping.

    Args:
        weights: alpha times lambda of each side.
        sizes: squares of the rests of either side, [n] and [m].
        across: products of the rests of one side with those of the other, [n, m].
    """

    weights: Sequence[float]
    sizes: Sequence[Tensor]
    across: Tensor

    @property
    def alone(self) -> tuple[Tensor, Tensor]:
        """What each gains alone."""
        return self.weights[0] * self.sizes[0], self.weights[1] * self.sizes[1]

    def gains(self, ratio: float) -> tuple[Tensor, Tensor, Tensor]:
        """What they add to :meth:`.solve.Factor.gains`, where the second side's scale is ``ratio``."""
        first, second = self.weights
        total = first + ratio * ratio * second
        one, two = first * first / total * self.sizes[0], second * second / total * self.sizes[1]
        return one, two, first * second / total * self.across


def gain_alone(system: JointSystem, at: int, b: Tensor) -> Tensor:
    """What rows of one side gain alone, b^T Q^-1 b, [r]."""
    side = system.sides[at]
    own = type(side)(side.moment, torch.arange(len(b), device=b.device), side.alpha, side.damping)
    return JointSystem([own], len(b)).factor([1.0]).gain(b)


def joining_difference(
    system: JointSystem, right: list[Tensor], scales: Tensor, ratios: Sequence[float] = FEW_RATIOS
) -> tuple[Tensor, Tensor]:
    """What it costs that a neuron of the last side joins a slot of the others, [slots, n], and the best ratio of it.

    The same as :func:`scale_free_difference`, with the sum of the slot's Q and b in place of the first task's: summed
    over the tasks that join one after another it is the cost of the joint optimum.

    Args:
        system: joint system of all tasks, the one that joins last.
        right: b_t of every side, [d_t, slots] for those of the slots, [d, n] for the last.
        scales: [slots, sides - 1] private scales in every slot.
        ratios: scales of the last task to try, with both signs. None: there are no private scales.
    """
    signed, ratios = bool(ratios), ratios or (1.0,)
    slot = sum(system.scatter(at, b * scales[:, at]) for at, b in enumerate(right[:-1]))
    new = system.scatter(len(right) - 1, right[-1])
    alone = gain_alone(system, len(right) - 1, right[-1])
    cost = slot.new_zeros(slot.shape[1], new.shape[1])
    ratio = torch.ones_like(cost)
    used = torch.unique(torch.cat([side.index for side in system.sides[:-1]]))
    values, which = torch.unique(scales.abs(), dim=0, return_inverse=True)  # the matrix has squares only
    for at, value in enumerate(values.tolist()):
        rows = (which == at).nonzero().flatten()
        b = slot[:, rows]
        earlier = JointSystem(
            [type(s)(s.moment, torch.searchsorted(used, s.index), s.alpha, s.damping) for s in system.sides[:-1]],
            len(used),
        )
        before = (b[used] * earlier.factor(value).solve(b[used])).sum(0)
        best = torch.full_like(cost[rows], -torch.inf)
        for r in ratios:
            solved = system.factor([*value, r]).solve(torch.cat([b, new], 1))
            own = (b * solved[:, : len(rows)]).sum(0)[:, None] + r * r * (new * solved[:, len(rows) :]).sum(0)
            across = 2 * r * (b.T @ solved[:, len(rows) :])
            sign = torch.where(across < 0, -1.0, 1.0).to(own) if signed else torch.ones_like(across)
            gain = own + across * sign
            better = gain > best
            best = torch.where(better, gain, best)
            ratio[rows] = torch.where(better, r * sign, ratio[rows])
        cost[rows] = (before[:, None] + alone - best).clamp_min(0) / 2
    return cost, ratio
