"""Least squares for rows that have zeros to keep: every row over the columns it has weights in, its support.

With Q = sum_t s_t^2 Q_t and b of :mod:`mtzip.merging.solve`, and S the support of a row, the best row that is zero
elsewhere solves ``Q_SS theta_S = b_S``. That is not the unrestricted row with the others set to zero: columns are
correlated, and those that stay take over what the others did. Supports differ from row to row, so every row has a
system of its own, small where weights are few: they are put together and factorised as batches. Large ones are solved
by conjugate gradients on all rows at once, without a factorisation a row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .columns import Unknown
from .part import Part
from .solve import JointSystem, cholesky, fit_scales, joint_rows, normalised

#: Iterations of conjugate gradients at most, and those that a row's own factorisation may cost as much as. Measured on
#: 1,024 columns and 512 rows: with a tenth of the weights factorisations take 2 s and iterations 6, with six tenths 47
#: and 10.
ITERATIONS, WORTH = 300, 2

#: Entries of what is put together in one batch: 32 MiB.
BATCH = 2**22


def rows_with_zeros(
    parts: Mapping[int, Part],
    rows: Mapping[int, Tensor],
    unknown: Unknown,
    system: JointSystem,
    right: list[Tensor],
    scales: list[Tensor] | None = None,
    sweeps: int = 0,
    fit: bool = True,
) -> tuple[Tensor, list[Tensor]]:
    """Rows that tasks store together as :func:`mtzip.merging.solve.joint_rows` finds them, with the zeros to be kept.

    Args:
        parts: of the tasks, rows in stored order.
        rows: task to the positions of these rows, all of the same length.
        unknown: layout of the columns.
        system, right, scales, sweeps, fit: as there.
    """
    support = support_of(parts, rows, unknown, system.size)
    if support is None:
        return joint_rows(system, right, scales, sweeps, fit=fit)
    theta, fitted = restricted_rows(system, right, scales, support, sweeps, fit)
    fewer = fewer_weights(parts, rows, unknown, theta.square() * _diagonal(system, fitted), support)
    if fewer is support:
        return theta, fitted
    return restricted_rows(system, right, scales, fewer, sweeps, fit)


def mean_with_zeros(parts: Mapping[int, Part], rows: Mapping[int, Tensor], unknown: Unknown, theta: Tensor) -> Tensor:
    """Mean rows [size, r] with the zeros to be kept: of those that all tasks have, the mean is zero by itself."""
    support = support_of(parts, rows, unknown, unknown.size)
    return theta if support is None else theta * fewer_weights(parts, rows, unknown, theta.square(), support)


def support_of(parts: Mapping[int, Part], rows: Mapping[int, Tensor], unknown: Unknown, size: int) -> Tensor | None:
    """Where rows that tasks store together may have weights, [size, r]; None where no zero is to be kept.

    A weight is zero where all tasks that store it have a zero. A shared bias, behind the columns, is free.

    Args:
        parts, rows, unknown: as in :func:`rows_with_zeros`.
        size: of the system over them, a shared bias included.
    """
    if any(parts[task].support is None for task in rows):
        return None
    support = torch.stack([_own_support(parts[task], own, unknown, size) for task, own in rows.items()]).any(0)
    support[unknown.size :] = True
    kept = any(parts[task].counted and not bool(parts[task].support[own].all()) for task, own in rows.items())
    return support if kept or not bool(support.all()) else None


def fewer_weights(
    parts: Mapping[int, Part], rows: Mapping[int, Tensor], unknown: Unknown, importance: Tensor, support: Tensor
) -> Tensor:
    """The support [size, r] cut down where zeros are counted: ``support`` itself where they are not.

    Of the columns that several tasks share a row keeps as many as the task with most weights there has, the most
    important ones.

    Args:
        parts, rows, unknown: as in :func:`rows_with_zeros`.
        importance: [size, r], zero outside of the support.
        support: as :func:`support_of` gives it.
    """
    if len(rows) == 1 or not any(parts[task].counted for task in rows):
        return support
    fewer = support.clone()
    each = [_own_support(parts[task], own, unknown, len(support)) for task, own in rows.items()]
    for tasks, where in unknown.blocks.items():
        if len(tasks) > 1:
            most = torch.stack([own[where].sum(0) for own in each]).amax(0)
            rank = importance[where].argsort(0, descending=True).argsort(0)
            fewer[where] &= rank < most
    return fewer


def _own_support(part: Part, rows: Tensor, unknown: Unknown, size: int) -> Tensor:
    """Where some rows of one task have weights, as columns of the unknown, [size, r]."""
    support = part.support.new_zeros(size, len(rows))
    index, columns = (x.to(support.device) for x in (unknown.index[part.task], unknown.columns[part.task]))
    support[index] = part.support[rows][:, columns].T
    return support


def _diagonal(system: JointSystem, scales: Sequence[Tensor]) -> Tensor:
    """Diagonal of Q for every row, [size, r]: what it costs, but for correlations, to set a weight of one to zero."""
    diagonals = [side.alpha * (side.moment.diagonal() + side.damping) for side in system.sides]
    return sum(
        system.scatter(at, torch.outer(diagonal, scale.square()))
        for at, (diagonal, scale) in enumerate(zip(diagonals, scales, strict=True))
    )


def restricted_rows(
    system: JointSystem,
    right: list[Tensor],
    scales: list[Tensor] | None,
    support: Tensor,
    sweeps: int = 0,
    fit: bool = True,
) -> tuple[Tensor, list[Tensor]]:
    """Rows that cost least of those that are zero outside of their support, and the private scales that fit them best.

    Args:
        system, right, scales, sweeps, fit: as in :func:`mtzip.merging.solve.joint_rows`.
        support: [size, r], true where a row may have a weight.

    Returns:
        theta [size, r] and the scales [r] of every side.
    """
    if scales is None or len(system.sides) == 1:
        scales = [torch.ones(b.shape[1], dtype=b.dtype, device=b.device) for b in right]
        return _rows_at(system, right, scales, support), scales
    theta = _rows_at(system, right, scales, support)
    for _ in range(sweeps):
        scales, size = normalised(fit_scales(system, theta, right))
        theta = _rows_at(system, right, scales, support, theta * size)
    return theta, fit_scales(system, theta, right) if fit else scales


def _rows_at(
    system: JointSystem, right: list[Tensor], scales: list[Tensor], support: Tensor, start: Tensor | None = None
) -> Tensor:
    """Rows at given scales; ``start`` is a first guess with the same support."""
    target = sum(system.scatter(at, b * scale) for at, (b, scale) in enumerate(zip(right, scales, strict=True)))
    theta = torch.zeros_like(target) if start is None else start
    sizes = support.sum(0)
    cheap = _is_cheap(system, sizes)
    for rows in _batches(sizes, cheap.nonzero().flatten(), _samples(system)):
        at, valid = _places(support[:, rows])
        matrix, diagonal = _systems(system, [scale[rows] for scale in scales], at, valid)
        columns = torch.where(valid, target[:, rows].T.gather(1, at), 0)
        solved = torch.cholesky_solve(columns[..., None], cholesky(system, matrix, diagonal))[..., 0]
        found = torch.zeros_like(target[:, rows].T)
        theta[:, rows] = found.scatter_(1, at, torch.where(valid, solved, 0)).T
    rows = (~cheap).nonzero().flatten()
    if len(rows):
        some = [b[:, rows] for b in right], [scale[rows] for scale in scales]
        factor = system.factor([float(scale.square().mean().sqrt()) for scale in some[1]])
        theta[:, rows] = system.solve(*some, theta[:, rows], factor, ITERATIONS, support[:, rows])
    return theta


def _is_cheap(system: JointSystem, sizes: Tensor) -> Tensor:
    """Which rows cost less with a factorisation of their own, [r], by the multiplications of both ways."""
    m = sizes.double()
    if not system.in_sample_space:
        return m**3 / 3 <= WORTH * 2 * system.size**2
    samples = _samples(system)
    return m**3 / 3 + m**2 * samples <= WORTH * 4 * system.size * samples


def _samples(system: JointSystem) -> int:
    """Samples that the moments of a system are kept as; none where they are matrices."""
    return sum(len(side.moment.samples) for side in system.sides if side.moment.samples is not None)


def _batches(sizes: Tensor, rows: Tensor, samples: int) -> list[Tensor]:
    """Rows of nearly equal support together, as many as a batch has room for; those without any left out."""
    rows = rows[sizes[rows].argsort()]
    rows = rows[sizes[rows] > 0]
    found = []
    while len(rows):  # the largest first: it is what all of its batch are padded to
        most = int(sizes[rows[-1]])
        count = max(1, BATCH // (most * max(most, samples)))
        found.append(rows[-count:])
        rows = rows[:-count]
    return found


def _places(support: Tensor) -> tuple[Tensor, Tensor]:
    """Columns [r, m] that rows have weights in, m the most of any, and which of these are any at all."""
    sizes = support.sum(0)
    order = support.T.byte().sort(dim=1, descending=True, stable=True).indices[:, : int(sizes.max())]
    return order, torch.arange(order.shape[1], device=order.device) < sizes[:, None]


def _systems(system: JointSystem, scales: Sequence[Tensor], at: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Q_SS of every row without damping [r, m, m], and its damping [r, m]; padded by the identity."""
    matrix = scales[0].new_zeros(*at.shape, at.shape[1])
    diagonal = (~valid).to(matrix.dtype)
    for side, scale in zip(system.sides, scales, strict=True):
        place = torch.full((system.size,), -1, device=at.device)
        place[side.index] = torch.arange(len(side.index), device=at.device)
        own = torch.where(valid, place[at], -1)
        mine, own = own >= 0, own.clamp_min(0)
        weight = side.alpha * scale.square()
        if side.moment.covariance is not None:
            block = side.moment.covariance[own[:, :, None], own[:, None, :]].to(matrix.dtype)
            block.masked_fill_(~(mine[:, :, None] & mine[:, None, :]), 0)
        else:
            columns = side.moment.samples.T[own] * mine[..., None]
            block = columns @ columns.mT
        matrix += block.mul_(weight[:, None, None])
        diagonal += mine * (weight * side.damping)[:, None]
    return matrix, diagonal
