"""Axes of a network: which tensor dimensions must be ordered the same everywhere.

An *atom* is a channel dimension that some layer creates. Element-wise operations and residual adds unify atoms,
``flatten`` multiplies them, ``cat`` adds them: so a dimension of a tensor is a sequence of *segments*, each of them an
atom repeated ``outer`` times with ``inner`` elements to a channel. The index of element (o, c, i) of a segment is
``(o * size + c) * inner + i``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segment:
    """``outer`` repetitions of an atom, ``inner`` consecutive elements to each of its channels."""

    atom: int
    outer: int = 1
    inner: int = 1


#: What is known of one dimension of a tensor: its segments, or None (batch, spatial, unknown: nothing to reorder).
Dim = tuple[Segment, ...] | None


@dataclass
class Atom:
    """One channel dimension.

    Args:
        size: number of channels.
        label: for a dimension whose order is given from outside (an input), what it is: equal labels correspond.
        pinned: why its channels cannot be reordered or shared; None where they can.
        writers: paths of the layers whose rows lie on it.
    """

    size: int
    label: str | None = None
    pinned: str | None = None
    writers: list[str] = field(default_factory=list)


class Axes:
    """The atoms of one network, joined as the analysis walks the graph (union-find)."""

    def __init__(self) -> None:
        self._atoms: list[Atom] = []
        self._parent: list[int] = []

    def new(self, size: int, label: str | None = None, pinned: str | None = None) -> Dim:
        """A dimension that is a fresh atom."""
        self._atoms.append(Atom(size, label, pinned))
        self._parent.append(len(self._parent))
        return (Segment(len(self._parent) - 1),)

    def find(self, atom: int) -> int:
        """The representative of an atom's class."""
        while self._parent[atom] != atom:
            self._parent[atom] = self._parent[self._parent[atom]]
            atom = self._parent[atom]
        return atom

    def __getitem__(self, atom: int) -> Atom:
        return self._atoms[self.find(atom)]

    def roots(self) -> list[int]:
        """Representatives of all classes, oldest first."""
        return [atom for atom in range(len(self._parent)) if self._parent[atom] == atom]

    def size(self, dim: Dim) -> int:
        """Number of elements of a dimension."""
        return sum(segment.outer * self[segment.atom].size * segment.inner for segment in dim or ())

    def pin(self, dim: Dim, reason: str) -> None:
        """Forbids reordering the atoms of ``dim``; the first reason is kept."""
        for segment in dim or ():
            atom = self[segment.atom]
            atom.pinned = atom.pinned or reason

    def is_free(self, dim: Dim) -> bool:
        """True if some atom of ``dim`` may be reordered."""
        return any(self[segment.atom].pinned is None for segment in dim or ())

    def unify(self, first: Dim, second: Dim, where: str) -> Dim:
        """One dimension for two that must be ordered alike; pins both where their structure differs."""
        if first is None or second is None:
            known = first or second
            self.pin(known, f"{where} joins it with a tensor of unknown order")
            return known
        alike = len(first) == len(second) and all(
            (a.outer, a.inner, self[a.atom].size) == (b.outer, b.inner, self[b.atom].size)
            for a, b in zip(first, second, strict=True)
        )
        if not alike:
            for dim in (first, second):
                self.pin(dim, f"{where} joins dimensions of different structure")
            return first
        for a, b in zip(first, second, strict=True):
            self._join(a.atom, b.atom, where)
        return first

    def _join(self, first: int, second: int, where: str) -> None:
        first, second = sorted((self.find(first), self.find(second)))
        if first == second:
            return
        keep, gone = self._atoms[first], self._atoms[second]
        if keep.label != gone.label:
            keep.pinned = keep.pinned or gone.pinned or f"{where} joins it with an input of the network"
            keep.label = None
        keep.pinned = keep.pinned or gone.pinned
        keep.writers += [writer for writer in gone.writers if writer not in keep.writers]
        self._parent[second] = first

    def resolve(self, dim: Dim) -> Dim:
        """The same segments with every atom replaced by its representative."""
        return dim and tuple(Segment(self.find(s.atom), s.outer, s.inner) for s in dim)

    def index(self, dim: Dim, orders: dict[int, Tensor]) -> Tensor | None:
        """Index vector [size of dim] that reorders it when each atom is reordered by ``orders[representative]`` [n].

        None where no atom of ``dim`` is reordered.
        """
        if dim is None or not any(self.find(segment.atom) in orders for segment in dim):
            return None
        parts, start = [], 0
        for segment in dim:
            size = self[segment.atom].size
            order = orders.get(self.find(segment.atom))
            order = torch.arange(size) if order is None else order.cpu()
            block = torch.arange(segment.outer)[:, None, None] * size + order[None, :, None]
            block = block * segment.inner + torch.arange(segment.inner)
            parts.append(block.flatten() + start)
            start += segment.outer * size * segment.inner
        return torch.cat(parts)
