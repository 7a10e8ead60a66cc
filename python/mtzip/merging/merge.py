"""Solving for the rows of one group of corresponding layers, those that tasks store together and those of one alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .columns import Unknown
from .moments import is_whole
from .narrow import narrowed
from .part import Systems, plain_mean
from .restricted import mean_with_zeros, rows_with_zeros
from .solve import JointSystem

#: Alternations of rows and scales beyond the grid of ratios, for fully connected layers: they pay where no BatchNorm or
#: activation-aware substitution follows.
SCALE_SWEEPS = 2


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
    narrow = narrowed(systems, members) if method == "refit" else None
    if narrow is not None:
        few, plane = narrow.paired(rows)
        theta, scales = _refit(few.parts, rows, *few.of(members), starts)
        theta = narrow.widened(theta, rows, plane)
    elif method == "refit":
        theta, scales = _refit(parts, rows, unknown, system, starts)
    else:
        theta, bias = plain_mean(parts, rows, unknown)
        theta = mean_with_zeros(parts, rows, unknown, theta)
        if method == "mtz" and len(members) > 1:
            theta, bias = _merge_closed_form(systems, rows, unknown, theta, bias)
        scales = {task: torch.ones_like(bias) for task in members}
    solved = {}
    for task in members:
        part = parts[task]
        index, columns = unknown.index[task], unknown.columns[task]
        own = full = theta if is_whole(index, len(theta)) else theta[index.to(theta.device)]
        if not is_whole(columns, part.weight.shape[1]):
            full = theta.new_zeros(part.weight.shape[1], theta.shape[1])
            full[columns] = own
        if part.constant == "none":
            constant = torch.zeros_like(scales[task])
        elif part.constant == "shared":
            constant = theta[-1] if method == "refit" else bias
        elif method != "refit" and (method == "average" or len(members) == 1):
            constant = part.bias[rows[task]]
        else:
            constant = part.target.mean[rows[task]] - scales[task] * (part.moment.mean[columns] @ own)
        solved[task] = Rows(full.T, scales[task], constant)
    return unknown, theta, solved


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
    merged, _ = rows_with_zeros(systems.parts, rows, shared, system, right)
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
    theta, fitted = rows_with_zeros(parts, rows, unknown, system, right, start, sweeps, fit)
    scales = {}
    for at, task in enumerate(members):
        weighting = parts[task].weighting if joint else None
        scales[task] = fitted[at] if weighting is None else fitted[at] / weighting[rows[task]]
    return theta, scales
