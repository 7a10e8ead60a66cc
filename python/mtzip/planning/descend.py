"""Matching axes that hang together, by coordinate descent on the functional difference.

What pairing an axis costs at a layer that writes it depends on how the columns of that layer are paired, and the layers
that read the axis depend on its pairing in turn. So the axes are matched one after another, again and again: to the
functional differences of all writers comes an estimate of what the readers pay, and a new pairing is kept only if the
true total of all layers that it touches falls.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..merging import merge
from ..merging.columns import axis_rows
from ..merging.match import Slots
from ..merging.merge import Part, Systems
from ..trace.correspond import AxisGroup, LayerGroup
from .observe import Observed

#: Axes wider than this keep their first pairing: matching one again costs seconds, and those inside a block are matched
#: once more when the sweep arrives at them.
WIDE = 1024


class Descent:
    """The pairings of some axes and what they cost.

    Args:
        observed: the networks; its slots are changed.
        axes: to be matched, in graph order.
        counts: axis name to number of neurons to share.
        matching: "optimal" or "greedy".
    """

    def __init__(self, observed: Observed, axes: Sequence[AxisGroup], counts: Mapping[str, int], matching: str):
        self.observed, self.axes, self.counts, self.matching = observed, list(axes), counts, matching
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

    def run(self, sweeps: int) -> float:
        """Matches every axis once in graph order, then descends; returns the total."""
        for axis in self.axes:
            if id(axis) not in self.observed.slots:
                self.observed.slots[id(axis)] = self._matched(axis, readers=False)
        self._costs = {id(group): self.cost(group) for group in self.groups}
        for _ in range(sweeps):
            if not any([self._improve(axis) for axis in self.axes]):
                break
        return sum(self._costs.values())

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

    def _improve(self, axis: AxisGroup) -> bool:
        """Matches one axis anew; keeps the pairing if the layers that write and read it cost less in total."""
        if max(axis.sizes.values()) > WIDE:
            return False
        old = self.observed.slots[id(axis)]
        new = self._matched(axis, readers=True)
        if torch.equal(old.table, new.table):
            return False
        touched = {id(group): group for group in (*self._writers[id(axis)], *self._readers[id(axis)])}
        touched = {key: group for key, group in touched.items() if key in self._costs}
        self.observed.slots[id(axis)] = new
        costs = {key: self.cost(group) for key, group in touched.items()}
        before = sum(self._costs[key] for key in costs)
        if sum(costs.values()) < before * (1 - 1e-6):
            self._costs.update(costs)
            return True
        self.observed.slots[id(axis)] = old
        return False

    def _matched(self, axis: AxisGroup, readers: bool) -> Slots:
        groups = []
        for group in self._writers[id(axis)]:
            parts = self.observed.parts(group, rows_of=axis)
            parts = {task: part for task, part in parts.items() if task in axis.atoms}
            if len(parts) == len(axis.atoms):
                rows = {t: axis_rows(p.analysis, p.layer.rows, axis.atoms[t]) for t, p in parts.items()}
                groups.append((Systems(parts), rows))
        extra = [self._reader_cost(group, axis) for group in self._readers[id(axis)]] if readers else []
        extra = [cost for cost in extra if cost is not None]
        return merge.match_axis(groups, self.counts[axis.name], "refit", self.matching, extra)

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
        total = q_first[:, :, None] + q_second[:, None]
        parallel = q_first[:, :, None] * q_second[:, None] / torch.where(total > 0, total, 1)
        distance = first.square().sum(2)[:, :, None] + second.square().sum(2)[:, None] - 2 * first @ second.mT
        return (parallel * distance).sum(0) / 2

    def cost(self, group: LayerGroup) -> float:
        """Functional difference of all rows that tasks share in a group, at the present pairings."""
        parts = self.observed.parts(group)
        runs = self.observed.runs({task: part.layer.rows for task, part in parts.items()})
        systems = Systems(parts)
        total = 0.0
        for tasks in {run.tasks for task_runs in runs.values() for run in task_runs if len(run.tasks) > 1}:
            rows = {task: merge.positions(runs[task], tasks, parts[task].weight.device) for task in tasks}
            total += float(merge.shared_cost(systems, rows)[0].sum())
        return total


def _paired_rows(observed: Observed, parts: Mapping[int, Part]) -> dict[int, Tensor] | None:
    """Rows that all of some parts share, None where there are none."""
    runs = observed.runs({task: part.layer.rows for task, part in parts.items()})
    tasks = tuple(sorted(parts))
    rows = {task: merge.positions(runs[task], tasks, parts[task].weight.device) for task in tasks}
    return rows if all(len(r) for r in rows.values()) and len({len(r) for r in rows.values()}) == 1 else None
