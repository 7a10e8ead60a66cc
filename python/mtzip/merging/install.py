"""Installing solved rows: blocks that tasks share, private layers, and the BatchNorm behind them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..network.layout import Layout, Run, pieces, totals
from ..network.leaf import leaf_class, replace_module
from .columns import Unknown
from .merge import Rows
from .moments import CONSTANT, cross_moment
from .norms import refit_norm_, set_statistics_
from .part import Part, positions


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
    all_normed = all(part.layer.norm is not None for part in group.values())
    for task, part in group.items():
        owner, names = part.place
        module = networks[task].get_submodule(owner)
        trainable = getattr(module, names[0]).requires_grad
        row_runs = runs[task]
        whole = (Run((task,), sum(run.size for run in row_runs)),)
        bare = part.layer.norm is None
        has_bias = part.has_bias or (private_affine and bare and part.takes_bias)
        bias_runs = None
        if has_bias:
            bias_runs = row_runs if all_normed or part.constant == "shared" else whole
        scaled = sum(run.size for run in row_runs if len(run.tasks) > 1) if private_affine and bare else 0
        layout = Layout(task, row_runs, part.columns, bias_runs, scaled, *names, part.view.transposed)
        like = getattr(module, names[0])

        def parameter(key: tuple, value: Tensor, like=like, trainable=trainable) -> nn.Parameter:
            if key not in parameters:
                parameters[key] = nn.Parameter(value.to(like.device, like.dtype).contiguous(), trainable)
            elif trainable:  # for one of its tasks
                parameters[key].requires_grad_()
            return parameters[key]

        blocks: dict[str, nn.Parameter] = {}
        for rows in totals(row_runs):
            unknown, theta, _ = solved[rows]
            for tasks, where in unknown.blocks.items():
                if task in tasks:
                    value = part.view.blocked(theta[where].T)
                    blocks[layout.block_name(rows, tasks)] = parameter((rows, tasks), value)
        own = assembled(row_runs, solved, task)
        if has_bias:
            value = own.bias
            if not bare:
                value = torch.zeros_like(value)  # the BatchNorm behind takes any constant away
            for tasks in totals(bias_runs):
                piece = value[positions(bias_runs, tasks, value.device)]
                blocks[layout.bias_block(tasks)] = parameter(("bias", tasks), piece)
        if scaled:
            shared = torch.cat(
                [positions(row_runs, tasks, own.scale.device) for tasks in totals(row_runs) if len(tasks) > 1]
            )
            scale = own.scale[shared.sort().values]
            blocks[layout.scale_name] = parameter(("scale", task), scale)
        ordered = [*layout.weight_blocks(), *layout.bias_blocks(), *([layout.scale_name] if scaled else [])]
        leaf = leaf_class(type(module), layout.names).wrap(module, layout, {name: blocks[name] for name in ordered})
        set_network(task, replace_module(networks[task], module, leaf))


def assembled(runs: Sequence[Run], solved: Mapping, task: int) -> Rows:
    """All rows of a task in stored order."""
    found = [(solved[run.tasks][2][task], where) for run, where in pieces(runs)]
    return Rows(*(torch.cat([getattr(rows, name)[at] for rows, at in found]) for name in ("weight", "scale", "bias")))


def install_private(part: Part, network: nn.Module, solved: Rows) -> None:
    """Writes refitted rows into a layer that stays private."""
    with torch.no_grad():
        weight = part.analysis.exported.tensor(part.layer.weight, network)
        weight.copy_(part.view.tensor(solved.weight * solved.scale[:, None]))
        if part.layer.bias is not None:
            part.analysis.exported.tensor(part.layer.bias, network).copy_(solved.bias)


@dataclass
class Outputs:
    """What rows put out over the calibration inputs, [r] each: mean, variance, and slope of the target on them."""

    mean: Tensor
    variance: Tensor
    slope: Tensor

    @classmethod
    def of(cls, part: Part, rows: Rows) -> Outputs:
        """From moments alone: no pass over the data."""
        if part.moment.samples is not None:
            outputs = part.moment.samples @ rows.weight.T
            variance, product = outputs.square().sum(0), (outputs * part.target.samples).sum(0)
            return cls.from_moments(rows.weight @ part.moment.mean, variance, product)
        every = torch.arange(len(rows.weight), device=rows.weight.device)
        variance = part.moment.variance(rows.weight)
        product = (rows.weight * cross_moment(part.moment, part.target, every).T).sum(1)
        return cls.from_moments(rows.weight @ part.moment.mean, variance, product)

    @classmethod
    def from_moments(cls, mean: Tensor, variance: Tensor, product: Tensor) -> Outputs:
        """From mean and variance of the rows and their covariance with the target; rounding is no variance."""
        alive = variance > CONSTANT * mean.square()
        variance = torch.where(alive, variance, 0)
        return cls(mean, variance, torch.where(alive, product / torch.where(alive, variance, 1), 0))


def effective_affine(part: Part, rows: Rows, outputs: Outputs) -> tuple[Tensor, Tensor]:
    """Scale and shift [r] behind the rows: their private ones, or those of the fitted BatchNorm."""
    if part.layer.norm is None:
        return rows.scale, rows.bias
    return outputs.slope, part.target.mean - outputs.slope * outputs.mean


def fit_following_norm(part: Part, network: nn.Module, outputs: Outputs, average: bool) -> None:
    """Statistics and affine of the BatchNorm behind a layer.

    Args:
        part: the layer.
        network: the network being zipped.
        outputs: of all its rows in stored order, without a bias.
        average: re-estimate the statistics only.
    """
    o = outputs
    if average:
        set_statistics_(part.analysis, part.layer.norm, network, o.mean, o.variance)
    else:
        refit_norm_(part.analysis, part.layer.norm, network, o.mean, o.variance, o.slope, part.target.mean)


def relative_error(part: Part, rows: Rows, outputs: Outputs) -> float:
    """Mean squared error of a layer's output, BatchNorm included, relative to the variance of its target."""
    scale, shift = effective_affine(part, rows, outputs)
    offset = scale * outputs.mean + shift - part.target.mean
    explained = scale * (2 * outputs.slope - scale) * outputs.variance
    total = float(part.target.variance.sum())
    return max(float((part.target.variance - explained + offset.square()).sum()), 0.0) / total if total > 0 else 0.0
