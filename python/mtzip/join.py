"""How a task joins neurons that other tasks store already: which slot each of its neurons joins, and at what scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import mtz_ext

from . import match, merge
from .layout import Layout, pieces
from .match import Slots
from .merge import Systems
from .solve import rounded_scales


@dataclass
class Writer:
    """Layers that write an axis, the new task's among them.

    Args:
        systems: of their parts.
        neurons: task to the rows [n, m] of each neuron in its part.
        scales: earlier task to the scale [r] of every row of its part.
    """

    systems: Systems
    neurons: Mapping[int, Tensor]
    scales: Mapping[int, Tensor]


def stored_slots(layouts: Mapping[int, Layout], first_rows: Mapping[int, Tensor], sizes: Mapping[int, int]) -> Slots:
    """Slots of an axis as earlier tasks store it, and as many of one new task that has joined none of them.

    Args:
        layouts: earlier task to the layout of a layer that writes the axis.
        first_rows: earlier task to the first row [n] of each neuron there.
        sizes: task to number of neurons; of all of them, the new one last by number.
    """
    keys = {}
    for task, layout in layouts.items():
        of_row = [
            (run.tasks, where.start + at) for run, where in pieces(layout.rows) for at in range(where.stop - where.start)
        ]
        keys[task] = [of_row[row] for row in first_rows[task].tolist()]
    new = max(sizes)
    heads, table = dict.fromkeys(keys, 0), []
    while left := [task for task, at in heads.items() if at < len(keys[task])]:
        # The order of every task is kept: next is a slot that all its tasks have come to.
        for task in left:
            owners, _ = key = keys[task][heads[task]]
            members = [t for t in owners if t in keys]
            if all(heads[t] < len(keys[t]) and keys[t][heads[t]] == key for t in members):
                break
        else:
            raise AssertionError("tasks store the slots of an axis in different orders")
        row = [-1] * (new + 1)
        for t in members:
            row[t] = heads[t]
            heads[t] += 1
        table.append(row)
    own = torch.full((sizes[new], new + 1), -1)
    own[:, new] = torch.arange(sizes[new])
    return Slots(torch.cat([torch.tensor(table).view(-1, new + 1), own]))


def joined_slots(
    slots: Slots, new: int, count: int, matching: str, writers: Sequence[Writer], method: str
) -> Slots:
    """Lets ``count`` neurons of a new task join the slots that cost least: the parallel sum with all who share them.

    Args:
        slots: of :func:`stored_slots`; their order stays.
        new: index of the task.
        count: neurons to join.
        matching: "optimal" or "greedy".
        writers: layers that write the axis; their differences are added up.
        method: "average", "mtz" or "refit".
    """
    table = slots.table[(slots.table[:, :new] >= 0).any(1)]
    size = int((slots.table[:, new] >= 0).sum())
    distances = torch.zeros(len(table), size, dtype=torch.float64)
    for members, where in _by_members(table, new).items():
        for writer in writers:
            present = [task for task in members if task in writer.neurons]
            if present:
                chosen = table[where][:, present]
                scales = torch.stack(
                    [writer.scales[t].cpu()[writer.neurons[t][chosen[:, at], 0]] for at, t in enumerate(present)], 1
                )
                scales = rounded_scales(scales.T).T * torch.where(scales < 0, -1.0, 1.0)
                tasks = [*present, new]
                found, _ = merge.joining_distances(writer.systems, writer.neurons, tasks, chosen, scales, method)
                distances[where] += found.cpu().double()
    return joined_at(slots, new, distances, count, matching)


def joined_at(slots: Slots, new: int, distances: Tensor, count: int, matching: str) -> Slots:
    """The same from costs [slots, neurons] that are known."""
    earlier = (slots.table[:, :new] >= 0).any(1)
    table, size = slots.table[earlier].clone(), distances.shape[1]
    pairs = mtz_ext.match_neurons(distances.contiguous(), count, method=matching).cpu()
    table[pairs[:, 0], new] = pairs[:, 1]
    free = torch.ones(size, dtype=torch.bool)
    free[pairs[:, 1]] = False
    own = torch.full((int(free.sum()), table.shape[1]), -1)
    own[:, new] = free.nonzero().flatten()
    return Slots(torch.cat([table, own]), distances[pairs[:, 0], pairs[:, 1]])


def _by_members(table: Tensor, new: int) -> dict[tuple[int, ...], Tensor]:
    """Set of earlier tasks to the slots that exactly they share."""
    found: dict[tuple[int, ...], list[int]] = {}
    for at, row in enumerate(table[:, :new].tolist()):
        found.setdefault(tuple(task for task, neuron in enumerate(row) if neuron >= 0), []).append(at)
    return {members: torch.tensor(where) for members, where in found.items()}


def joining_scales(systems: Systems, rows: Mapping[int, Tensor], scales: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """Private scales [r] that rows start from when a task joins them, relative to the largest of the earlier ones.

    The new task's is the best of a few, by what all rows gain together.

    Args:
        systems: of the parts.
        rows: task to rows of its part, all of the same length; the last task is the one that joins.
        scales: earlier task to the scale [r] of each of these rows.
    """
    *members, new = sorted(rows)
    parts = {task: systems.parts[task] for task in rows}
    start = torch.stack([scales[task] for task in members]).double().cpu()
    reference = start.gather(0, start.abs().argmax(0, keepdim=True))
    start = torch.where(reference == 0, 1.0, start / torch.where(reference == 0, 1.0, reference))
    unknown, system = systems.of([*members, new])
    right = [
        system.scatter(at, parts[t].right_hand_side(side, rows[t], unknown.columns[t], weighted=True))
        for at, (side, t) in enumerate(zip(system.sides, [*members, new], strict=True))
    ]
    slot = sum(b * s.to(b) for b, s in zip(right[:-1], start, strict=True))
    values, which = torch.unique(rounded_scales(start), dim=1, return_inverse=True)
    best, ratio = torch.full_like(slot[0], -torch.inf), torch.ones_like(slot[0])
    for at, value in enumerate(values.T.tolist()):
        chosen = (which == at).nonzero().flatten().to(slot.device)
        one, two = slot[:, chosen], right[-1][:, chosen]
        for r in match.FEW_RATIOS:
            first, second = system.factor([*value, r]).solve(torch.cat([one, two], 1)).split(len(chosen), 1)
            across = (one * second).sum(0)
            gain = (one * first).sum(0) + r * r * (two * second).sum(0) + 2 * r * across.abs()
            better = gain > best[chosen]
            best[chosen] = torch.where(better, gain, best[chosen])
            ratio[chosen] = torch.where(better, r * torch.where(across < 0, -1.0, 1.0).to(gain), ratio[chosen])
    return {**dict(zip(members, start, strict=True)), new: ratio.cpu()}
