"""Pairing the neurons of one axis: what each pair costs in the layers that write it, and the cheapest pairs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from . import match
from .columns import Unknown
from .joins import Forming
from .match import Slots
from .narrow import narrowed
from .part import Part, Systems, plain_mean
from .solve import JointSystem

#: Columns from which layers in front of a BatchNorm are compared at one scale only, where every further one costs a
#: large factorisation. Measured on a VGG-16 pair, twelve draws: +0.07 +- 0.04 points of test error; with all layers
#: +0.50 +- 0.09.
ONE_SCALE_FROM = 768

#: Farthest ratio of two layers' scales that matching follows: beyond it one of them is as good as constant.
FARTHEST = 1e3


def match_axis(
    groups: Sequence[tuple[Systems, Mapping[int, Tensor]]],
    count: int,
    method: str,
    matching: str,
    extra: Sequence[Tensor] = (),
    ratios: Sequence[float] | None = None,
    partial: bool = False,
    sizes: Mapping[int, int] | None = None,
) -> Slots:
    """Matches the neurons of an axis that several tasks' layers write: which of them share a slot.

    The first two tasks are matched with each other, every further one onto the slots there are.

    Args:
        groups: for every group of layers that writes the axis its systems, and task to the rows [n, m] that each neuron
            has in its part, in the network's own order. Their differences are added up.
        count: slots that all tasks share, or as many joins of a neuron to a slot as make these.
        method: "average" (Euclidean distance), "mtz" (functional difference) or "refit" (the same with private scales).
        matching: "optimal" or "greedy".
        extra: further costs [n, m] of pairing neurons of two tasks.
        ratios: private scales to try where rows have any, None for as many as pay.
        partial: any of the tasks may share a slot, where that costs less than slots that all of them share.
        sizes: task to number of neurons, of those too that no group has: they share nothing. None: groups have all.
    """
    written = {task: len(rows) for _, neurons in groups for task, rows in neurons.items()}
    sizes = dict(sorted({**(sizes or {}), **written}.items()))
    tasks = sorted(written)

    def cost(members, neurons: Tensor, scales: Tensor, new: int) -> tuple[Tensor, Tensor | None]:
        found = []
        for systems, rows in groups:
            there = [at for at, member in enumerate(members) if tasks[member] in rows]
            if there and tasks[new] in rows:
                joining = [*(tasks[members[at]] for at in there), tasks[new]]
                slots = neurons[:, there], scales[:, there]
                found.append(joining_distances(systems, rows, joining, *slots, method, ratios))
        if not found:  # no layer of theirs has rows to share: as bad as leaving the neuron out
            lost = sum(neuron_energy(*group, tasks[new]).cpu() for group in groups if tasks[new] in group[1])
            return lost.expand(len(neurons), -1), None
        distances = sum(d for d, _ in found)
        if len(tasks) == 2:
            distances = sum(extra, distances)
        return distances, found[0][1] if len(groups) == 1 else None  # every layer has scales of its own

    if len(tasks) < 2:
        return match.slots_of(torch.zeros(0, len(sizes), dtype=torch.int64), list(sizes), list(sizes.values()))
    formed = Forming([written[task] for task in tasks], cost).form(count, matching, partial)
    columns = torch.tensor([list(sizes).index(task) for task in tasks])
    table = torch.full((len(formed.table), len(sizes)), -1).index_copy_(1, columns, formed.table)
    scales = torch.ones(table.shape, dtype=torch.float64).index_copy_(1, columns, formed.scales)
    slots = match.slots_of(table, list(sizes), list(sizes.values()), formed.costs, scales)
    for systems, rows in groups:
        slots.energy += sum(float(neuron_energy(systems, rows, task).sum()) for task in rows)
    return slots


def neuron_energy(systems: Systems, neurons: Mapping[int, Tensor], task: int) -> Tensor:
    """Half the variance of what each neuron of a task puts out, [n], in the units of functional differences.

    Args:
        systems: of a group of layers.
        neurons: task to the rows [n, m] of each neuron.
        task: which.
    """
    part = systems.parts[task]
    return part.alpha * part.target.variance[neurons[task].to(part.target.variance.device)].sum(1) / 2


def pair_distances(systems: Systems, neurons: Mapping[int, Tensor], ratios: Sequence[float]) -> Tensor:
    """Functional differences [n, m] of the neurons of two tasks in one group of layers.

    Args:
        systems: of the group.
        neurons: task to the rows of each of its neurons, [n, k] and [m, k].
        ratios: private scales to try where rows have any.
    """
    tasks = sorted(neurons)
    table = torch.arange(len(neurons[tasks[0]]))[:, None]
    scales = torch.ones(table.shape, dtype=torch.float64)
    return joining_distances(systems, neurons, tasks, table, scales, "refit", ratios)[0]


def joining_distances(
    systems: Systems,
    neurons: Mapping[int, Tensor],
    tasks: Sequence[int],
    table: Tensor,
    scales: Tensor,
    method: str,
    given: Sequence[float] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """What it costs that a neuron of the last task joins a slot, [slots, n], and the best ratio of its scale.

    Neurons of several rows (heads) cost the sum of their rows, and their scales are not searched for.

    Args:
        systems: of the parts.
        neurons: task to the rows of each of its neurons, [n, m].
        tasks: those that share a slot already, and the one that joins.
        table: [slots, tasks - 1] neurons of every slot.
        scales: [slots, tasks - 1] private scales of its tasks.
        method, given: as in :func:`match_axis`.
    """
    parts = {task: systems.parts[task] for task in tasks}
    *members, new = tasks
    width = neurons[new].shape[1]
    rows = {task: neurons[task][table[:, at]].flatten() for at, task in enumerate(members)}
    rows[new] = neurons[new].flatten()
    rows = {task: which.to(parts[task].weight.device) for task, which in rows.items()}
    distances, ratio = _row_distances(systems, rows, scales.repeat_interleave(width, 0), method, width == 1, given)
    if width > 1:
        shape = (len(table), width, len(neurons[new]), width)
        return distances.view(shape).diagonal(dim1=1, dim2=3).sum(-1), None
    return distances, ratio


def _row_distances(
    systems: Systems,
    rows: Mapping[int, Tensor],
    scales: Tensor,
    method: str,
    scaled: bool,
    given: Sequence[float] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The same for rows: those of the tasks that share already, all of one length, and those of the last task."""
    tasks = list(rows)
    *members, new = tasks
    parts = {task: systems.parts[task] for task in tasks}
    if method == "average":
        unknown, _ = systems.of(tasks, shared_only=True)
        biased = all(part.has_bias for part in parts.values())
        mean, bias = plain_mean({t: parts[t] for t in members}, {t: rows[t] for t in members}, unknown)
        first = mean[unknown.index[new].to(mean.device)].T
        second = parts[new].weight[rows[new]][:, unknown.columns[new]]
        if biased:
            own = parts[new].bias[rows[new]]
            first, second = torch.cat([first, bias[:, None]], 1), torch.cat([second, own[:, None]], 1)
        return match.euclidean(first, second), None
    narrow = narrowed(systems, tasks) if method == "refit" else None
    if narrow is not None:
        systems = narrow.systems
        parts = systems.parts
    unknown, system = systems.of(tasks, shared_only=method == "mtz")
    alone = None
    if method == "mtz":
        weights = [parts[task].weight_of(rows[task], unknown.columns[task]) for task in tasks]
        if len(tasks) == 2:
            return match.functional_difference(system, *weights), None
        right = [side.apply(w.T.contiguous()) for side, w in zip(system.sides, weights, strict=True)]
        ratios: Sequence[float] = ()
    else:
        scalable = all(part.scalable for part in parts.values())
        folded = all(part.fold is not None for part in parts.values())  # of one scale already
        ratios = match.RATIOS if len(tasks) == 2 and not folded else match.FEW_RATIOS
        if folded and max(part.weight.shape[1] for part in parts.values()) >= ONE_SCALE_FROM:
            ratios = (1.0,)
        ratios = given or ratios
        level = _level(parts[tasks[0]], parts[new])
        ratios = tuple(level * ratio for ratio in ratios) if scalable and scaled else ()
        # Weights of rows are scales too: where scales are not searched for they would tell equal rows apart.
        right = [
            parts[task].right_hand_side(side, rows[task], unknown.columns[task], weighted=bool(ratios))
            for side, task in zip(system.sides, tasks, strict=True)
        ]
        alone = _gains_alone(parts, rows, unknown, system, right)
    if len(tasks) == 2:
        rests = None if narrow is None else narrow.rests(rows, weighted=bool(ratios))
        return match.scale_free_difference(system, right, ratios, alone, rests)
    return match.joining_difference(system, right, scales.to(right[0]), ratios)


