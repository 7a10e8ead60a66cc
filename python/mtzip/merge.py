"""Merging one group of corresponding layers: match its axis, solve for the rows, install them as blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import mtz_ext
import torch
from torch import Tensor, nn

from . import match
from .columns import Unknown, unknown_columns
from .match import Slots
from .moments import Moment, Target, cross_moment
from .norms import refit_norm_
from .share import LEAVES, Layout, Run, SharedLayer, block_name, replace_module
from .solve import JointSystem, Side, joint_rows
from .trace.analysis import Analysis, Layer


@dataclass
class Part:
    """One task's layer as the merge sees it.

    Args:
        task: index.
        layer: the traced layer.
        analysis: of its network.
        moment: of what it reads in the zipped network, columns in stored order.
        target: what it should output: the original's pre-activation, in stored row order once the axis is matched.
        weight: [r, d] float64, columns in stored order, BatchNorm folded in.
        bias: [r] float64, zeros without one.
        columns: runs of its columns, in units of weight dimension 1.
        damping: relative.
    """

    task: int
    layer: Layer
    analysis: Analysis
    moment: Moment
    target: Target
    weight: Tensor
    bias: Tensor
    columns: tuple[Run, ...]
    damping: float

    @property
    def has_bias(self) -> bool:
        return self.layer.bias is not None

    @property
    def alpha(self) -> float:
        """One over the mean variance of the target: makes tasks and layers comparable."""
        variance = float(self.target.variance.mean())
        return 1.0 / variance if variance > 0 else 1.0

    @property
    def inner(self) -> int:
        """Columns per unit of a run."""
        return int(torch.tensor(self.layer.kernel).prod()) if self.layer.kernel else 1

    def reorder_rows(self, order: Tensor) -> None:
        """Brings rows and target into stored order."""
        order = order.to(self.weight.device)
        self.weight, self.bias = self.weight[order], self.bias[order]
        t = self.target
        cross = None if t.cross is None else t.cross[:, order]
        samples = None if t.samples is None else t.samples[:, order]
        self.target = Target(t.mean[order], t.variance[order], cross, samples)

    def old_cross(self, rows: Tensor) -> Tensor:
        """Covariance of the input with what the old weights make of it, [d, r]."""
        return self.moment.times(self.weight[rows])


def build_system(parts: Mapping[int, Part], unknown: Unknown, moments: Mapping[int, Moment]) -> JointSystem:
    """The joint system of some parts over the columns of ``unknown``; ``moments`` are those of its columns."""
    sides = []
    for task, index in unknown.index.items():
        part, moment = parts[task], moments[task]
        damping = part.damping * float(moment.diagonal().mean()) if len(index) else 0.0
        damping = damping or torch.finfo(torch.float64).tiny ** 0.5
        sides.append(Side(moment, index.to(moment.mean.device), part.alpha, damping))
    return JointSystem(sides, unknown.size)


# -- matching ------------------------------------------------------------------------------------------------------


def match_axis(parts: Mapping[int, Part], count: int, method: str, matching: str) -> Slots:
    """Matches the rows of two tasks' layers and keeps ``count`` pairs.

    Args:
        parts: task index to part, two of them, rows in the networks' own order.
        count: pairs.
        method: "average" (Euclidean distance), "mtz" (functional difference) or "refit" (the same with private scales).
        matching: "optimal" or "greedy".
    """
    first, second = sorted(parts)
    a, b = parts[first], parts[second]
    sizes = (len(a.weight), len(b.weight))
    ratio = None
    unknown = unknown_columns({t: p.columns for t, p in parts.items()}, (first, second), a.inner)
    if method == "refit":
        moments = {task: part.moment.select(unknown.columns[task]) for task, part in parts.items()}
        system = build_system(parts, unknown, moments)
        right = []
        for side, part in zip(system.sides, (a, b), strict=True):
            every = torch.arange(len(part.weight), device=part.weight.device)
            columns = unknown.columns[part.task]
            right.append(side.right_hand_side(cross_moment(part.moment, part.target, every)[columns], part.weight[:, columns]))
        distances, ratio = match.scale_free_difference(system, right)
    else:
        unknown = unknown_columns({t: p.columns for t, p in parts.items()}, (first, second), a.inner, shared_only=True)
        rows = {task: part.weight[:, unknown.columns[task]] for task, part in parts.items()}
        if method == "average":
            biased = a.has_bias and b.has_bias
            rows = {t: torch.cat([rows[t], parts[t].bias[:, None]], 1) if biased else rows[t] for t in rows}
            distances = match.euclidean(rows[first], rows[second])
        else:
            system, rows = _shared_bias_system(parts, unknown)
            distances = match.functional_difference(system, rows[first], rows[second])
    pairs = mtz_ext.match_neurons(distances, count, method=matching)
    chosen = distances[pairs[:, 0], pairs[:, 1]]
    scales = None
    if ratio is not None:
        r = ratio[pairs[:, 0], pairs[:, 1]]
        scales = torch.stack([torch.ones_like(r), r], 1)
    return match.slots_from_pairs(pairs, sizes, float(chosen.sum()), scales)


def _shared_bias_system(parts: Mapping[int, Part], unknown: Unknown) -> tuple[JointSystem, dict[int, Tensor]]:
    """System and rows of the method of the paper: the bias is one more shared column, unless a BatchNorm follows."""
    if all(part.layer.norm is not None for part in parts.values()):
        moments = {task: part.moment.select(unknown.columns[task]) for task, part in parts.items()}
        return build_system(parts, unknown, moments), {t: p.weight[:, unknown.columns[t]] for t, p in parts.items()}
    biased = all(part.has_bias for part in parts.values())
    moments, rows, index = {}, {}, {}
    for task, part in parts.items():
        moments[task] = part.moment.select(unknown.columns[task]).raw(biased)
        chosen = part.weight[:, unknown.columns[task]]
        rows[task] = torch.cat([chosen, part.bias[:, None]], 1) if biased else chosen
        extra = torch.full((int(biased),), unknown.size, dtype=torch.int64)
        index[task] = torch.cat([unknown.index[task], extra])
    widened = Unknown(unknown.size + int(biased), index, unknown.blocks, unknown.columns)
    return build_system(parts, widened, moments), rows


# -- rows ----------------------------------------------------------------------------------------------------------


@dataclass
class Rows:
    """Solved rows of one run of one task: weight [r, d], private scale [r], bias [r]."""

    weight: Tensor
    scale: Tensor
    bias: Tensor


def solve_rows(
    parts: Mapping[int, Part], rows: Mapping[int, Tensor], slots: Slots | None, method: str, affine: bool
) -> tuple[Unknown, Tensor, dict[int, Rows]]:
    """Solves for rows that the tasks of ``rows`` store together (one task: private rows).

    Args:
        parts: task index to part, rows in stored order.
        rows: task index to the positions of these rows, all of the same length.
        slots: how the axis is stored, for the scales matching found.
        method: "average", "mtz" or "refit".
        affine: whether tasks keep a private scale and shift.

    Returns:
        The unknown's layout, theta [unknown.size, r], and the rows each task ends with.
    """
    members = sorted(rows)
    parts = {task: parts[task] for task in members}
    inner = parts[members[0]].inner
    runs = {task: part.columns for task, part in parts.items()}
    unknown = unknown_columns(runs, members, inner)
    if method == "average":
        theta, bias = _average(parts, rows, unknown)
        scales = {task: torch.ones_like(bias) for task in members}
        biases = {task: bias for task in members}
    elif method == "mtz":
        theta, bias = _merge_closed_form(parts, rows, unknown)
        scales = {task: torch.ones_like(bias) for task in members}
        biases = {task: bias for task in members}
    else:
        theta, scales, biases = _refit(parts, rows, unknown, slots, affine)
    solved = {}
    for task in members:
        full = theta.new_zeros(parts[task].weight.shape[1], theta.shape[1])
        full[unknown.columns[task]] = theta[unknown.index[task].to(theta.device)]
        solved[task] = Rows(full.T, scales[task], biases[task])
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


def _merge_closed_form(parts, rows, unknown: Unknown) -> tuple[Tensor, Tensor]:
    """m = (sum Q)^-1 sum Q w over the shared columns and the bias (He, Zhou, Thiele 2018, eq. 5, any number of tasks)."""
    members = sorted(parts)
    theta, bias = _average(parts, rows, unknown)
    if len(members) == 1:
        return theta, bias
    inner = parts[members[0]].inner
    shared = unknown_columns({t: p.columns for t, p in parts.items()}, members, inner, shared_only=True)
    if not shared.size:
        return theta, bias
    system, wide = _shared_bias_system(parts, shared)
    right = [side.apply(wide[task][rows[task]].T.contiguous()) for task, side in zip(members, system.sides, strict=True)]
    merged, _ = joint_rows(system, right)
    for tasks, where in shared.blocks.items():
        theta[unknown.blocks[tasks]] = merged[where]
    return theta, merged[-1] if system.size > shared.size else bias


def _refit(parts, rows, unknown: Unknown, slots: Slots | None, affine: bool):
    """Joint least squares onto the originals' outputs, private scale by alternation, private shift from the means."""
    members = sorted(parts)
    moments = {task: part.moment.select(unknown.columns[task]) for task, part in parts.items()}
    system = build_system(parts, unknown, moments)
    right = []
    for side, task in zip(system.sides, members, strict=True):
        part, columns = parts[task], unknown.columns[task]
        cross = cross_moment(part.moment, part.target, rows[task])[columns]
        right.append(side.right_hand_side(cross, part.weight[rows[task]][:, columns]))
    start = None
    if affine and len(members) > 1:
        start = [torch.ones_like(right[0][0]) if slots is None else slots.scale(t).to(right[0])[rows[t]] for t in members]
    theta, fitted = joint_rows(system, right, start)
    scales = dict(zip(members, fitted, strict=True))
    biases = {}
    for at, task in enumerate(members):
        part = parts[task]
        own = system.gather(at, theta)
        biases[task] = part.target.mean[rows[task]] - scales[task] * (part.moment.mean[unknown.columns[task]] @ own)
    return theta, scales, biases


