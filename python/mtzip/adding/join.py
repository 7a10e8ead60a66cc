"""How a task joins neurons that other tasks store already: which slot each of its neurons joins, and at what scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import mtz_ext

from ..merging import match, pairing
from ..merging.kept import KeptPart
from ..merging.match import Slots
from ..merging.part import Systems
from ..merging.solve import JointSystem, Side, rounded_scales
from ..network.layout import Layout, pieces


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
            (run.tasks, where.start + at)
            for run, where in pieces(layout.rows)
            for at in range(where.stop - where.start)
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


def joined_slots(slots: Slots, new: int, count: int, matching: str, writers: Sequence[Writer], method: str) -> Slots:
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
                tasks = [*present, new]
                scaled = method == "refit" and all(writer.systems.parts[task].scalable for task in tasks)
                scaled &= writer.neurons[new].shape[1] == 1
                scales = torch.ones(chosen.shape, dtype=torch.float64)
                if scaled:
                    rows = [writer.neurons[t][chosen[:, at], 0] for at, t in enumerate(present)]
                    scales = torch.stack([writer.scales[t].cpu()[r] for t, r in zip(present, rows, strict=True)], 1)
                    scales = rounded_scales(scales.T).T * torch.where(scales < 0, -1.0, 1.0)
                found, _ = pairing.joining_distances(writer.systems, writer.neurons, tasks, chosen, scales, method)
                if scaled and all(isinstance(writer.systems.parts[task], KeptPart) for task in present):
                    rows = dict(zip(present, rows, strict=True))
                    found = torch.minimum(found, _cost_as_stored(writer.systems, rows, new, writer.neurons[new][:, 0]))
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

    The new task's is the best of a few, by what all rows gain together; or the one that fits the rows as they are
    stored, where these would gain more even so.

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
    reference = torch.where(reference == 0, 1.0, reference)
    unknown, system = systems.of([*members, new])
    right = [
        system.scatter(at, parts[t].right_hand_side(side, rows[t], unknown.columns[t], weighted=True))
        for at, (side, t) in enumerate(zip(system.sides, [*members, new], strict=True))
    ]
    rounded = rounded_scales(start) * torch.where(start < 0, -1.0, 1.0)
    slot = sum(b * s.to(b) for b, s in zip(right[:-1], rounded, strict=True))
    values, which = torch.unique(rounded.abs(), dim=1, return_inverse=True)
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
    stored = slot.new_zeros(unknown.size, slot.shape[1])
    for task in members:
        row = parts[task].stored[rows[task]][:, unknown.columns[task]] * reference.to(slot).T
        stored[unknown.index[task].to(slot.device)] = row.T
    fitted, gain = _stored_scale(system, right, stored, start.to(slot), unknown.blocks.get((new,)))
    return {**dict(zip(members, start, strict=True)), new: torch.where(gain >= best, fitted, ratio).cpu()}


def _cost_as_stored(systems: Systems, rows: Mapping[int, Tensor], new: int, neurons: Tensor) -> Tensor:
    """What it costs [slots, n] that rows of a new task are scaled copies of stored ones: never less than at the best.

    Args:
        systems: of the parts.
        rows: earlier task to its rows [slots].
        new: the task that joins.
        neurons: [n] its rows.
    """
    parts = systems.parts
    unknown, system = systems.of([*rows, new])
    side = system.sides[-1]
    b = parts[new].right_hand_side(side, neurons.to(side.index.device), unknown.columns[new], weighted=True)
    theta = b.new_zeros(unknown.size, len(next(iter(rows.values()))))
    for task, own in rows.items():
        theta[unknown.index[task].to(b.device)] = parts[task].stored[own][:, unknown.columns[task]].T
    theta = system.gather(len(rows), theta)
    fits = _private_fits(side, unknown.blocks.get((new,)), torch.cat([b, side.apply(theta)], 1))
    alone, against = fits.split([b.shape[1], theta.shape[1]], 1)
    energy = (theta * side.apply(theta - against)).sum(0)
    across = theta.T @ (b - side.apply(alone))
    gain = torch.where(energy > 0, across.T.square() / torch.where(energy > 0, energy, 1), 0).T
    every = match.gain_alone(system, len(rows), b)
    return (every - (alone * b).sum(0) - gain).clamp_min(0) / 2


def _private_fits(side: Side, private: slice | None, right: Tensor) -> Tensor:
    """What the columns that one task alone has do for right-hand sides [d, r] by themselves; zero on all others."""
    fits = torch.zeros_like(right)
    if private is not None:
        at = ((side.index >= private.start) & (side.index < private.stop)).nonzero().flatten()
        block = Side(side.moment.select(at), torch.arange(len(at), device=at.device), side.alpha, side.damping)
        fits[at] = JointSystem([block], len(at)).factor([1.0], exact=True).solve(right[at])
    return fits


def _stored_scale(
    system: JointSystem, right: Sequence[Tensor], theta: Tensor, scales: Tensor, private: slice | None
) -> tuple[Tensor, Tensor]:
    """The scale [r] at which rows as they are stored fit the last task best, and what all gain at it, [r].

    Args:
        system: joint system of all tasks.
        right: b_t [size, r] of every task.
        theta: rows [size, r] as stored, zero on the columns that the last task alone has.
        scales: [sides - 1, r] of the earlier tasks.
        private: those columns, which are fitted too.
    """
    last = len(system.sides) - 1
    side, b, own = system.sides[last], system.gather(last, right[last]), system.gather(last, theta)
    image = side.apply(own)
    alone, against = _private_fits(side, private, torch.cat([b, image], 1)).split(b.shape[1], 1)
    energy = (own * (image - side.apply(against))).sum(0)
    scale = (own * (b - side.apply(alone))).sum(0) / energy.clamp_min(torch.finfo(energy.dtype).tiny)
    row = scale * (own - against) + alone
    gain = 2 * (row * b).sum(0) - (row * side.apply(row)).sum(0)
    for at, s in enumerate(scales):
        row = s * system.gather(at, theta)
        gain += 2 * (row * system.gather(at, right[at])).sum(0) - (row * system.sides[at].apply(row)).sum(0)
    possible = (energy > 0) & (scale != 0)
    return torch.where(possible, scale, 1.0), torch.where(possible, gain, -torch.inf)
