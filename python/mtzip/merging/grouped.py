"""Convolutions with groups, depthwise ones among them: every group has a small second moment of its own.

Groups are shared as wholes, each row of a group reading the columns of its group only. So instead of one system there
is one for every shared group, solved together as a batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mtz_ext

from ..distributed import total
from ..memory import MOMENT_SAMPLES
from ..network.layout import Run
from ..trace.analysis import Analysis, Layer
from ..trace.correspond import AxisGroup
from .columns import Unknown, axis_rows
from .execute import Execution
from .install import Outputs
from .merge import Rows
from .moments import Moment, Target, View, at_least_float32, enough, heads
from .norms import folded_affine
from .options import Options
from .part import Part
from .restricted import fewer_weights, support_of
from .solve import automatic_damping


@dataclass
class GroupedPart(Part):
    """A :class:`~mtzip.merging.part.Part` whose weight is [r, d] with the d columns of each row's group.

    ``moment.mean`` is [g, d], ``moment.covariance`` [g, d, d], ``target.cross`` [g, d, r / g], all in stored
    order, as what the layer reads is.
    """

    @property
    def rows_of_a_group(self) -> int:
        return len(self.weight) // len(self.moment.mean)

    def outputs(self, rows: Rows) -> Outputs:
        """What solved rows put out, without their private scale."""
        weight = self.by_group(rows.weight)
        variance = ((weight @ self.moment.covariance) * weight).sum(2).flatten()
        product = (weight * self.target.cross.mT).sum(2).flatten()
        return Outputs.from_moments((weight @ self.moment.mean[:, :, None]).flatten(), variance, product)

    def by_group(self, rows: Tensor) -> Tensor:
        """Rows [r, d] as [g, r / g, d]."""
        return rows.view(len(self.moment.mean), -1, rows.shape[1])


def grouped_moments(
    view: View, groups: int, inputs: Sequence[Tensor], targets: Sequence[Tensor]
) -> tuple[Moment, Target]:
    """Moments of every group of a Conv1d or Conv2d: see :class:`GroupedPart` for the shapes."""
    if len(view.kernel) == 1:  # as an image of one row
        settings = {name: (neutral, *view.settings[name]) for name, neutral in _NEUTRAL.items()}
        padded = view.settings.get("total_padding")
        settings |= {} if padded is None else {"total_padding": [0, *padded]}
        inputs, targets = [x.unsqueeze(2) for x in inputs], [z.unsqueeze(2) for z in targets]
        view = View("conv2d", (1, *view.kernel), settings)
    inputs, targets = [at_least_float32(x) for x in inputs], [at_least_float32(z) for z in targets]
    count = total(sum(view.positions(x) for x in inputs))
    means, variances = zip(*(view.output_statistics(z) for z in targets), strict=True)
    weights = [view.positions(x) / count for x in inputs]
    target_mean = total(sum(w * m for w, m in zip(weights, means, strict=True)))
    variance = total(
        sum(w * (v + (m - target_mean).square()) for w, m, v in zip(weights, means, variances, strict=True))
    )
    mean = second = cross = 0
    for x, z in zip(inputs, targets, strict=True):
        x, padding = view.prepare(x)
        arguments = (view.settings["stride"], padding, view.settings["dilation"], groups)
        mean = mean + _column_sum(x, view.kernel, *arguments)
        second = second + mtz_ext.conv2d_second_moment(x, view.kernel, *arguments).double()
        shape = (z.shape[1], x.shape[1] // groups, *view.kernel)
        cross = cross + torch.nn.grad.conv2d_weight(x, shape, z, *arguments).double()
    mean, second, cross = total(mean) / count, total(second) / count, total(cross)
    covariance = second - mean[:, :, None] * mean[:, None]
    cross = cross.flatten(1).view(groups, -1, mean.shape[1]).mT / count
    cross = cross - mean[:, :, None] * target_mean.view(groups, 1, -1)
    return Moment(count, mean, (covariance + covariance.mT) / 2), Target(target_mean, variance, cross)


_NEUTRAL = {"stride": 1, "padding": 0, "dilation": 1}


def _column_sum(x: Tensor, kernel, stride, padding, dilation, groups: int) -> Tensor:
    """Sum over positions of the columns of every group, [g, d] float64."""
    columns = F.unfold(x.sum(0, keepdim=True, dtype=torch.float64), kernel, dilation, padding, stride)
    return columns.sum((0, 2)).view(groups, -1)


def grouped_part(
    task: int,
    layer: Layer,
    members: Sequence[int],
    execution: Execution,
    network: nn.Module,
    order: Tensor | None,
    options: Options,
) -> GroupedPart:
    """A layer with groups as the merge sees it, in stored row order.

    Args:
        task, layer: which.
        members: the tasks that share its groups.
        execution: at the layer.
        network: the one being zipped.
        order: stored order [r] of its rows, None for the network's own.
        options: of the zip.
    """
    analysis, view = execution.analysis, View.of(layer)
    inputs, outputs = execution.inputs(layer), execution.original[layer.node.name]
    sizes = enough(view, inputs, *MOMENT_SAMPLES)
    # The moment is in stored order already, as the input is; targets and cross moments are brought into it first.
    outputs = heads(outputs, sizes)
    if order is not None:
        outputs = [z.index_select(1, order.to(z.device)) for z in outputs]
    moment, target = grouped_moments(view, layer.groups, heads(inputs, sizes), outputs)
    weight = analysis.exported.tensor(layer.weight, network).detach().double().flatten(1)
    bias = weight.new_zeros(len(weight))
    if layer.bias is not None:
        bias = analysis.exported.tensor(layer.bias, network).detach().double()
    damping = options.damping or automatic_damping(weight.shape[1], moment.count)
    columns = (Run(tuple(members), weight.shape[1] // math.prod(layer.kernel)),)
    part = GroupedPart(task, layer, view, analysis, moment, target, weight, bias, columns, damping)
    part.normalised = options.method != "mtz"
    part.note_zeros(weight, options.keep_zeros)
    if options.method != "average" and layer.norm is not None:
        part.fold = folded_affine(analysis, layer.norm)
        if order is not None:
            part.fold = tuple(value[order.to(value.device)] for value in part.fold)
        scale, shift = part.fold
        part.weight, part.bias = weight * scale[:, None], bias * scale + shift
        cross = target.cross * scale.view(layer.groups, 1, -1)
        part.target = Target(target.mean * scale + shift, target.variance * scale.square(), cross)
    return part


def kernel_costs(axis: AxisGroup, analyses: Sequence[Analysis], tasks: Sequence[int]) -> list[Tensor]:
    """What the convolutions with groups on an axis add to the costs [n, m] of pairing its neurons."""
    costs = []
    for group in axis.writers:
        layers = [group.layers.get(task) for task in tasks]
        if all(layer is not None and layer.groups > 1 and not layer.transposed for layer in layers):
            weights = []
            for task, layer in zip(tasks, layers, strict=True):
                rows = axis_rows(analyses[task], layer.rows, axis.atoms[task])
                weights.append(analyses[task].exported.tensor(layer.weight).flatten(1)[rows])
            costs.append(kernel_difference(*weights))
    return costs


def kernel_difference(first: Tensor, second: Tensor) -> Tensor:
    """What pairing groups costs whose inputs nothing is known of, [n, m], in units of the rows' output variance.

    With inputs alike and uncorrelated and a private scale for every row, it is (1 - |cos|) / 2 of the two rows.

    Args:
        first: weights of the groups of one task, [n, r, d].
        second: of the other, [m, r, d].
    """
    first, second = (F.normalize(weight.double(), dim=2) for weight in (first, second))
    return (1 - torch.einsum("nrd,mrd->nmr", first, second).abs()).sum(2) / 2


def solve_grouped(
    parts: Mapping[int, GroupedPart], rows: Mapping[int, Tensor], method: str
) -> tuple[Unknown, Tensor, dict[int, Rows]]:
    """Rows that the tasks of ``rows`` store together, whole groups of them: as :func:`mtzip.merging.merge.solve_rows`.

    Args:
        parts: of all tasks, rows in stored order.
        rows: task to the positions of these rows, all of the same length.
        method: "average", "mtz" or "refit".
    """
    tasks = sorted(rows)
    size = parts[tasks[0]].weight.shape[1]
    system = right = 0
    chosen, sides = {}, {}
    for task in tasks:
        part = parts[task]
        each = part.rows_of_a_group
        groups = rows[task][::each] // each
        chosen[task] = groups
        covariance = part.moment.covariance[groups]
        energy = covariance.diagonal(dim1=1, dim2=2).mean(1)
        constant = part.moment.mean[groups].square().mean(1)  # where nothing varies, weights stay as they are
        energy = torch.where(energy > 1e-12 * constant, energy, (1e3 * constant).clamp_min(1.0))
        damped = covariance + torch.diag_embed((part.damping * energy)[:, None].expand(-1, size))
        weight = part.weight[rows[task]].view(len(groups), each, size).mT  # [s, d, r]
        if method == "refit":
            b = part.target.cross[groups] + part.damping * energy[:, None, None] * weight
        else:
            b = damped @ weight
        sides[task] = damped * part.alpha, b * part.alpha
        system, right = system + sides[task][0], right + sides[task][1]
    every = torch.arange(size)
    unknown = Unknown(size, dict.fromkeys(tasks, every), {tuple(tasks): slice(0, size)}, dict.fromkeys(tasks, every))
    if method == "average":
        theta = sum(parts[t].weight[rows[t]].view(len(chosen[t]), -1, size).mT for t in tasks) / len(tasks)
        system, right = torch.eye(size, dtype=theta.dtype, device=theta.device).expand(len(theta), -1, -1), theta
    else:
        theta = torch.linalg.solve(system, right)
    support = support_of(parts, rows, unknown, size)
    if support is not None:
        theta = _restricted(system, right, support)
        importance = theta.square() * system.diagonal(dim1=1, dim2=2)[..., None]
        fewer = fewer_weights(parts, rows, unknown, importance.mT.reshape(-1, size).T, support)
        theta = theta if fewer is support else _restricted(system, right, fewer)
    solved = {}
    for task in tasks:
        part = parts[task]
        matrix, b = sides[task]
        scale = torch.ones(theta.shape[0], theta.shape[2], dtype=theta.dtype, device=theta.device)
        if method == "refit" and len(tasks) > 1 and part.scalable and part.layer.norm is None:
            energy = (theta * (matrix @ theta)).sum(1)
            scale = torch.where(energy > 0, (theta * b).sum(1) / torch.where(energy > 0, energy, 1), scale)
        own = theta.mT.reshape(-1, size)
        mean = (theta.mT @ part.moment.mean[chosen[task]][:, :, None]).flatten()
        if part.constant == "none":
            constant = torch.zeros_like(mean)
        elif method == "refit":
            constant = part.target.mean[rows[task]] - scale.flatten() * mean
        else:
            constant = part.bias[rows[task]]
        solved[task] = Rows(own, scale.flatten(), constant)
    return unknown, theta.mT.reshape(-1, size).T, solved


def _restricted(system: Tensor, right: Tensor, support: Tensor) -> Tensor:
    """Rows [s, d, r] of s groups that are zero outside of their support: :mod:`mtzip.merging.restricted`, as one batch.

    Args:
        system: [s, d, d].
        right: [s, d, r].
        support: [d, s r].
    """
    kept = support.T.view(len(system), -1, system.shape[1]).to(system.dtype)  # [s, r, d]
    matrices = system[:, None] * kept[..., :, None] * kept[..., None, :] + torch.diag_embed(1 - kept)
    return torch.linalg.solve(matrices, (right.mT * kept)[..., None])[..., 0].mT