# -- installing ----------------------------------------------------------------------------------------------------


def install_shared(
    group: Mapping[int, Part],
    networks: list[nn.Module],
    runs: Mapping[int, tuple[Run, ...]],
    solved: Mapping[tuple[int, ...], tuple[Unknown, Tensor, dict[int, Rows]]],
    private_affine: bool,
    set_network: Callable[[int, nn.Module], None],
) -> None:
    """Replaces the layers of a group by leaves whose blocks are shared.

    Args:
        group: task index to part.
        networks: the networks being zipped, by task index.
        runs: task index to the runs of its rows.
        solved: tasks that store rows together to what :func:`solve_rows` returned.
        private_affine: whether tasks without a BatchNorm keep a private scale and shift.
        set_network: called with (task, network) where the layer was the whole network.
    """
    parameters: dict[tuple, nn.Parameter] = {}
    for task, part in group.items():
        module = networks[task].get_submodule(part.layer.path)
        leaf_class: type[SharedLayer] = LEAVES[type(module)]
        kernel = part.layer.kernel
        dtype, device = module.weight.dtype, module.weight.device
        private_shift = private_affine and part.layer.norm is None
        row_runs = merge_runs_of(runs[task])
        whole = (Run((task,), sum(run.size for run in row_runs)),)
        has_bias = part.has_bias or private_shift
        bias_runs = None if not has_bias else whole if private_shift else row_runs
        scaled = sum(run.size for run in row_runs if len(run.tasks) > 1) if private_shift else 0
        layout = Layout(task, row_runs, part.columns, bias_runs, scaled)
        blocks: dict[str, nn.Parameter] = {}

        def parameter(key: tuple, value: Callable[[], Tensor], trainable: bool, dtype=dtype, device=device) -> nn.Parameter:
            if key not in parameters:
                parameters[key] = nn.Parameter(value().to(dtype=dtype, device=device).contiguous(), trainable)
            return parameters[key]

        trainable = module.weight.requires_grad
        for run in row_runs:
            unknown, theta, _ = solved[run.tasks]
            for tasks, where in unknown.blocks.items():
                if task in tasks:
                    shape = (run.size, -1, *kernel)
                    value = lambda theta=theta, where=where, shape=shape: theta[where].T.reshape(shape)  # noqa: E731
                    blocks[block_name(run, Run(tasks, 0))] = parameter((run.tasks, tasks), value, trainable)
        if has_bias:
            value = torch.cat([solved[run.tasks][2][task].bias for run in row_runs])
            if part.layer.norm is not None:
                value = torch.zeros_like(value)  # the BatchNorm behind takes any constant away
            start = 0
            for run, name in zip(bias_runs, layout.bias_blocks(), strict=True):
                piece = value[start : start + run.size]
                blocks[name] = parameter(("bias", run.tasks), lambda piece=piece: piece, trainable)
                start += run.size
        if scaled:
            scale = torch.cat([solved[run.tasks][2][task].scale for run in row_runs])[:scaled]
            blocks["scale"] = parameter(("scale", task), lambda scale=scale: scale, trainable)
        leaf = leaf_class.wrap(module, layout, {name: blocks[name] for name in _names(layout)})
        set_network(task, replace_module(networks[task], module, leaf))


