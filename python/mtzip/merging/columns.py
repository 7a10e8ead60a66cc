"""How the rows and columns of corresponding layers are shared, and where a column lies in the unknown of a system."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..network.layout import Run, merge_runs
from ..trace.analysis import Analysis
from ..trace.axes import Dim
from ..trace.correspond import AxisGroup
from .match import Slots


def dimension_runs(
    dims: Mapping[int, Dim], analyses: Sequence[Analysis], slots: Mapping[int, Slots], axis_of
) -> dict[int, tuple[Run, ...]]:
    """Runs of corresponding dimensions of several tasks, in stored order.

    Neurons are shared where all tasks have corresponding segments: the same axis (then its slots say which neurons), or
    a dimension whose order the inputs give, of equal size and place.

    Args:
        dims: task to the dimension of its weight.
        analyses: of all tasks.
        slots: id of an axis group to how its neurons are stored.
        axis_of: (task, atom) to the axis group or None.
    """
    dims = {task: analyses[task].axes.resolve(dim) for task, dim in dims.items()}
    result = {}
    for task, dim in dims.items():
        runs: list[Run] = []
        for at, segment in enumerate(dim):
            axis: AxisGroup | None = axis_of(task, segment.atom)
            atom = analyses[task].axes[segment.atom]
            partners = [task]
            for other, theirs in dims.items():
                if other == task or at >= len(theirs):
                    continue
                their_atom = analyses[other].axes[theirs[at].atom]
                same_place = (theirs[at].outer, theirs[at].inner) == (segment.outer, segment.inner)
                same_axis = axis is not None and axis_of(other, theirs[at].atom) is axis
                given = atom.label is not None and (atom.label, atom.size) == (their_atom.label, their_atom.size)
                if same_place and (same_axis or given):
                    partners.append(other)
            partners = sorted(partners)
            if axis is not None and id(axis) in slots:
                once = slots[id(axis)].runs(task, partners)
            elif atom.label is not None:
                once = (Run(tuple(partners), atom.size),)
            else:
                once = (Run((task,), atom.size),)
            scaled = [Run(run.tasks, run.size * segment.inner) for run in once]
            runs += scaled * segment.outer
        result[task] = merge_runs(runs)
    return result


def axis_rows(analysis: Analysis, dim: Dim, atom: int) -> Tensor:
    """Positions [n, m] of the m elements that each of the n neurons of an atom has on a dimension."""
    found, start = [], 0
    for segment in analysis.axes.resolve(dim):
        size = analysis.axes[segment.atom].size
        total = segment.outer * size * segment.inner
        if segment.atom == atom:
            places = torch.arange(start, start + total).view(segment.outer, size, segment.inner)
            found.append(places.transpose(0, 1).reshape(size, -1))
        start += total
    return torch.cat(found, 1)


@dataclass
class Unknown:
    """The unknown of a joint system.

    Args:
        size: number of unknown columns.
        index: task to position [d_t] of each of its columns.
        blocks: tasks that store a block to its slice of the unknown.
        columns: task to which of its columns are unknown at all, [d_t].
    """

    size: int
    index: dict[int, Tensor]
    blocks: dict[tuple[int, ...], slice]
    columns: dict[int, Tensor]


def unknown_columns(
    runs: Mapping[int, Sequence[Run]], members: Sequence[int], inner: int, shared_only: bool = False
) -> Unknown:
    """Lays out the columns that rows stored by ``members`` have.

    Args:
        runs: task to the runs of its columns.
        members: tasks that store the rows.
        inner: columns per unit of a run (kernel positions).
        shared_only: leave out columns that one task alone has.
    """
    blocks: dict[tuple[int, ...], slice] = {}
    index: dict[int, Tensor] = {}
    columns: dict[int, Tensor] = {}
    size = 0
    for task in members:
        taken: dict[tuple[int, ...], int] = {}
        totals: dict[tuple[int, ...], int] = {}
        for run in runs[task]:
            tasks = _owners(run, members)
            totals[tasks] = totals.get(tasks, 0) + run.size * inner
        for tasks, total in totals.items():
            if tasks not in blocks and not (shared_only and len(tasks) == 1):
                blocks[tasks] = slice(size, size + total)
                size += total
        places, chosen, position = [], [], 0
        for run in runs[task]:
            tasks, width = _owners(run, members), run.size * inner
            if tasks in blocks:
                start = blocks[tasks].start + taken.get(tasks, 0)
                places.append(torch.arange(start, start + width))
                chosen.append(torch.arange(position, position + width))
                taken[tasks] = taken.get(tasks, 0) + width
            position += width
        empty = torch.zeros(0, dtype=torch.int64)
        index[task] = torch.cat(places) if places else empty
        columns[task] = torch.cat(chosen) if chosen else empty
    return Unknown(size, index, blocks, columns)


def _owners(run: Run, members: Sequence[int]) -> tuple[int, ...]:
    return tuple(task for task in run.tasks if task in members)
