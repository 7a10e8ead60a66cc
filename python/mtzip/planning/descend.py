"""Matching axes that hang together, by coordinate descent on the functional difference.

What pairing an axis costs at a layer that writes it depends on how the columns of that layer are paired, and the layers
that read the axis depend on its pairing in turn. So the axes are matched one after another, again and again: to the
functional differences of all writers comes an estimate of what the readers pay, and a new pairing is kept only if the
true total of all layers that it touches falls.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import mtz_ext

from ..merging import match, pairing
from ..merging.columns import axis_rows
from ..merging.match import Slots
from ..merging.part import Part, Systems, positions
from ..merging.solve import SINGLE_PRECISION_FROM
from ..trace.axes import Dim
from ..trace.correspond import AxisGroup, LayerGroup
from .observe import Observed

#: Axes wider than this are paired greedily while descending, as the best assignment takes seconds. Those that several
#: layers write are assigned as asked for in the end; those that one layer writes, which the sweep matches once more
#: when it arrives there, are matched anew in the first round only.
WIDE = 1024

#: Private scales to try where a layer's columns are few; where they are many, each costs a factorisation, or where
#: BatchNorms bring the layers to one scale (measured on a ResNet-20 pair, ten draws: +0.2 +- 0.2 points).
RATIOS, ONE_RATIO = match.FEW_RATIOS, (1.0,)

#: Part of the total that a round has to take away for another one to follow.
LEAST = 1e-2

#: Bytes of distances that are kept while the columns of their layers stay as they are.
KEEP_DISTANCES = 2**29


@dataclass
class Distances:
    """What pairing the neurons of an axis costs in one group of layers that writes it.

    Args:
        columns: how what the layers read was stored: slots of its axes.
        values: [n, m].
        energy: half the variance of what the neurons put out, relative as the distances are.
        whole: whether the neurons are all rows of the layers, one each: so that distances are costs.
    """

    columns: list[Slots | None]
    values: Tensor
    energy: float
    whole: bool


class Descent:
    """The pairings of some axes and what they cost.

    Args:
        observed: the networks; its slots are changed.
        axes: to be matched, in graph order.
        counts: axis name to number of neurons to share.
        matching: "optimal" or "greedy".
        partial: names of axes whose slots any of their tasks may share; of all others all tasks share each.
    """

    def __init__(
        self,
        observed: Observed,
        axes: Sequence[AxisGroup],
        counts: Mapping[str, int],
        matching: str,
        partial: Collection[str] = (),
    ):
        self.observed, self.axes, self.counts, self.matching = observed, list(axes), counts, matching
        self._partial = partial
        by_layer = {
            (task, layer.path): group
            for group in observed.correspondence.layers
            for task, layer in group.layers.items()
        }
        self._writers = {
            id(axis): [by_layer[min((t, layer.path) for t, layer in writer.layers.items())] for writer in axis.writers]
            for axis in axes
        }
        self._readers = {id(axis): self._readers_of(axis) for axis in axes}
        self._costs: dict[int, float] = {}
        self._tried: dict[int, list[Slots | None]] = {}  # slots that the last attempt at an axis depended on
        self._known: dict[tuple[int, int], Distances] = {}

    def run(self, sweeps: int) -> float:
        """Matches every axis once in graph order, then descends; returns the total."""
        for axis in self.axes:
            if id(axis) not in self.observed.slots:
                self.observed.slots[id(axis)] = self._matched(axis, readers=False)
        self._costs = self._first_costs()
        for sweep in range(sweeps):
            before = sum(self._costs.values())
            axes = [axis for axis in self.axes if not (sweep and is_wide(axis) and self._writer_alone(axis))]
            if not any([self._improve(axis) for axis in axes]):
                break
            if sum(self._costs.values()) > (1 - LEAST) * before:
                break
        for axis in self.axes if sweeps and self.matching != "greedy" else ():
            if is_wide(axis) and not self._writer_alone(axis):
                self._improve(axis, self.matching)
        return sum(self._costs.values())

    def _writer_alone(self, axis: AxisGroup) -> bool:
        return len(self._writers[id(axis)]) == 1

    def _first_costs(self) -> dict[int, float]:
        """id of a group that writes an axis to its cost; the distances it takes are those of the first round."""
        costs: dict[int, float] = {}
        for axis in sorted(self.axes, key=lambda axis: -len(self._writers[id(axis)])):
            for group in self._writers[id(axis)]:
                if id(group) not in costs:
                    if len(axis.atoms) == 2 and not self._writer_alone(axis):
                        self._distances(group, axis)
                    costs[id(group)] = self._cost(group, axis)
        return costs

    @property
    def groups(self) -> list[LayerGroup]:
        """Groups of layers that write the axes."""
        found = {id(group): group for axis in self.axes for group in self._writers[id(axis)]}
        return list(found.values())

    def priced(self, axis: AxisGroup) -> Slots:
        """An axis matched once more, with what each of its pairs costs at the present pairings of the others."""
        return self._matched(axis, readers=False)

    def _readers_of(self, axis: AxisGroup) -> list[LayerGroup]:
        found = []
        for group in self.observed.correspondence.layers:
            for task, layer in group.layers.items():
                dim = self.observed.analyses[task].axes.resolve(layer.columns) or ()
                read = any(axis.atoms.get(task) == segment.atom for segment in dim)
                if read and layer.path in self.observed.moments[task]:
                    found.append(group)
                    break
        return found

    def _improve(self, axis: AxisGroup, matching: str | None = None) -> bool:
        """Matches one axis anew; keeps the pairing if the layers that write and read it cost less in total."""
        old = self.observed.slots[id(axis)]
        touched = {id(group): group for group in (*self._writers[id(axis)], *self._readers[id(axis)])}
        around = [slots for group in touched.values() for slots in (*self._columns(group), *self._rows(group))]
        tried = self._tried.get(id(axis))
        if matching is None and tried is not None and all(a is b for a, b in zip(tried, around, strict=True)):
            return False  # nothing that it depends on has changed: it would come to the same
        self._tried[id(axis)] = around
        new = self._matched(axis, readers=True, matching=matching)
        if torch.equal(old.table, new.table):
            return False
        touched = {key: group for key, group in touched.items() if key in self._costs}
        self.observed.slots[id(axis)] = new
        costs = {key: self._cost(group, axis) for key, group in touched.items()}
        before = sum(self._costs[key] for key in costs)
        if sum(costs.values()) < before * (1 - 1e-6):
            self._costs.update(costs)
            return True
        self.observed.slots[id(axis)] = old
        return False

    def _matched(self, axis: AxisGroup, readers: bool, matching: str | None = None) -> Slots:
        matching = matching or ("greedy" if is_wide(axis) else self.matching)
        if len(axis.atoms) != 2:
            groups = [self._written(group, axis) for group in self._writers[id(axis)]]
            groups = [group for group in groups if group is not None]
            settings = {"ratios": RATIOS, "partial": axis.name in self._partial, "sizes": axis.sizes}
            return pairing.match_axis(groups, self.counts[axis.name], "refit", matching, **settings)
        found = [self._distances(group, axis) for group in self._writers[id(axis)]]
        found = [distances for distances in found if distances is not None]
        extra = [self._reader_cost(group, axis) for group in self._readers[id(axis)]] if readers else []
        total = sum(distances.values for distances in found)
        total = sum((cost for cost in extra if cost is not None), total)
        pairs = mtz_ext.match_neurons(total, self.counts[axis.name], method=matching)
        costs = total[pairs[:, 0], pairs[:, 1]].cpu().double()
        tasks = sorted(axis.atoms)
        slots = match.slots_of(pairs.cpu(), tasks, [axis.sizes[task] for task in tasks], costs)
        slots.energy = sum(distances.energy for distances in found)
        return slots

    def _written(self, group: LayerGroup, axis: AxisGroup) -> tuple[Systems, dict[int, Tensor]] | None:
        """Systems of a group that writes an axis, and the rows of its neurons; None where one task alone does."""
        parts = self.observed.parts(group, rows_of=axis)
        parts = {task: part for task, part in parts.items() if task in axis.atoms}
        if len(parts) < 2:
            return None
        return Systems(parts), {t: axis_rows(p.analysis, p.layer.rows, axis.atoms[t]) for t, p in parts.items()}

    def _distances(self, group: LayerGroup, axis: AxisGroup) -> Distances | None:
        """What pairing the neurons of two tasks costs in a group; those known are taken while its columns stay."""
        key, columns = (id(group), id(axis)), self._columns(group)
        known = self._known.get(key)
        if known is not None and all(a is b for a, b in zip(known.columns, columns, strict=True)):
            return known
        self._known.pop(key, None)
        written = self._written(group, axis)
        if written is None:
            return None
        systems, rows = written
        whole = all(rows[task].shape == (len(part.weight), 1) for task, part in systems.parts.items())
        values = pairing.pair_distances(systems, rows, _ratios(systems.parts))
        energy = sum(
            part.alpha * float(part.target.variance[rows[task].flatten()].sum()) / 2
            for task, part in systems.parts.items()
        )
        found = Distances(columns, values, energy, whole)
        if values.nbytes + sum(other.values.nbytes for other in self._known.values()) <= KEEP_DISTANCES:
            self._known[key] = found
        return found

    def _columns(self, group: LayerGroup) -> list[Slots | None]:
        """How what a group reads is stored."""
        return self._stored({task: layer.columns for task, layer in group.layers.items()})

    def _rows(self, group: LayerGroup) -> list[Slots | None]:
        """How what a group writes is stored."""
        return self._stored({task: layer.rows for task, layer in group.layers.items()})

    def _stored(self, dims: Mapping[int, Dim]) -> list[Slots | None]:
        axis_of, analyses = self.observed.correspondence.axis_of, self.observed.analyses
        found = [
            axis_of(task, segment.atom)
            for task, dim in dims.items()
            for segment in analyses[task].axes.resolve(dim) or ()
        ]
        return [None if axis is None else self.observed.slots.get(id(axis)) for axis in found]

    def _cost(self, group: LayerGroup, axis: AxisGroup) -> float:
        """:meth:`cost`, from the distances on an axis that it writes where those are at hand."""
        known = self._known.get((id(group), id(axis)))
        if known is None or not known.whole:
            return self.cost(group)
        if not all(a is b for a, b in zip(known.columns, self._columns(group), strict=True)):
            return self.cost(group)
        slots, tasks = self.observed.slots[id(axis)], sorted(axis.atoms)
        pairs = slots.table[: slots.shared][:, tasks].to(known.values.device)
        return float(known.values[pairs[:, 0], pairs[:, 1]].sum(dtype=torch.float64))

    def _reader_cost(self, group: LayerGroup, axis: AxisGroup) -> Tensor | None:
        """Estimate [n, m] of what it costs two tasks' readers that channel i of one is paired with j of the other.

        Of the reader's parallel sum only the diagonal is used: sum over kernel positions u and paired rows of
        1/2 q_i q_j / (q_i + q_j) (a_iu - b_ju)^2.
        """
        parts = self.observed.parts(group)
        tasks = [task for task in parts if task in axis.atoms]
        if len(tasks) != 2:
            return None
        rows = _paired_rows(self.observed, parts)
        if rows is None:
            return None
        sides = []
        for task in tasks:
            part = parts[task]
            order = part.analysis.axes.index(part.layer.columns, self.observed.orders(task))
            columns = axis_rows(part.analysis, part.layer.columns, axis.atoms[task])
            if order is not None:  # from stored order back to the network's own
                columns = torch.argsort(order)[columns]
            inner = part.inner
            columns = (columns[:, :, None] * inner + torch.arange(inner)).flatten(1)
            weight = part.weight[rows[task]]
            sides.append(
                (weight[:, columns].permute(2, 1, 0), part.alpha * part.moment.diagonal().clamp_min(0)[columns].T)
            )
        (first, q_first), (second, q_second) = sides  # [u, n, r] and [u, n]
        q_first, q_second = q_first.to(first.dtype), q_second.to(first.dtype)
        total = q_first[:, :, None] + q_second[:, None]
        parallel = q_first[:, :, None] * q_second[:, None] / torch.where(total > 0, total, 1)
        distance = (first @ second.mT).mul_(-2).add_(first.square().sum(2)[:, :, None])
        return distance.add_(second.square().sum(2)[:, None]).mul_(parallel).sum(0).div_(2)

    def cost(self, group: LayerGroup) -> float:
        """Functional difference of all rows that tasks share in a group, at the present pairings."""
        parts = self.observed.parts(group)
        runs = self.observed.runs({task: part.layer.rows for task, part in parts.items()})
        systems = Systems(parts)
        total = 0.0
        for tasks in {run.tasks for task_runs in runs.values() for run in task_runs if len(run.tasks) > 1}:
            rows = {task: positions(runs[task], tasks, parts[task].weight.device) for task in tasks}
            total += float(pairing.shared_cost(systems, rows, _ratios(parts))[0].sum())
        return total


def is_wide(axis: AxisGroup) -> bool:
    """Whether an axis has too many neurons to be assigned again and again."""
    return max(axis.sizes.values()) > WIDE


def _ratios(parts: Mapping[int, Part]) -> tuple[float, ...]:
    """Private scales to try for a group of layers."""
    many = max(part.weight.shape[1] for part in parts.values()) >= SINGLE_PRECISION_FROM
    return ONE_RATIO if many or all(part.layer.norm is not None for part in parts.values()) else RATIOS


def _paired_rows(observed: Observed, parts: Mapping[int, Part]) -> dict[int, Tensor] | None:
    """Rows that all of some parts share, None where there are none."""
    runs = observed.runs({task: part.layer.rows for task, part in parts.items()})
    tasks = tuple(sorted(parts))
    rows = {task: positions(runs[task], tasks, parts[task].weight.device) for task in tasks}
    return rows if all(len(r) for r in rows.values()) and len({len(r) for r in rows.values()}) == 1 else None
