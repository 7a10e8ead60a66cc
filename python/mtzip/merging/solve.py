"""Least squares for rows that several tasks share: one system, any number of tasks, any split of the columns.

A row of task t is ``P_t theta``: the unknown theta holds every column once, whether a task has it alone or with others,
and P_t picks the columns of task t. With second moments H_t, cross moments c_t, weights alpha_t and a private scale s_t
for every row, the rows minimise::

    sum_t alpha_t ( E|s_t theta^T P_t^T x_t - z_t|^2 + lambda_t |s_t P_t theta - w_t|^2 )

that is ``sum_t s_t^2 Q_t theta = sum_t s_t b_t`` with Q_t = alpha_t P_t^T (H_t + lambda_t I) P_t and
b_t = alpha_t P_t^T (c_t + lambda_t w_t). Damping pulls towards the task's own old weight, so that columns without
variance cost nothing and end at the mean of the old weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .moments import Moment, Target, is_whole

#: Relative damping, lambda over the mean variance of the columns: the more columns to a position the more, but no less
#: than the floor. Measured on pairs of 784-300-100-10 networks: 0.1 is best for 1,000 images, 0.001 to 0.01 for 10,000.
DAMPING_PER_COLUMN, DAMPING_FLOOR = 0.1, 1e-3

#: Factors of systems from this size on are taken in float32, and solutions refined once on the float64 system.
SINGLE_PRECISION_FROM = 384

#: Different first scales that rows of a joint solve may have. Beyond that rows of nearby scales share a factor, and are
#: solved by conjugate gradients: step of the grid that scales are rounded to, and iterations.
MOST_SCALES, SCALE_STEP, SCALE_ITERATIONS = 64, 2.0, 25

#: Bytes of factors that a system keeps: matching and every later solve use the same few.
KEEP_FACTORS = 2**30


def automatic_damping(columns: int, positions: int) -> float:
    """Relative damping for a moment of so many columns taken over so many positions."""
    return min(0.1, max(DAMPING_FLOOR, DAMPING_PER_COLUMN * columns / positions))


def own_target(moment: Moment, weight: Tensor, bias: Tensor) -> Target:
    """Moments of what a layer puts out itself: linear in its input, so no pass over the data is needed.

    Those of many columns are taken in float32, as are their factors.
    """
    mean = weight @ moment.mean + bias
    if moment.samples is not None:
        samples = moment.samples @ weight.T
        return Target(mean, samples.square().sum(0), samples=samples)
    if len(moment.mean) < SINGLE_PRECISION_FROM:
        cross = moment.times(weight)
    else:
        cross = moment.covariance.float() @ weight.T.float()
    return Target(mean, (weight.T.to(cross.dtype) * cross).sum(0).double().clamp_min(0), cross=cross)


@dataclass
class Side:
    """One task's part of a joint system.

    Args:
        moment: second moment of the columns, [d].
        index: [d] position of each column in the unknown.
        alpha: weight of the task.
        damping: lambda, absolute.
    """

    moment: Moment
    index: Tensor
    alpha: float
    damping: float

    def apply(self, rows: Tensor) -> Tensor:
        """alpha (H + lambda I) rows for rows [d, r]."""
        product = self.moment.times(rows.T) if rows.numel() else torch.zeros_like(rows)
        return product.add_(rows, alpha=self.damping).mul_(self.alpha)

    def right_hand_side(self, cross: Tensor, weight: Tensor) -> Tensor:
        """b = alpha (c + lambda w) on the task's own columns, from c [d, r] and w [r, d]."""
        return (cross + self.damping * weight.T).mul_(self.alpha)


