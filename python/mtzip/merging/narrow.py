"""Wide layers from few samples: the same problem over hardly more columns than there are samples.

Two tasks share all d columns of a layer and have n < d samples together, the rows of Z = R^T B^T with B [d, n]
orthonormal (a QR decomposition). Damping is the same for all columns, so turning them changes nothing: a row w falls
into its coordinates B^T w and a rest that no sample sees. Products over 25,088 columns become products over n.

The rests are damped, and nothing else happens to them. Those of two rows span a plane, so a joint row is fitted over
n + 2 columns, the last two along that plane: exactly the same fit. Pairing compares all rows with all; there the
products of all rests are added (:class:`.match.Rests`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..network.layout import Run
from .match import Rests
from .moments import Moment, is_whole
from .part import Part, Systems, column_energy

#: Columns from which it pays; and how many times the samples they must be.
WIDE, TIMES = 4096, 2

#: Square of a rest relative to that of its row below which it is rounding.
ROUNDING = 1e-12


def narrowed(systems: Systems, tasks: Sequence[int]) -> Narrow | None:
    """The narrow form of rows that some tasks store together; None where there is none, or it does not pay."""
    key = tuple(sorted(tasks))
    if key not in systems.narrow:
        systems.narrow[key] = Narrow(systems, key) if _pays(systems, key) else None
    return systems.narrow[key]


def _pays(systems: Systems, tasks: Sequence[int]) -> bool:
    parts = [systems.parts[task] for task in tasks]
    if len(parts) != 2 or any(part.inner > 1 or part.constant != "free" for part in parts):
        return False
    if any(part.support is not None for part in parts):  # zeros to keep are zeros of single columns
        return False
    if any(part.moment.samples is None or part.weight.shape[1] < WIDE for part in parts):
        return False
    _, system = systems.of(tasks)
    samples = sum(len(part.moment.samples) for part in parts)
    return system.is_whole(0) and system.is_whole(1) and TIMES * samples <= system.size


class Narrow:
    """Rows of two tasks over what their samples span.

    Args:
        systems: of the parts, whose rows may be reordered afterwards.
        tasks: the two, ascending.
    """

    def __init__(self, systems: Systems, tasks: Sequence[int]):
        self.parts = {task: systems.parts[task] for task in tasks}
        self._damping = {task: side.damping for task, side in zip(tasks, systems.of(tasks)[1].sides, strict=True)}
        counts = [len(part.moment.samples) for part in self.parts.values()]
        self._basis, upper = torch.linalg.qr(torch.cat([part.moment.samples for part in self.parts.values()]).T)
        self._samples = dict(zip(tasks, upper.T.split(counts), strict=True))
        for part in self.parts.values():
            part.coordinates = part.weight @ self._basis
        #: The parts over n + 2 columns, the last two zero: what rows are paired by, together with :meth:`rests`.
        self.systems = Systems({task: self._part(task, _padded(part.coordinates)) for task, part in self.parts.items()})

    def rests(self, rows: Mapping[int, Tensor], weighted: bool) -> Rests:
        """What rows of the two tasks have beside :attr:`systems`, to pair them by.

        Args:
            rows: task to rows of its part.
            weighted: whether they count by how much they matter.
        """
        (one, one_seen), (two, two_seen) = found = self._rows(rows)
        sizes = [_products(wide, wide) - _products(seen, seen) for wide, seen in found]
        across = (one @ two.T).sub_(one_seen @ two_seen.T)
        for at, (task, part) in enumerate(self.parts.items()):
            if weighted and part.weighting is not None:
                count = part.weighting[rows[task]]
                sizes[at] = sizes[at] * count.square()
                across *= count if at else count[:, None]
        weights = [part.alpha * self._damping[task] for task, part in self.parts.items()]
        return Rests(weights, sizes, across)

    def paired(self, rows: Mapping[int, Tensor]) -> tuple[Systems, Plane]:
        """Systems over n + 2 columns, the last two along the planes of the rests of ``rows``; and these planes."""
        plane = Plane.of(*self._rows(rows))
        parts = {}
        for task, along in zip(self.parts, plane.along, strict=True):
            weight = _padded(self.parts[task].coordinates)
            weight[rows[task], -2:] = along
            parts[task] = self._part(task, weight)
        return Systems(parts), plane

    def widened(self, theta: Tensor, rows: Mapping[int, Tensor], plane: Plane) -> Tensor:
        """Solved rows over all columns: [n + 2, r] to [d, r]."""
        seen, factors = theta[:-2].clone(), plane.factors(theta[-2:])
        found = self._rows(rows)
        for (_, own), factor in zip(found, factors, strict=True):
            seen.addcmul_(own.T, factor, value=-1)
        wide = self._basis @ seen
        for (own, _), factor in zip(found, factors, strict=True):
            wide.addcmul_(own.T, factor)
        return wide

    def _rows(self, rows: Mapping[int, Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Some rows of either task, [r, d], and their coordinates [r, n]."""
        found = []
        for task, part in self.parts.items():
            both = part.weight, part.coordinates
            found.append(both if is_whole(rows[task], len(part.weight)) else tuple(x[rows[task]] for x in both))
        return found

    def _part(self, task: int, weight: Tensor) -> Part:
        """A part with rows ``weight`` [r, n + 2]; the samples have nothing in the last two columns."""
        part, samples = self.parts[task], _padded(self._samples[task])
        moment = Moment(part.moment.count, samples.new_zeros(samples.shape[1]), samples=samples)
        damping = self._damping[task] / column_energy(moment)
        columns = (Run(tuple(self.parts), samples.shape[1]),)
        return replace(part, moment=moment, weight=weight, columns=columns, damping=damping, coordinates=None)


def _padded(rows: Tensor) -> Tensor:
    return torch.nn.functional.pad(rows, (0, 2))


def _products(one: Tensor, two: Tensor) -> Tensor:
    """Product of every row of one matrix with that of the other, without a third one."""
    return torch.einsum("rd,rd->r", one, two)


@dataclass
class Plane:
    """The planes that the rests a and b of pairs of rows span, axes e and f: a along e.

    Args:
        along: of a and of b, [r, 2] along e and f.
    """

    along: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> Plane:
        """From rows [r, d] and their coordinates [r, n], of either task."""

        def product(one: tuple[Tensor, Tensor], two: tuple[Tensor, Tensor]) -> Tensor:
            return _products(one[0], two[0]) - _products(one[1], two[1])

        def size(square: Tensor, of: Tensor) -> Tensor:
            return torch.where(square > ROUNDING * _products(of, of), square, 0).sqrt()

        a = size(product(first, first), first[0])
        there = torch.where(a > 0, product(first, second) / torch.where(a > 0, a, 1), 0)
        b = size(product(second, second) - there.square(), second[0])
        return cls((torch.stack([a, torch.zeros_like(a)], 1), torch.stack([there, b], 1)))

    def factors(self, along: Tensor) -> tuple[Tensor, Tensor]:
        """What to multiply a and b by, [r] each, for a point [2, r] of every plane."""
        (a, _), (there, b) = (x.unbind(1) for x in self.along)
        second = torch.where(b > 0, along[1] / torch.where(b > 0, b, 1), 0)
        first = torch.where(a > 0, (along[0] - second * there) / torch.where(a > 0, a, 1), 0)
        return first, second
