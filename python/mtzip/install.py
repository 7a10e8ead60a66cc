"""Installing solved rows: blocks that tasks share, private layers, and the BatchNorm behind them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .columns import Unknown
from .merge import Part, Rows
from .moments import cross_moment
from .norms import refit_norm_, set_statistics_
from .share import LEAVES, Layout, Run, SharedLayer, block_name, replace_module


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
        module = networks[task].get_submodule(part.layer.path)
        leaf_class: type[SharedLayer] = LEAVES[type(module)]
        kernel = part.layer.kernel
        dtype, device = module.weight.dtype, module.weight.device
        private_shift = private_affine and part.layer.norm is None
        row_runs = runs[task]  # one for each set of tasks: slots are in that order
        whole = (Run((task,), sum(run.size for run in row_runs)),)
        has_bias = part.has_bias or private_shift
        bias_runs = None if not has_bias else row_runs if all_normed or part.constant == "shared" else whole
        scaled = sum(run.size for run in row_runs if len(run.tasks) > 1) if private_shift else 0
        layout = Layout(task, row_runs, part.columns, bias_runs, scaled)
        blocks: dict[str, nn.Parameter] = {}

        trainable = module.weight.requires_grad

        def parameter(key: tuple, value: Callable[[], Tensor], device=device, dtype=dtype, trainable=trainable):
            if key not in parameters:
                parameters[key] = nn.Parameter(value().to(device, dtype).contiguous(), trainable)
            elif trainable:  # for one of its tasks
                parameters[key].requires_grad_()
            return parameters[key]

        own = assembled(row_runs, solved, task)
        for run in row_runs:
            unknown, theta, _ = solved[run.tasks]
            for tasks, where in unknown.blocks.items():
                if task in tasks:
                    shape = (run.size, -1, *kernel)
                    value = lambda theta=theta, where=where, shape=shape: theta[where].T.reshape(shape)  # noqa: E731
                    blocks[block_name(run, Run(tasks, 0))] = parameter((run.tasks, tasks), value)
        if has_bias:
            value = own.bias
            if part.layer.norm is not None:
                value = torch.zeros_like(value)  # the BatchNorm behind takes any constant away
            start = 0
            for run, name in zip(bias_runs, layout.bias_blocks(), strict=True):
                piece = value[start : start + run.size]
                blocks[name] = parameter(("bias", run.tasks), lambda piece=piece: piece)
                start += run.size
        if scaled:
            scale = own.scale[:scaled]
            blocks["scale"] = parameter(("scale", task), lambda scale=scale: scale)
        leaf = leaf_class.wrap(module, layout, {name: blocks[name] for name in _names(layout)})
        set_network(task, replace_module(networks[task], module, leaf))


def assembled(runs: Sequence[Run], solved: Mapping, task: int) -> Rows:
    """All rows of a task in stored order."""
    pieces = [solved[run.tasks][2][task] for run in runs]
    return Rows(*(torch.cat([getattr(piece, name) for piece in pieces]) for name in ("weight", "scale", "bias")))


def _names(layout: Layout) -> list[str]:
    return [*layout.weight_blocks(), *layout.bias_blocks(), *(["scale"] if layout.scaled else [])]


def install_private(part: Part, network: nn.Module, solved: Rows) -> None:
    """Writes refitted rows into a layer that stays private."""
    with torch.no_grad():
        weight = part.analysis.exported.tensor(part.layer.weight, network)
        weight.copy_((solved.weight * solved.scale[:, None]).view_as(weight))
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
        every = torch.arange(len(rows.weight), device=rows.weight.device)
        variance = part.moment.variance(rows.weight)
        product = (rows.weight * cross_moment(part.moment, part.target, every).T).sum(1)
        slope = product / torch.where(variance > 0, variance, torch.ones_like(variance))
        return cls(rows.weight @ part.moment.mean, variance, slope)


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