class JointSystem:
    """The normal equations of rows shared by the tasks of ``sides`` over ``size`` unknown columns."""

    def __init__(self, sides: list[Side], size: int):
        self.sides, self.size = sides, size
        self.escalation = 1.0
        positions = sum(0 if side.moment.samples is None else len(side.moment.samples) for side in sides)
        self._factors: dict[tuple, Factor] = {}
        self.in_sample_space = all(side.moment.samples is not None for side in sides) and positions < size

    @property
    def coupled(self) -> bool:
        """Whether any column belongs to more than one side: otherwise sides have nothing in common."""
        return len(torch.unique(torch.cat([side.index for side in self.sides]))) < sum(
            len(side.index) for side in self.sides
        )

    @property
    def in_single_precision(self) -> bool:
        """Whether the moments were summed up in float32: refining a solution beyond it fits their rounding."""
        return any(
            side.moment.covariance is not None and side.moment.covariance.dtype != torch.float64 for side in self.sides
        )

    def is_whole(self, at: int) -> bool:
        """Whether the columns of side ``at`` are those of the unknown, in the same order."""
        return is_whole(self.sides[at].index, self.size)

    def scatter(self, at: int, values: Tensor) -> Tensor:
        """P_t^T values: [d, r] on the columns of side ``at`` to [size, r]; themselves where nothing moves."""
        if self.is_whole(at):
            return values
        out = values.new_zeros(self.size, values.shape[1])
        return out.index_copy_(0, self.sides[at].index, values)

    def gather(self, at: int, theta: Tensor) -> Tensor:
        """P_t theta: [size, r] to [d, r] on the columns of side ``at``."""
        return theta if self.is_whole(at) else theta[self.sides[at].index]

    def apply(self, theta: Tensor, scales: list[Tensor]) -> Tensor:
        """sum_t s_t^2 Q_t theta for theta [size, r] and scales [r] each."""
        out = torch.zeros_like(theta)
        for at, side in enumerate(self.sides):
            product = side.apply(self.gather(at, theta)).mul_(scales[at].square())
            out = out.add_(product) if self.is_whole(at) else out.index_add_(0, side.index, product)
        return out

    def factor(self, scales: list[float], exact: bool = False) -> Factor:
        """Factorises sum_t s_t^2 Q_t for one scale a task; in float64 if ``exact``. Those of small systems are kept."""
        key = (*(float(f"{float(scale):.6g}") for scale in scales), exact)
        found = self._factors.get(key)
        if found is None:
            found = Factor(self, list(key[:-1]), exact)
            if sum(factor.nbytes for factor in self._factors.values()) + found.nbytes <= KEEP_FACTORS:
                self._factors[key] = found
        return found

    def solve(
        self,
        right: list[Tensor],
        scales: list[Tensor],
        start: Tensor | None,
        factor: Factor,
        steps: int,
        support: Tensor | None = None,
    ) -> Tensor:
        """Rows for scales [r] that differ from row to row: preconditioned conjugate gradients on all rows at once.

        Args:
            right: b_t [d, r] of every side.
            scales: [r] of every side.
            start: first guess [size, r].
            factor: factor of a nearby system, the preconditioner.
            steps: most iterations.
            support: [size, r] where rows may have weights, those of ``start`` among them; None for everywhere.
        """

        def kept(rows: Tensor) -> Tensor:
            return rows if support is None else rows * support

        target = kept(sum(self.scatter(at, b * scales[at]) for at, b in enumerate(right)))
        theta = factor.solve(target) if start is None else start
        residual = target - kept(self.apply(theta, scales))
        stop = target.norm(dim=0) * 1e-7
        direction = z = kept(factor.solve(residual))
        energy = (residual * z).sum(0)
        for _ in range(steps):
            if (residual.norm(dim=0) <= stop).all():
                break
            image = kept(self.apply(direction, scales))
            step = energy / (direction * image).sum(0).clamp_min(torch.finfo(image.dtype).tiny)
            theta = theta + step * direction
            residual = residual - step * image
            z = kept(factor.solve(residual))
            energy, previous = (residual * z).sum(0), energy
            direction = z + energy / previous.clamp_min(torch.finfo(image.dtype).tiny) * direction
        return theta


