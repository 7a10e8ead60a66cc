"""Which neurons of several tasks share a slot: one task after another joins the slots that there are.

*Common* slots are joined by all tasks. *Partial* ones are not: a neuron joins any slot of the earlier tasks where that
costs least, one that all of them share, one that some do, or the neuron of a single one. As many neurons are stored
either way. How many of the joins each task takes is up to their costs: all are held to one price, which is found by
bisection.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

import mtz_ext

#: ``cost(members, neurons, scales, new)``: what it costs [slots, n] that each of the n neurons of task ``new`` joins
#: slots of the earlier tasks ``members``, with their neurons and private scales [slots, members]; and the best ratio
#: [slots, n] of its private scale, None where that is not searched for.
Cost = Callable[[tuple[int, ...], Tensor, Tensor, int], tuple[Tensor, Tensor | None]]


@dataclass
class Formed:
    """Slots as formed so far.

    Args:
        table: [slots, tasks] neuron of every task, -1 where it is not part of one.
        costs: [slots] float64.
        scales: [slots, tasks] float64 private scales.
    """

    table: Tensor
    costs: Tensor
    scales: Tensor

    def used_by(self, least: int) -> Formed:
        """Those that so many tasks use, or more."""
        kept = (self.table >= 0).sum(1) >= least
        return Formed(self.table[kept], self.costs[kept], self.scales[kept])


@dataclass
class Forming:
    """Forms the slots of one axis.

    Args:
        sizes: number of neurons of every task; tasks are numbered from zero here.
        cost: of joining.
    """

    sizes: Sequence[int]
    cost: Cost
    _alone: dict[tuple[int, int], tuple[Tensor, Tensor | None]] = field(default_factory=dict)
    _known: dict[tuple, tuple[Tensor, Tensor | None]] = field(default_factory=dict)

    def form(self, count: int, matching: str, partial: bool) -> Formed:
        """The shared slots.

        Args:
            count: slots that all tasks share, at most the least size.
            matching: "optimal" or "greedy".
            partial: as many joins of a neuron to a slot as make these, whichever tasks they are of, where those cost
                less.
        """
        further = len(self.sizes) - 1
        if not count:
            return self._first().used_by(2)
        common = self._form([count] * further, matching, common=True)
        if not partial or further == 1:
            return common
        some = self._form(self._split(count * further), matching, common=False)
        return some if some.costs.sum() < common.costs.sum() else common

    def _split(self, joins: int) -> list[int]:
        """How many neurons of each task after the first join: those that cost no more than one price for all."""
        prices = torch.cat(self._at_price(torch.inf)).sort().values.tolist()
        low, high = 0, len(prices) - 1
        while low < high:
            middle = (low + high) // 2
            if sum(map(len, self._at_price(prices[middle]))) < joins:
                low = middle + 1
            else:
                high = middle
        wanted = [len(costs) for costs in self._at_price(prices[low])]
        # Costs may tie, and matching at another price is another one: exactly so many in all.
        slots, found = self.sizes[0], []
        for at, size in enumerate(self.sizes[1:]):
            least = joins - sum(self.sizes[at + 2 :])
            found.append(max(least, min(wanted[at], size, slots, joins), 0))
            joins -= found[-1]
            slots += size - found[-1]
        return found

    def _at_price(self, price: float) -> list[Tensor]:
        """Costs of the joins that each task after the first makes if none may cost more, matched greedily."""
        formed, found = self._first(), []
        for new in range(1, len(self.sizes)):
            distances, ratios = self._distances(formed, new)
            pairs = mtz_ext.match_neurons(distances.clamp(max=price), method="greedy")
            costs = distances[pairs[:, 0], pairs[:, 1]]
            pairs = pairs[costs <= price]
            found.append(costs[costs <= price].cpu().double())
            formed = self._joined(formed, new, pairs, distances, ratios)
        return found

    def _form(self, counts: Sequence[int], matching: str, common: bool) -> Formed:
        formed = self._first()
        for new, count in enumerate(counts, 1):
            distances, ratios = self._distances(formed, new)
            pairs = mtz_ext.match_neurons(distances, count, method=matching)
            formed = self._joined(formed, new, pairs, distances, ratios)
            if common:
                formed = formed.used_by(new + 1)
        return formed.used_by(2)

    def _first(self) -> Formed:
        """The neurons of the first task, each a slot."""
        table = torch.full((self.sizes[0], len(self.sizes)), -1)
        table[:, 0] = torch.arange(self.sizes[0])
        return Formed(table, torch.zeros(len(table), dtype=torch.float64), torch.ones(table.shape, dtype=torch.float64))

    def _joined(self, formed: Formed, new: int, pairs: Tensor, distances: Tensor, ratios: Tensor | None) -> Formed:
        """The slots after some neurons of a task have joined some, and all its others as slots of their own."""
        where, neurons = pairs.cpu().unbind(1)
        table, costs, scales = formed.table.clone(), formed.costs.clone(), formed.scales.clone()
        table[where, new] = neurons
        costs[where] += distances[pairs[:, 0], pairs[:, 1]].cpu().double()
        if ratios is not None:
            scales[where, new] = ratios[pairs[:, 0], pairs[:, 1]].cpu().double()
        free = torch.ones(self.sizes[new], dtype=torch.bool)
        free[neurons] = False
        own = torch.full((int(free.sum()), table.shape[1]), -1)
        own[:, new] = free.nonzero().flatten()
        ones = torch.ones(own.shape, dtype=torch.float64)
        return Formed(torch.cat([table, own]), torch.cat([costs, ones[:, 0] * 0]), torch.cat([scales, ones]))

    def _distances(self, formed: Formed, new: int) -> tuple[Tensor, Tensor | None]:
        """Costs and ratios [slots, n] of joining each slot."""
        sets: dict[tuple[int, ...], list[int]] = {}
        for slot, row in enumerate((formed.table[:, :new] >= 0).tolist()):
            sets.setdefault(tuple(at for at, there in enumerate(row) if there), []).append(slot)
        found = {}
        for members, slots in sets.items():
            neurons, scales = formed.table[slots][:, members], formed.scales[slots][:, members]
            alone = len(members) == 1
            costs = self._of_one(members[0], neurons, new) if alone else self._of_several(members, neurons, scales, new)
            found[members] = costs
        if len(sets) == 1:
            return next(iter(found.values()))
        costs = torch.cat([costs for costs, _ in found.values()])
        order = torch.argsort(torch.tensor([slot for slots in sets.values() for slot in slots]))
        ratios = [ratios for _, ratios in found.values()]
        searched = all(ratio is not None for ratio in ratios)
        return costs[order], torch.cat(ratios)[order] if searched else None

    def _of_one(self, member: int, neurons: Tensor, new: int) -> tuple[Tensor, Tensor | None]:
        """Of slots that one task alone uses: those of all its neurons are taken at once, and kept."""
        if (member, new) not in self._alone:
            every = torch.arange(self.sizes[member])[:, None]
            ones = torch.ones(every.shape, dtype=torch.float64)
            self._alone[member, new] = self.cost((member,), every, ones, new)
        if len(neurons) == self.sizes[member]:
            return self._alone[member, new]
        return _rows(self._alone[member, new], neurons[:, 0])

    def _of_several(
        self, members: tuple[int, ...], neurons: Tensor, scales: Tensor, new: int
    ) -> tuple[Tensor, Tensor | None]:
        """Of slots that several tasks share: those not known yet, as the same ones come again at another price."""
        keys = [(new, members, tuple(row)) for row in neurons.tolist()]
        missing = [at for at, key in enumerate(keys) if key not in self._known]
        if missing:
            costs, ratios = self.cost(members, neurons[missing], scales[missing], new)
            for row, at in enumerate(missing):
                self._known[keys[at]] = costs[row], None if ratios is None else ratios[row]
        costs, ratios = zip(*(self._known[key] for key in keys), strict=True)
        return torch.stack(costs), None if ratios[0] is None else torch.stack(ratios)


def _rows(found: tuple[Tensor, Tensor | None], rows: Tensor) -> tuple[Tensor, Tensor | None]:
    return found[0][rows], None if found[1] is None else found[1][rows]
