"""Second moments of what a layer reads, and its cross moments with a target: the layer-wise Hessian up to a factor.

A layer's output changes by E[(d^T x)^2] = d^T H d when a row of its weight changes by d. Everything here is *centred*:
the covariance C of the input and its mean are kept apart, H = C + m m^T, so that a private intercept can take the mean
away and an input that never varies counts as dead whatever its value is.

Where there are fewer positions n than columns d the centred samples are kept instead, and nothing d x d is formed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import mtz_ext

from ..distributed import gathered_rows, own_share, total
from ..memory import samples_for
from ..trace.analysis import Layer


def is_whole(index: Tensor, size: int) -> bool:
    """Whether ``index`` [n] is 0, 1, ..., size - 1, so that taking it would only copy."""
    return len(index) == size and bool((index.diff() == 1).all()) and (not size or not int(index[0]))


@dataclass
class Moment:
    """Input statistics of one layer of one task.

    Args:
        count: positions n (samples times spatial positions).
        mean: [d] float64.
        covariance: [d, d] float64, float32 where ``d`` is large, biased; None in sample space.
        samples: [n, d] float64 rows (x - mean) / sqrt(n), so that samples^T samples is the covariance; else None.
    """

    count: int
    mean: Tensor
    covariance: Tensor | None = None
    samples: Tensor | None = None

    def select(self, columns: Tensor) -> Moment:
        """The moment of some columns, in the order of ``columns`` [s]; the moment itself if those are all of them."""
        if is_whole(columns, len(self.mean)):
            return self
        covariance = None if self.covariance is None else self.covariance[columns][:, columns]
        samples = None if self.samples is None else self.samples[:, columns]
        return Moment(self.count, self.mean[columns], covariance, samples)

    def raw(self, bias: bool) -> Moment:
        """The second moment about zero instead, with a column of ones behind the others where ``bias``."""
        mean = torch.cat([self.mean, self.mean.new_ones(1)]) if bias else self.mean
        if self.samples is not None:
            ones = self.samples.new_zeros(len(self.samples), int(bias))
            samples = torch.cat([self.samples, ones], 1) + mean / self.count**0.5
            return Moment(self.count, torch.zeros_like(mean), samples=samples)
        covariance = torch.outer(mean, mean)
        d = len(self.mean)
        covariance[:d, :d] += self.covariance
        return Moment(self.count, torch.zeros_like(mean), covariance)

    def times(self, rows: Tensor) -> Tensor:
        """Covariance times rows^T: [r, d] -> [d, r]."""
        if self.covariance is not None:
            return (self.covariance @ rows.T.to(self.covariance.dtype)).to(rows.dtype)
        return self.samples.T @ (self.samples @ rows.T)

    def variance(self, rows: Tensor) -> Tensor:
        """Variance of the outputs of rows [r, d] -> [r]."""
        if self.covariance is not None:
            return (self.times(rows).T * rows).sum(1).clamp_min(0)
        return (self.samples @ rows.T).square().sum(0)

    def diagonal(self) -> Tensor:
        """Variance of every column, [d] float64."""
        return self.covariance.diagonal().double() if self.covariance is not None else self.samples.square().sum(0)


@dataclass
class Target:
    """What a layer should output: cross moments of its input with the target.

    Args:
        mean: [r] mean of the target.
        variance: [r] variance of the target.
        cross: [d, r] covariance of input and target; None in sample space.
        samples: [n, r] rows (z - mean) / sqrt(n); None in feature space.
    """

    mean: Tensor
    variance: Tensor
    cross: Tensor | None = None
    samples: Tensor | None = None

    def scaled(self, scale: Tensor, shift: Tensor) -> Target:
        """The target scale * z + shift, both [r]."""
        cross = None if self.cross is None else self.cross * scale
        samples = None if self.samples is None else self.samples * scale
        return Target(self.mean * scale + shift, self.variance * scale.square(), cross, samples)


def cross_moment(moment: Moment, target: Target, rows: Tensor) -> Tensor:
    """Covariance of the input with some rows of the target, [d, r]."""
    if target.cross is not None:
        return target.cross if is_whole(rows, target.cross.shape[1]) else target.cross[:, rows]
    return moment.samples.T @ target.samples[:, rows]


class View:
    """A layer seen as rows times columns: how its input becomes positions x columns.

    Args:
        kind: "linear", "conv1d" to "conv3d", "conv_transpose1d" to "conv_transpose3d".
        kernel: kernel size, () for linear.
        settings: stride, padding, dilation; ``total_padding`` where it is not the same on both sides;
            ``output_padding`` of a transposed convolution.
        transposed: whether its weight has the columns first.
    """

    def __init__(
        self, kind: str, kernel: Sequence[int] = (), settings: dict[str, Any] | None = None, transposed: bool = False
    ):
        self.is_linear = kind == "linear"
        self.kernel, self.settings = tuple(kernel), dict(settings or {})
        self.transposed = transposed
        self.upsampled: tuple[int, ...] | None = None
        if kind.startswith("conv_transpose"):
            # A convolution of stride 1, by the kernel turned round, of the input with zeros between its pixels.
            given = self.settings
            self.upsampled = given["stride"]
            self._around = [
                (d * (k - 1) - p, d * (k - 1) - p + o)
                for k, d, p, o in zip(
                    self.kernel, given["dilation"], given["padding"], given["output_padding"], strict=True
                )
            ]
            self.settings = {"stride": (1,) * len(self.kernel), "dilation": given["dilation"]}

    @classmethod
    def of(cls, layer: Layer) -> View:
        """How a traced layer reads its input."""
        return cls(layer.kind, layer.kernel, layer.settings, layer.transposed)

    def matrix(self, weight: Tensor) -> Tensor:
        """The layer's weight as rows x columns."""
        weight = weight.transpose(0, 1) if self.transposed else weight
        return self._turned(weight).flatten(1)

    def blocked(self, matrix: Tensor) -> Tensor:
        """Some rows and whole input channels of :meth:`matrix` as a block of the weight, rows first."""
        return self._turned(matrix.reshape(len(matrix), -1, *self.kernel))

    def tensor(self, matrix: Tensor) -> Tensor:
        """The inverse of :meth:`matrix`."""
        weight = self.blocked(matrix)
        return weight.transpose(0, 1) if self.transposed else weight

    def _turned(self, weight: Tensor) -> Tensor:
        return weight if self.upsampled is None else weight.flip(tuple(range(2, weight.dim())))

    def prepare(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """Input padded explicitly where the two sides differ, and the symmetric padding that is left."""
        if self.upsampled is not None:
            sizes = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], self.upsampled, strict=True)]
            spread = x.new_zeros(*x.shape[:2], *sizes)
            spread[(..., *(slice(None, None, s) for s in self.upsampled))] = x
            return F.pad(spread, [a for pair in reversed(self._around) for a in pair]), (0,) * len(sizes)
        total = self.settings.get("total_padding")
        if total is None or all(amount % 2 == 0 for amount in total):
            return x, self.settings["padding"]
        amounts = [side for amount in reversed(total) for side in (amount // 2, amount - amount // 2)]
        return F.pad(x, amounts), (0,) * len(total)

    def positions(self, x: Tensor) -> int:
        """Number of positions of an input."""
        if self.is_linear:
            return x[..., 0].numel()
        x, padding = self.prepare(x)
        total = x.shape[0]
        for size, k, s, p, d in zip(
            x.shape[2:], self.kernel, self.settings["stride"], padding, self.settings["dilation"], strict=True
        ):
            total *= (size + 2 * p - d * (k - 1) - 1) // s + 1
        return total

    def columns(self, x: Tensor) -> int:
        """Number of columns d."""
        if self.is_linear:
            return x.shape[-1]
        return x.shape[1] * int(torch.tensor(self.kernel).prod())

    def unfold(self, x: Tensor) -> Tensor:
        """Positions x columns, [n, d], column order of ``weight.flatten(1)``."""
        if self.is_linear:
            return x.reshape(-1, x.shape[-1])
        x, padding = self.prepare(x)
        x = F.pad(x, [amount for p in reversed(padding) for amount in (p, p)])
        for at, (k, s, d) in enumerate(
            zip(self.kernel, self.settings["stride"], self.settings["dilation"], strict=True)
        ):
            x = x.unfold(2 + at, d * (k - 1) + 1, s)[..., ::d]
        spatial = len(self.kernel)
        order = (0, *range(2, 2 + spatial), 1, *range(2 + spatial, 2 + 2 * spatial))
        return x.permute(order).reshape(-1, x.shape[1] * int(torch.tensor(self.kernel).prod()))

    def rows(self, z: Tensor) -> Tensor:
        """Output as positions x rows, [n, r]."""
        return z.reshape(-1, z.shape[-1]) if self.is_linear else z.movedim(1, -1).reshape(-1, z.shape[1])

    def output_statistics(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and biased variance of every row over the positions of a chunk, [r] float64."""
        if self.is_linear:
            rows = z.reshape(-1, z.shape[-1])
            # The mean to the last digit: the cross moment takes it out of a product with the inputs' mean.
            return rows.sum(0, dtype=torch.float64) / len(rows), rows.var(0, correction=0).double()
        # Sums over one image first: contiguous, many times faster than all dimensions at once.
        spatial, count = tuple(range(2, z.dim())), z.numel() // z.shape[1]
        mean = z.sum(spatial).double().sum(0) / count
        square = z.square().sum(spatial).double().sum(0) / count
        return mean, (square - mean.square()).clamp_min(0)

    def second_moment(self, x: Tensor) -> Tensor:
        """Sum over positions of the outer product of the columns, [d, d]."""
        if self.is_linear:
            rows = x.reshape(-1, x.shape[-1])
            return rows.T @ rows
        x, padding = self.prepare(x)
        if len(self.kernel) == 2:
            return mtz_ext.conv2d_second_moment(
                x, self.kernel, self.settings["stride"], padding, self.settings["dilation"], 1
            )[0]
        if len(self.kernel) == 1:
            sizes = [(1, self.kernel[0])] + [
                (neutral, value[0])
                for neutral, value in ((1, self.settings["stride"]), (0, padding), (1, self.settings["dilation"]))
            ]
            return mtz_ext.conv2d_second_moment(x.unsqueeze(2), *sizes, 1)[0]
        rows = self.unfold(x)
        return rows.T @ rows

    def cross_moment(self, x: Tensor, z: Tensor) -> Tensor:
        """Sum over positions of columns times output, [d, r]: the weight gradient of the layer for gradient ``z``."""
        if self.is_linear:
            rows = self.rows(z)
            shift = rows.mean(0)  # keeps the digits of a small covariance beside large means
            product = self.unfold(x).T @ (rows - shift)
            return torch.outer(self.column_sum(x), shift.double()).add_(product)
        x, padding = self.prepare(x)
        shape = (z.shape[1], x.shape[1], *self.kernel)
        gradient = (None, torch.nn.grad.conv1d_weight, torch.nn.grad.conv2d_weight, torch.nn.grad.conv3d_weight)
        weight = gradient[len(self.kernel)](x, shape, z, self.settings["stride"], padding, self.settings["dilation"])
        return weight.flatten(1).T

    def column_sum(self, x: Tensor) -> Tensor:
        """Sum over positions of the columns, [d]. Unfolds the sum over samples, which is one image."""
        if self.is_linear:
            return x.reshape(-1, x.shape[-1]).sum(0, dtype=torch.float64)
        # As a product over the values as they lie in memory: a reduction crawls where channels are last.
        last = x.movedim(1, -1).is_contiguous()
        values = x.movedim(1, -1) if last else x
        image = (x.new_ones(1, len(x)) @ values.reshape(len(x), -1)).view(1, *values.shape[1:])
        return self.unfold(image.movedim(-1, 1) if last else image).sum(0)


def enough(view: View, inputs: Sequence[Tensor], per_column: int, samples: int) -> list[int]:
    """Samples to take of every chunk: ``samples``, or more for ``per_column`` positions to a column.

    Positions of an image are many and alike; early layers of a convolutional network have a thousand times more of them
    than columns, and are where the time goes.
    """
    left = own_share(samples_for(view.columns(inputs[0]), view.positions(inputs[0][:1]), per_column, samples))
    sizes: list[int] = []
    for x in inputs:  # no chunk more than needed: they are computed when asked for
        sizes.append(min(len(x), left))
        left -= sizes[-1]
        if not left:
            break
    return [size for size in sizes if size]


def heads(chunks: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
    """The first so many samples of every chunk, as :func:`enough` says; chunks that are not needed left out."""
    return [chunks[at][:size] for at, size in enumerate(sizes)]


def collect(
    view: View, inputs: Iterable[Tensor], targets: Iterable[Tensor] | None = None, tasks: int = 1
) -> tuple[Moment, Target | None]:
    """Moments of a layer over calibration chunks; sample space where positions are fewer than columns.

    Args:
        view: how the layer reads its input.
        inputs: chunks of what it reads.
        targets: chunks of what it should output, or None.
        tasks: how many tasks are solved for together: the samples of all have to be fewer than the columns.

    Returns:
        The input's moment, and the target's if there are targets. All float64 but a large covariance; products over a
        chunk are taken in the input's precision (float32 for half precision, float64 where they are few), the sum over
        chunks in that of the result.
    """
    inputs = _merged([at_least_float32(x) for x in inputs], view)
    count = total(sum(view.positions(x) for x in inputs))
    if count * view.columns(inputs[0]) ** 2 <= SMALL:
        inputs = [x.double() for x in inputs]
    if targets is not None:
        targets = _split_like([at_least_float32(z).to(inputs[0].dtype) for z in targets], inputs)
    mean = total(sum(view.column_sum(x).double() for x in inputs)) / count
    if tasks * count < view.columns(inputs[0]):
        samples = gathered_rows(torch.cat([view.unfold(x).double() for x in inputs])).sub_(mean).div_(count**0.5)
        moment = Moment(count, mean, samples=samples)
    else:
        moment = Moment(count, mean, covariance=_covariance(view, inputs, mean, count))
    if targets is None:
        return moment, None
    means, variances = zip(*(view.output_statistics(z) for z in targets), strict=True)
    weights = [view.positions(x) / count for x in inputs]
    target_mean = total(sum(weight * m for weight, m in zip(weights, means, strict=True)))
    variance = total(
        sum(weight * (v + (m - target_mean).square()) for weight, m, v in zip(weights, means, variances, strict=True))
    )
    if moment.samples is not None:
        samples = gathered_rows(torch.cat([view.rows(z).double() for z in targets])).sub_(target_mean).div_(count**0.5)
        return moment, Target(target_mean, variance, samples=samples)
    cross = total(sum(view.cross_moment(x, z).double() for x, z in zip(inputs, targets, strict=True))) / count
    return moment, Target(target_mean, variance, cross=cross.sub_(torch.outer(mean, target_mean)))


def _covariance(view: View, inputs: list[Tensor], mean: Tensor, count: int) -> Tensor:
    dtype = torch.float64 if len(mean) < LARGE or inputs[0].dtype == torch.float64 else torch.float32
    if view.is_linear:  # centring first keeps the digits
        product = total(sum(view.second_moment(x - mean.to(x.dtype)).to(dtype) for x in inputs))
        rest = total(sum(view.column_sum(x - mean.to(x.dtype)).double() for x in inputs)) / count
    else:
        product, rest = total(sum(view.second_moment(x).to(dtype) for x in inputs)), mean
    rest = rest.to(dtype)
    covariance = product.div_(count).addr_(rest, rest, alpha=-1)
    # The operator's sums are symmetric to the last digit, a product's are not.
    return covariance if len(view.kernel) in (1, 2) else (covariance + covariance.T).div_(2)


def _merged(chunks: list[Tensor], view: View) -> list[Tensor]:
    """Chunks put together while they are small: over few positions, sums of matrices cost more than products."""
    merged: list[list[Tensor]] = []
    for x in chunks:
        if merged and sum(view.positions(y) for y in merged[-1]) + view.positions(x) <= MERGED:
            merged[-1].append(x)
        else:
            merged.append([x])
    return [xs[0] if len(xs) == 1 else torch.cat(xs) for xs in merged]


def _split_like(chunks: list[Tensor], like: list[Tensor]) -> list[Tensor]:
    """The same samples in as many chunks, of the same sizes, as ``like``."""
    sizes = [len(x) for x in like]
    return chunks if [len(x) for x in chunks] == sizes else list(torch.cat(chunks).split(sizes))


#: Positions up to which chunks are put together.
MERGED = 2**16

#: Columns from which a covariance is kept in the float32 that it is summed up in: the matrices are what takes the time.
LARGE = 1024

#: Multiplications up to which products are taken in float64: they cost some ten milliseconds at most.
SMALL = 1e9

#: Variance over squared mean below which a value is constant: what rounding leaves.
CONSTANT = 1e-10


def at_least_float32(x: Tensor) -> Tensor:
    """``x``, half precision as float32: what products and sums are taken in."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
