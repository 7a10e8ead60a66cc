"""A layer of one task as the merge sees it, and the joint systems of those that answer to each other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..network.layout import Run
from ..trace.analysis import Analysis, Layer
from .columns import Unknown, unknown_columns
from .moments import Moment, Target, View, cross_moment, is_whole
from .solve import JointSystem, Side


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
        support: [r, d] where the original's weight is not zero, in stored order; None where zeros need not be kept.
        counted: whether rows that tasks share may have no more weights than the task with most.
        coordinates: [r, n] of the weight's rows over what few samples span (narrow.py); None where nobody asked.
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
    support: Tensor | None = None
    counted: bool = False
    coordinates: Tensor | None = None

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

    def note_zeros(self, weight: Tensor, keep: bool | str) -> None:
        """Notes where a weight [r, d], no BatchNorm folded in, is zero, as far as that is to be kept."""
        self.support = weight != 0 if keep else None
        self.counted = keep == "count"

    def reorder_rows(self, order: Tensor, weights: bool = True) -> None:
        """Brings the target, and the weights unless they are, into stored order."""
        order = order.to(self.weight.device)
        if weights:
            self.weight, self.bias = self.weight[order], self.bias[order]
            self.support = None if self.support is None else self.support[order]
            self.coordinates = None if self.coordinates is None else self.coordinates[order]
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
        weight = self.weight if is_whole(rows, len(self.weight)) else self.weight[rows]
        weight = weight if is_whole(columns, weight.shape[1]) else weight[:, columns]
        return torch.cat([weight, self.bias[rows][:, None]], 1) if self.constant == "shared" else weight

    def gain_alone(self, right: Tensor, rows: Tensor, columns: Tensor) -> Tensor | None:
        """What some rows gain alone over all columns, b^T Q^-1 b: w^T b where b is Q w. None where it is not."""
        if not self.unchanged or len(columns) < self.weight.shape[1]:
            return None
        return (self.weight_of(rows, columns).T * right).sum(0)

    def right_hand_side(self, side: Side, rows: Tensor, columns: Tensor, weighted: bool) -> Tensor:
        """b of some rows over some columns, [d, r], the rows weighted by how much they matter if ``weighted``."""
        cross = cross_moment(self.moment, self.target, rows)
        cross = cross if is_whole(columns, len(cross)) else cross[columns]
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
        self.narrow: dict[tuple[int, ...], Any] = {}  # tasks to the narrow form (narrow.py) of what they store together

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
        sides.append(Side(moment, index.to(moment.mean.device), part.alpha, part.damping * column_energy(moment)))
    return JointSystem(sides, unknown.size + shared)


def column_energy(moment: Moment) -> float:
    """Mean variance of the columns; where none varies, a number so large that weights stay as they are."""
    if not len(moment.mean):
        return 1.0
    energy, size = float(moment.diagonal().mean()), float(moment.mean.square().mean())
    return energy if energy > 1e-12 * size else max(1e3 * size, 1.0)


def plain_mean(parts, rows, unknown: Unknown) -> tuple[Tensor, Tensor]:
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