def _level(first: Part, second: Part) -> float:
    """What the scales of two tasks' layers are to each other, which ratios of private scales are tried around.

    With ReLU that may be anything, as the next layer takes it back; behind a folded BatchNorm it is one.
    """
    if first.fold is not None and second.fold is not None:
        return 1.0
    return min(max(math.sqrt(first.alpha / second.alpha), 1 / FARTHEST), FARTHEST)


def _gains_alone(parts, rows, unknown: Unknown, system: JointSystem, right: Sequence[Tensor]) -> list[Tensor]:
    """What the rows of every side gain alone, [r] each."""
    found = []
    for at, (task, b) in enumerate(zip(rows, right, strict=True)):
        gain = parts[task].gain_alone(b, rows[task], unknown.columns[task])
        found.append(match.gain_alone(system, at, b) if gain is None else gain)
    return found


def shared_cost(
    systems: Systems, rows: Mapping[int, Tensor], ratios: Sequence[float] = match.FEW_RATIOS
) -> tuple[Tensor, Tensor]:
    """What it costs that rows are stored together, [r], and the ratio [r] of private scales that is best of a few.

    Args:
        systems: of the parts.
        rows: task to rows of its part, all of the same length.
        ratios: private scales to try where two tasks have them.
    """
    tasks = sorted(rows)
    parts = {task: systems.parts[task] for task in tasks}
    unknown, system = systems.of(tasks)
    if not system.coupled:
        nothing = system.sides[0].moment.mean.new_zeros(len(rows[tasks[0]]))
        return nothing, torch.ones_like(nothing)
    right = [
        parts[task].right_hand_side(side, rows[task], unknown.columns[task], weighted=True)
        for side, task in zip(system.sides, tasks, strict=True)
    ]
    alone = sum(_gains_alone(parts, {task: rows[task] for task in tasks}, unknown, system, right))
    right = [system.scatter(at, b) for at, b in enumerate(right)]
    scalable = all(part.scalable for part in parts.values()) and len(tasks) == 2
    best = torch.full_like(alone, -torch.inf)
    chosen = torch.ones_like(alone)
    level = _level(*parts.values()) if scalable else 1.0
    for ratio in (level * ratio for ratio in ratios) if scalable else (1.0,):
        factor = system.factor([1.0] * (len(tasks) - 1) + [ratio])
        sign = torch.ones_like(alone)
        if scalable:
            one, two, across = factor.gains(*right, paired=True)
            one, two, across = (value.to(alone) for value in (one, two, across))
            sign = torch.where(across < 0, -1.0, 1.0).to(alone)
            gain = one + ratio * ratio * two + 2 * ratio * across.abs()
        else:
            total = sum(right)
            gain = factor.gain(total)
        chosen = torch.where(gain > best, ratio * sign, chosen)
        best = torch.maximum(best, gain)
    return (alone - best).clamp_min(0) / 2, chosen