def merge_runs_of(runs: tuple[Run, ...]) -> tuple[Run, ...]:
    """The runs, checked: one run for each set of tasks."""
    if len({run.tasks for run in runs}) != len(runs):
        raise NotImplementedError("rows of the same tasks must be consecutive")
    return runs


def _names(layout: Layout) -> list[str]:
    return [*layout.weight_blocks(), *layout.bias_blocks(), *(["scale"] if layout.scaled else [])]


def install_private(part: Part, network: nn.Module, solved: Rows) -> None:
    """Writes refitted rows into a layer that stays private."""
    with torch.no_grad():
        weight = part.analysis.exported.tensor(part.layer.weight, network)
        weight.copy_((solved.weight * solved.scale[:, None]).view_as(weight))
        if part.layer.bias is not None:
            part.analysis.exported.tensor(part.layer.bias, network).copy_(solved.bias)


def fit_following_norm(part: Part, network: nn.Module, rows: Rows, target: Target) -> None:
    """Statistics and affine of the BatchNorm behind a layer, from moments alone: no pass over the data.

    Args:
        part: the layer.
        network: the network being zipped.
        rows: all rows of the layer in stored order; their bias is not part of the output.
        target: what the BatchNorm should output.
    """
    mean = rows.weight @ part.moment.mean
    variance = part.moment.variance(rows.weight)
    every = torch.arange(len(rows.weight), device=rows.weight.device)
    cross = cross_moment(part.moment, target, every)
    slope = (rows.weight * cross.T).sum(1) / torch.where(variance > 0, variance, torch.ones_like(variance))
    refit_norm_(part.analysis, part.layer.norm, network, mean, variance, slope, target.mean)


def relative_error(part: Part, rows: Rows, with_norm: bool) -> float:
    """Mean squared error of the rows' output relative to the variance of the target."""
    every = torch.arange(len(rows.weight), device=rows.weight.device)
    variance = part.moment.variance(rows.weight)
    product = (rows.weight * cross_moment(part.moment, part.target, every).T).sum(1)
    if with_norm:  # the BatchNorm's affine is the best scale
        error = part.target.variance - product.square() / torch.where(variance > 0, variance, torch.ones_like(variance))
    else:
        shift = rows.scale * (rows.weight @ part.moment.mean) + rows.bias - part.target.mean
        error = rows.scale.square() * variance - 2 * rows.scale * product + part.target.variance + shift.square()
    total = float(part.target.variance.sum())
    return max(float(error.sum()), 0.0) / total if total > 0 else 0.0