class Factor:
    """Cholesky factor of a joint system; in sample space by Woodbury, so that nothing size x size is formed."""

    def __init__(self, system: JointSystem, scales: list[float], exact: bool):
        self._rows: Tensor | None = None
        if system.in_sample_space:
            self._factor_samples(system, scales)
        else:
            self._factor_features(system, scales, exact)

    def solve(self, right: Tensor) -> Tensor:
        """The system's inverse times right [size, r]."""
        if self._rows is None:
            return torch.cholesky_solve(right.to(self._lower.dtype), self._lower).to(right.dtype)
        # (D + X^T X)^-1 = D^-1 - D^-1 X^T (I + X D^-1 X^T)^-1 X D^-1
        scaled = right / self._diagonal[:, None]
        inner = torch.cholesky_solve(self._rows @ scaled, self._lower)
        return scaled - (self._rows.T @ inner) / self._diagonal[:, None]

    def half(self, right: Tensor) -> Tensor:
        """A matrix Y with Y^T Y = right^T (system)^-1 right: [size, r] to [k, r]. Feature space only."""
        return self._half(right).to(right.dtype)

    def gains(self, first: Tensor, second: Tensor, paired: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """What right-hand sides gain, b^T (system)^-1 b, and what the first ones gain with the second ones.

        Args:
            first: [size, n].
            second: [size, m].
            paired: each of the first with its own of the second only, n = m.

        Returns:
            [n] and [m] of each alone, and a^T (system)^-1 b [n, m], or [n] if ``paired``; in the factor's precision.
        """
        product = (lambda a, b: (a * b).sum(0)) if paired else (lambda a, b: a.T @ b)
        if self._rows is None:
            a, b = self._half(first), self._half(second)
            found = product(a, b), a.square_().sum(0), b.square_().sum(0)
        else:
            root = self._diagonal.sqrt()[:, None]
            scaled = [right / root for right in (first, second)]
            a, b = (torch.linalg.solve_triangular(self._lower, self._rows @ (x / root), upper=False) for x in scaled)
            alone = [x.square().sum(0) - y.square().sum(0) for x, y in zip(scaled, (a, b), strict=True)]
            found = product(*scaled) - product(a, b), *alone
        across, one, two = found
        return one, two, across

    def gain(self, right: Tensor) -> Tensor:
        """What right-hand sides [size, r] gain, b^T (system)^-1 b, [r]."""
        if self._rows is not None:
            return (right * self.solve(right)).sum(0)
        return self.half(right).square_().sum(0)

    def _half(self, right: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(self._lower, right.to(self._lower.dtype), upper=False)

    @property
    def nbytes(self) -> int:
        """Bytes it takes."""
        return self._lower.nbytes + (0 if self._rows is None else self._rows.nbytes)

    @property
    def is_exact(self) -> bool:
        """False for a factor taken in float32."""
        return self._lower.dtype == torch.float64

    def _factor_features(self, system: JointSystem, scales: list[float], exact: bool) -> None:
        first = system.sides[0].moment.mean
        single = system.size >= SINGLE_PRECISION_FROM and not exact
        total = first.new_zeros(system.size, system.size, dtype=torch.float32 if single else torch.float64)
        diagonal = first.new_zeros(system.size)
        for at, (side, scale) in enumerate(zip(system.sides, scales, strict=True)):
            weight = side.alpha * scale**2
            moment = side.moment
            covariance = moment.samples.T @ moment.samples if moment.covariance is None else moment.covariance
            if system.is_whole(at):
                total.add_(covariance, alpha=weight)
            else:
                added = (covariance * weight).to(total.dtype)
                total.index_put_((side.index[:, None], side.index), added, accumulate=True)
            diagonal.index_add_(0, side.index, torch.full_like(moment.mean, weight * side.damping))
        self._lower = cholesky(system, total, diagonal)

    def _factor_samples(self, system: JointSystem, scales: list[float]) -> None:
        first = system.sides[0].moment.mean
        self._diagonal = first.new_zeros(system.size)
        rows = []
        for side, scale in zip(system.sides, scales, strict=True):
            weight = side.alpha * scale**2
            self._diagonal.index_add_(0, side.index, torch.full_like(side.moment.mean, weight * side.damping))
            block = first.new_zeros(len(side.moment.samples), system.size)
            rows.append(block.index_copy_(1, side.index, side.moment.samples * weight**0.5))
        self._rows = torch.cat(rows)
        gram = (self._rows / self._diagonal) @ self._rows.T
        self._lower = cholesky(system, gram, torch.ones_like(gram[0]))


def cholesky(system: JointSystem, matrix: Tensor, diagonal: Tensor) -> Tensor:
    """Cholesky factor of matrix + diagonal, one or a batch of them; the diagonal grows tenfold until it succeeds.

    Writes on ``matrix``.
    """
    plain = matrix.diagonal(dim1=-2, dim2=-1).clone()
    for _ in range(12):
        matrix.diagonal(dim1=-2, dim2=-1).copy_(plain + diagonal * system.escalation)
        lower, status = torch.linalg.cholesky_ex(matrix)
        if not bool(status.any()):
            return lower
        system.escalation *= 10
    raise FloatingPointError(
        f"a second moment of {matrix.shape[-1]} columns has no Cholesky factor at any damping, "
        "expected finite values; check the calibration inputs and weights for NaN, Inf or huge values"
    )


def fit_scales(system: JointSystem, theta: Tensor, right: list[Tensor]) -> list[Tensor]:
    """Best private scale of every row: s_t = theta . b_t / theta . Q_t theta, [r] each."""
    scales = []
    for at, side in enumerate(system.sides):
        own = system.gather(at, theta)
        energy = (own * side.apply(own)).sum(0)
        scale = (own * right[at]).sum(0) / energy.clamp_min(torch.finfo(own.dtype).tiny)
        scales.append(torch.where(energy > 0, scale, torch.ones_like(scale)))
    return scales


def joint_rows(
    system: JointSystem,
    right: list[Tensor],
    scales: list[Tensor] | None = None,
    sweeps: int = 0,
    steps: int = 3,
    fit: bool = True,
) -> tuple[Tensor, list[Tensor]]:
    """Shared rows, and the private scales that fit them best.

    Rows whose first scales are equal but for signs share one factorisation and one direct solve, so scales taken from a
    grid cost one factorisation for each of its values. Sweeps alternate from there: scales from rows, rows from scales.

    Args:
        system: the joint system.
        right: b_t [d, r] of every side.
        scales: first scales [r] of every side; None fixes all scales to one.
        sweeps: alternations of rows and scales by conjugate gradients.
        steps: conjugate gradient steps in each.
        fit: whether the scales are fitted to the rows in the end.

    Returns:
        theta [size, r] and the scales [r] of every side.
    """
    ones = [torch.ones(b.shape[1], dtype=b.dtype, device=b.device) for b in right]
    if scales is None or len(system.sides) == 1:
        factor = system.factor([1.0] * len(right), exact=True)
        return factor.solve(sum(system.scatter(at, b) for at, b in enumerate(right))), ones
    target = sum(system.scatter(at, b * scale) for at, (b, scale) in enumerate(zip(right, scales, strict=True)))
    theta = torch.empty_like(target)
    values, which = torch.unique(torch.stack(scales).abs(), dim=1, return_inverse=True)  # the matrix has squares only
    many = values.shape[1] > MOST_SCALES
    if many:
        values, which = torch.unique(rounded_scales(torch.stack(scales)), dim=1, return_inverse=True)
    for at, value in enumerate(values.T.tolist()):
        rows = (which == at).nonzero().flatten()
        factor = system.factor(value)
        if many:
            some = [b[:, rows] for b in right], [scale[rows] for scale in scales]
            theta[:, rows] = system.solve(*some, None, factor, SCALE_ITERATIONS)
            continue
        theta[:, rows] = factor.solve(target[:, rows])
        if not factor.is_exact and not system.in_single_precision:
            residual = target[:, rows] - system.apply(theta[:, rows], [scale[rows] for scale in scales])
            theta[:, rows] += factor.solve(residual)
    for _ in range(sweeps):
        scales, size = normalised(fit_scales(system, theta, right))
        theta = theta * size  # the same rows: what fits already is not moved
        factor = system.factor([float(scale.square().mean().sqrt()) for scale in scales])
        theta = system.solve(right, scales, theta, factor, steps)
    return theta, fit_scales(system, theta, right) if fit else scales


def rounded_scales(scales: Tensor) -> Tensor:
    """Sizes of scales on a coarse logarithmic grid, relative to the largest, small ones as if they were an eighth."""
    scales = scales.abs()
    top = scales.amax(0).clamp_min(torch.finfo(scales.dtype).tiny)
    steps = (scales / top).clamp_min(SCALE_STEP**-3).log2().div(math.log2(SCALE_STEP)).round()
    return SCALE_STEP**steps


def normalised(scales: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Scales with mean square one over the tasks, and what they were divided by: theta takes it up."""
    size = (sum(scale.square() for scale in scales) / len(scales)).sqrt()
    size = torch.where(size > 0, size, torch.ones_like(size))
    return [scale / size for scale in scales], size
