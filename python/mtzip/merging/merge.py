"""Merging one group of corresponding layers: match its axis, solve for the rows, install them as blocks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import mtz_ext

from ..network.layout import Run
from ..trace.analysis import Analysis, Layer
from . import match
from .columns import Unknown, unknown_columns
from .match import Slots
from .moments import Moment, Target, View, cross_moment
from .solve import JointSystem, Side, joint_rows

#: Alternations of rows and scales beyond the grid of ratios, for fully connected layers: they pay where no BatchNorm or
#: activation-aware substitution follows.
SCALE_SWEEPS = 2


@dataclass
class Part:
    """One task's layer as the merge sees it.

    Args:
        task: index.
        layer: the traced layer.
        view: how its weight is a matrix.
        analysis: of its network.
        moment: of what it reads in the zipped network, columns in stored order.
        target: what it should output: the original's pre-activation, in stored row order once the axis is matched.
        weight: [r, d] float64, columns in stored order, BatchNorm folded in.
        bias: [r] float64, zeros without one.
        columns: runs of its columns, in units of weight dimension 1.
        damping: relative.
        normalised: whether the task is weighted by its output variance.
        weighting: [r] factor on a row's target and weight in a joint fit, so that rows that matter more to this task
            count more; its private scale takes the factor away again. None for none.
        fold: ([r], [r]) scale and shift of the BatchNorm that was folded into target, weight and bias; None for none.
        order: [r] stored order of the rows, None as long as it is the network's own.
        plain_target: the target before any activation-aware substitution, None as long as there was none.
        constant: "free" where a bias of the task's own, or a BatchNorm, takes any constant of its rows; "shared" where
            one bias serves all tasks; "none" where there is none.
        scalable: whether the task keeps a scale of its own for every row.
        takes_bias: whether its leaf may get a bias that the layer had not.
        unchanged: whether the target is what the weight puts out itself on the moment's inputs, as while planning.
    """

    task: int
    layer: Layer
    view: View
    analysis: Analysis
    moment: Moment
    target: Target
    weight: Tensor
    bias: Tensor
    columns: tuple[Run, ...]
    damping: float
    normalised: bool = True
    weighting: Tensor | None = None
    fold: tuple[Tensor, Tensor] | None = None
    order: Tensor | None = None
    plain_target: Target | None = None
    constant: str = "free"
    scalable: bool = False
    takes_bias: bool = True
    unchanged: bool = False

    @property
    def has_bias(self) -> bool:
        return self.layer.bias is not None

    @property
    def alpha(self) -> float:
        """Weight of the task: one over the mean variance of the target, which makes tasks and layers comparable.

        The method of the paper weighs tasks equally: its merged weight has one scale for all tasks, and a task of small
        scale would else pull the others down to it.
        """
        if not self.normalised:
            return 1.0
        variances = (self.plain_target or self.target).variance
        variance = float((variances if self.weighting is None else variances * self.weighting.square()).mean())
        size = float(self.target.mean.square().mean())
        return 1.0 / variance if variance > 1e-20 * size + 1e-60 else 1.0  # rounding of a constant is no variance

    @property
    def place(self) -> tuple[str, tuple[str, str]]:
        """Path of the module that owns the weight, and the names of its weight and bias there."""
        return place_of(self.layer)

    @property
    def inner(self) -> int:
        """Columns per unit of a run."""
        return math.prod(self.layer.kernel)

    def reorder_rows(self, order: Tensor, weights: bool = True) -> None:
        """Brings the target, and the weights unless they are, into stored order."""
        order = order.to(self.weight.device)
        if weights:
            self.weight, self.bias = self.weight[order], self.bias[order]
        t = self.target
        cross = None if t.cross is None else t.cross[:, order]
        samples = None if t.samples is None else t.samples[:, order]
        self.target = Target(t.mean[order], t.variance[order], cross, samples)
        self.weighting = None if self.weighting is None else self.weighting[order]
        self.fold = None if self.fold is None else (self.fold[0][order], self.fold[1][order])
        self.order = order

    def original_output(self, z: Tensor) -> Tensor:
        """A chunk of the original layer's output in stored order, BatchNorm applied."""
        channel = -1 if self.layer.kind == "linear" else 1
        z = z if self.order is None else z.index_select(channel, self.order)
        if self.fold is None:
            return z
        shape = [1] * z.dim()
        shape[channel] = -1
        scale, shift = (value.to(z.dtype).view(shape) for value in self.fold)
        return z * scale + shift

    def moment_of(self, columns: Tensor) -> Moment:
        """Moment of some columns: centred where the constant is free, else about zero; a shared bias is one more."""
        chosen = self.moment.select(columns)
        return chosen if self.constant == "free" else chosen.raw(self.constant == "shared")

    def weight_of(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Weights of some rows over some columns, [r, d]; a shared bias is one more column."""
        weight = self.weight[rows][:, columns]
        return torch.cat([weight, self.bias[rows][:, None]], 1) if self.constant == "shared" else weight

    def gain_alone(self, right: Tensor, rows: Tensor, columns: Tensor) -> Tensor | None:
        """What some rows gain alone over all columns, b^T Q^-1 b: w^T b where b is Q w. None where it is not."""
        if not self.unchanged or len(columns) < self.weight.shape[1]:
            return None
        return (self.weight_of(rows, columns).T * right).sum(0)

    def right_hand_side(self, side: Side, rows: Tensor, columns: Tensor, weighted: bool) -> Tensor:
        """b of some rows over some columns, [d, r], the rows weighted by how much they matter if ``weighted``."""
        cross = cross_moment(self.moment, self.target, rows)[columns]
        mean = self.target.mean[rows]
        if self.constant != "free":
            cross = cross + torch.outer(self.moment.mean[columns], mean)
        if self.constant == "shared":
            cross = torch.cat([cross, mean[None]])
        right = side.right_hand_side(cross, self.weight_of(rows, columns))
        return right * self.weighting[rows] if weighted and self.weighting is not None else right


def place_of(layer: Layer) -> tuple[str, tuple[str, str]]:
    """Path of the module that owns a layer's weight, and the names of its weight and bias there."""
    owner, _, name = layer.weight.rpartition(".")
    default = name.replace("weight", "bias") if "weight" in name else "bias"
    return owner, (name, default if layer.bias is None else layer.bias.rpartition(".")[2])


def settle(parts: Mapping[int, Part], affine: bool) -> None:
    """Decides where the rows of a group get their constants and scales from.

    Args:
        parts: of all tasks of the group.
        affine: whether tasks keep a private scale and shift where no BatchNorm follows.
    """
    bare = [part for part in parts.values() if part.layer.norm is None]
    shared = not affine and len(bare) == len(parts) and all(part.has_bias for part in bare)
    for part in parts.values():
        norm = part.layer.norm
        part.scalable = affine if norm is None else norm.weight is not None
        if norm is None:
            free = part.has_bias or (affine and part.takes_bias)
            part.constant = "shared" if shared else "free" if free else "none"


def positions(runs: Sequence[Run], tasks: tuple[int, ...], device: torch.device) -> Tensor:
    """Positions of the neurons stored by exactly ``tasks``, ascending."""
    start, parts = 0, [torch.zeros(0, dtype=torch.int64, device=device)]
    for run in runs:
        if run.tasks == tasks:
            parts.append(torch.arange(start, start + run.size, device=device))
        start += run.size
    return torch.cat(parts)


class Systems:
    """The joint systems of one group of layers, by the tasks that share: matching and every solve use the same."""

    def __init__(self, parts: Mapping[int, Part]):
        self.parts = parts
        self._known: dict[tuple[int, ...], tuple[Unknown, JointSystem]] = {}

    def of(self, members: Sequence[int], shared_only: bool = False) -> tuple[Unknown, JointSystem]:
        """Layout of the unknown and system of rows that ``members`` store together.

        Args:
            members: task indices.
            shared_only: leave out columns that one task alone has.
        """
        key = (*members, shared_only)
        if key not in self._known:
            parts = {task: self.parts[task] for task in members}
            runs = {task: part.columns for task, part in parts.items()}
            unknown = unknown_columns(runs, members, parts[members[0]].inner, shared_only)
            self._known[key] = unknown, build_system(parts, unknown)
        return self._known[key]

    @property
    def escalation(self) -> float:
        """Largest factor by which the damping of any of them had to grow."""
        return max((system.escalation for _, system in self._known.values()), default=1.0)


def build_system(parts: Mapping[int, Part], unknown: Unknown) -> JointSystem:
    """The joint system of some parts over the columns of ``unknown``; a shared bias is one more behind them."""
    sides = []
    shared = False
    for task, index in unknown.index.items():
        part = parts[task]
        moment = part.moment_of(unknown.columns[task])
        if part.constant == "shared":
            shared, index = True, torch.cat([index, torch.tensor([unknown.size])])
        sides.append(Side(moment, index.to(moment.mean.device), part.alpha, part.damping * _energy(moment)))
    return JointSystem(sides, unknown.size + shared)


def _energy(moment: Moment) -> float:
    """Mean variance of the columns; where none varies, a number so large that weights stay as they are."""
    if not len(moment.mean):
        return 1.0
    energy, size = float(moment.diagonal().mean()), float(moment.mean.square().mean())
    return energy if energy > 1e-12 * size else max(1e3 * size, 1.0)


# -- matching ------------------------------------------------------------------------------------------------------


def match_axis(
    groups: Sequence[tuple[Systems, Mapping[int, Tensor]]],
    count: int,
    method: str,
    matching: str,
    extra: Sequence[Tensor] = (),
    ratios: Sequence[float] | None = None,
) -> Slots:
    """Matches the neurons of an axis that several tasks' layers write and keeps ``count`` slots that all of them share.

    The first two tasks are matched with each other, every further one onto the slots there are.

    Args:
        groups: for every group of layers that writes the axis its systems, and task to the rows [n, m] that each neuron
            has in its part, in the network's own order. Their differences are added up.
        count: slots.
        method: "average" (Euclidean distance), "mtz" (functional difference) or "refit" (the same with private scales).
        matching: "optimal" or "greedy".
        extra: further costs [n, m] of pairing neurons of two tasks.
        ratios: private scales to try where rows have any, None for as many as pay.
    """
    neurons = groups[0][1]
    tasks = sorted(neurons)
    table = torch.arange(len(neurons[tasks[0]]))[:, None]
    scales = torch.ones(table.shape, dtype=torch.float64)
    costs = torch.zeros(len(table), dtype=torch.float64)
    for at in range(1, len(tasks)):
        found = [
            joining_distances(systems, rows, tasks[: at + 1], table, scales, method, ratios) for systems, rows in groups
        ]
        distances = sum(d for d, _ in found)
        if at == 1 and len(tasks) == 2:
            distances = sum(extra, distances)
        ratio = found[0][1] if len(found) == 1 else None  # every layer has scales of its own
        pairs = mtz_ext.match_neurons(distances, count, method=matching)
        slots, joining = pairs.cpu().unbind(1)
        costs = costs[slots] + distances[pairs[:, 0], pairs[:, 1]].cpu().double()
        new = (
            torch.ones(count, dtype=torch.float64) if ratio is None else ratio[pairs[:, 0], pairs[:, 1]].cpu().double()
        )
        table = torch.cat([table[slots], joining[:, None]], 1)
        scales = torch.cat([scales[slots], new[:, None]], 1)
    slots = match.slots_of(table, tasks, [len(neurons[task]) for task in tasks], costs, scales)
    for systems, rows in groups:
        for task, part in systems.parts.items():
            slots.energy += part.alpha * float(part.target.variance[rows[task].flatten()].sum()) / 2
    return slots


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
        mean, bias = _average({t: parts[t] for t in members}, {t: rows[t] for t in members}, unknown)
        first = mean[unknown.index[new].to(mean.device)].T
        second = parts[new].weight[rows[new]][:, unknown.columns[new]]
        if biased:
            own = parts[new].bias[rows[new]]
            first, second = torch.cat([first, bias[:, None]], 1), torch.cat([second, own[:, None]], 1)
        return match.euclidean(first, second), None
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
        many = len(tasks) == 2 and not folded
        ratios = given or (match.RATIOS if many else match.FEW_RATIOS)
        # Around what the tasks' scales are to each other: with ReLU that is anything, as the next layer takes it back.
        level = 1.0 if folded else math.sqrt(parts[tasks[0]].alpha / parts[new].alpha)
        ratios = tuple(level * ratio for ratio in ratios) if scalable and scaled else ()
        # Weights of rows are scales too: where scales are not searched for they would tell equal rows apart.
        right = [
            parts[task].right_hand_side(side, rows[task], unknown.columns[task], weighted=bool(ratios))
            for side, task in zip(system.sides, tasks, strict=True)
        ]
        alone = _gains_alone(parts, rows, unknown, system, right)
    if len(tasks) == 2:
        return match.scale_free_difference(system, right, ratios, alone)
    return match.joining_difference(system, right, scales.to(right[0]), ratios)


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
    for ratio in ratios if scalable else (1.0,):
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


# -- rows ----------------------------------------------------------------------------------------------------------


@dataclass
class Rows:
    """Solved rows of one run of one task: weight [r, d], private scale [r], bias [r]."""

    weight: Tensor
    scale: Tensor
    bias: Tensor


def solve_rows(
    systems: Systems, rows: Mapping[int, Tensor], starts: Mapping[int, Tensor] | None, method: str
) -> tuple[Unknown, Tensor, dict[int, Rows]]:
    """Solves for rows that the tasks of ``rows`` store together (one task: private rows).

    Args:
        systems: of parts with rows in stored order.
        rows: task index to the positions of these rows, all of the same length.
        starts: task to the private scale [r] of every row of its part that matching found.
        method: "average", "mtz" or "refit".

    Returns:
        The unknown's layout, theta [unknown.size, r], and the rows each task ends with.
    """
    members = sorted(rows)
    parts = {task: systems.parts[task] for task in members}
    unknown, system = systems.of(members)
    if method == "refit":
        theta, scales = _refit(parts, rows, unknown, system, starts)
    else:
        theta, bias = _average(parts, rows, unknown)
        if method == "mtz" and len(members) > 1:
            theta, bias = _merge_closed_form(systems, rows, unknown, theta, bias)
        scales = {task: torch.ones_like(bias) for task in members}
    solved = {}
    for task in members:
        part = parts[task]
        own = theta[unknown.index[task].to(theta.device)]
        full = theta.new_zeros(part.weight.shape[1], theta.shape[1])
        full[unknown.columns[task]] = own
        if part.constant == "none":
            constant = torch.zeros_like(scales[task])
        elif part.constant == "shared":
            constant = theta[-1] if method == "refit" else bias
        elif method != "refit" and (method == "average" or len(members) == 1):
            constant = part.bias[rows[task]]
        else:
            constant = part.target.mean[rows[task]] - scales[task] * (part.moment.mean[unknown.columns[task]] @ own)
        solved[task] = Rows(full.T, scales[task], constant)
    return unknown, theta, solved


def _average(parts, rows, unknown: Unknown) -> tuple[Tensor, Tensor]:
    """Plain mean of what several tasks have."""
    any_part = next(iter(parts.values()))
    theta = any_part.weight.new_zeros(unknown.size, len(next(iter(rows.values()))))
    count = theta.new_zeros(unknown.size, 1)
    for task, part in parts.items():
        index = unknown.index[task].to(theta.device)
        theta.index_add_(0, index, part.weight[rows[task]][:, unknown.columns[task]].T)
        count.index_add_(0, index, torch.ones(len(index), 1, dtype=theta.dtype, device=theta.device))
    bias = sum(part.bias[rows[task]] for task, part in parts.items()) / len(parts)
    return theta / count, bias


def _merge_closed_form(
    systems: Systems, rows: Mapping[int, Tensor], unknown: Unknown, theta: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """m = (sum Q)^-1 sum Q w over the shared columns and a shared bias (He, Zhou, Thiele 2018, eq. 5), any tasks.

    Args:
        systems, rows, unknown: as in :func:`solve_rows`.
        theta, bias: the plain mean, which gives the columns of one task alone.
    """
    members = sorted(rows)
    shared, system = systems.of(members, shared_only=True)
    if not system.size:
        return theta, bias
    right = []
    for task, side in zip(members, system.sides, strict=True):
        right.append(side.apply(systems.parts[task].weight_of(rows[task], shared.columns[task]).T.contiguous()))
    merged, _ = joint_rows(system, right)
    for tasks, where in shared.blocks.items():
        theta[unknown.blocks[tasks]] = merged[where]
    return theta, merged[-1] if system.size > shared.size else bias


def _refit(parts, rows, unknown: Unknown, system: JointSystem, starts: Mapping[int, Tensor] | None):
    """Joint least squares onto the originals' outputs; private scales, where all tasks have them, by alternation."""
    members = sorted(parts)
    joint = len(members) > 1 and all(part.scalable for part in parts.values())
    right = [
        parts[task].right_hand_side(side, rows[task], unknown.columns[task], weighted=joint)
        for side, task in zip(system.sides, members, strict=True)
    ]
    start = [starts[task].to(right[0])[rows[task]] for task in members] if joint else None
    sweeps = SCALE_SWEEPS if parts[members[0]].layer.kind == "linear" else 0
    # Behind a BatchNorm the scale is its affine's, which is fitted later.
    fit = any(part.layer.norm is None for part in parts.values())
    theta, fitted = joint_rows(system, right, start, sweeps=sweeps, fit=fit)
    scales = {}
    for at, task in enumerate(members):
        weighting = parts[task].weighting if joint else None
        scales[task] = fitted[at] if weighting is None else fitted[at] / weighting[rows[task]]
    return theta, scales
