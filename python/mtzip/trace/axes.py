"""Axes of a network: which tensor dimensions must be ordered the same everywhere.

An *atom* is a channel dimension that some layer creates. Element-wise operations and residual adds unify atoms,
``flatten`` multiplies them, ``cat`` adds them: so a dimension of a tensor is a sequence of *segments*, each of them an
atom repeated ``outer`` times with ``inner`` elements to a channel. The index of element (o, c, i) of a segment is
``(o * size + c) * inner + i``.

Where only part of the orders of an atom is allowed, the atom is *refined*: from then on it is a sequence of segments
over other atoms. A channel dimension that is cut becomes the atoms of its pieces; one that is split into heads becomes
an atom of heads, ``inner`` being the size of a head. What is refined stays valid in every dimension it was used in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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
        uniform: all its channels carry the same values (padding, a broadcast), so that any order of them is as good.
        writers: paths of the layers whose rows lie on it, in graph order; filled when the graph has been walked.
    """

    size: int
    label: str | None = None
    pinned: str | None = None
    uniform: bool = False
    writers: list[str] = field(default_factory=list)


class Axes:
    """The atoms of one network, joined and refined as the analysis walks the graph."""

    def __init__(self) -> None:
        self._atoms: list[Atom] = []
        self._parent: list[int] = []  # union-find
        self._refined: dict[int, tuple[Segment, ...]] = {}

    # -- reading -----------------------------------------------------------------------------------------------

    def find(self, atom: int) -> int:
        """The representative of an atom's class."""
        while self._parent[atom] != atom:
            self._parent[atom] = self._parent[self._parent[atom]]
            atom = self._parent[atom]
        return atom

    def __getitem__(self, atom: int) -> Atom:
        """What is known of an atom. Of one that is refined only ``size`` means anything."""
        return self._atoms[self.find(atom)]

    def roots(self) -> list[int]:
        """Representatives of all classes that are not refined, oldest first."""
        return [atom for atom, parent in enumerate(self._parent) if parent == atom and atom not in self._refined]

    def length(self, segment: Segment) -> int:
        """Number of elements of a segment."""
        return segment.outer * self[segment.atom].size * segment.inner

    def size(self, dim: Dim) -> int:
        """Number of elements of a dimension."""
        return sum(self.length(segment) for segment in dim or ())

    def resolve(self, dim: Dim) -> Dim:
        """The same dimension in representatives that are not refined; repetitions side by side are one segment."""
        if dim is None:
            return None
        result: list[Segment] = []
        for segment in dim:
            for part in self._expand(segment):
                last = result[-1] if result else None
                if last is not None and (last.atom, last.inner) == (part.atom, part.inner):
                    result[-1] = Segment(part.atom, last.outer + part.outer, part.inner)
                else:
                    result.append(part)
        return tuple(result)

    def _expand(self, segment: Segment) -> list[Segment]:
        root = self.find(segment.atom)
        if root not in self._refined:
            return [Segment(root, segment.outer, segment.inner)]
        parts = self._refined[root] = self.resolve(self._refined[root])
        if len(parts) == 1:
            only = parts[0]
            return [Segment(only.atom, segment.outer * only.outer, only.inner * segment.inner)]
        return [Segment(part.atom, part.outer, part.inner * segment.inner) for part in parts] * segment.outer

    def is_free(self, dim: Dim) -> bool:
        """True if some atom of ``dim`` may be reordered, and it makes a difference."""
        atoms = [self._atoms[segment.atom] for segment in self.resolve(dim) or ()]
        return any(atom.pinned is None and atom.size > 1 and not atom.uniform for atom in atoms)

    def is_uniform(self, dim: Dim) -> bool:
        """True if the values along ``dim`` are all the same."""
        return dim is not None and all(self._atoms[segment.atom].uniform for segment in self.resolve(dim))

    def why_pinned(self, dim: Dim) -> str | None:
        """Why the first atom of ``dim`` that cannot be reordered cannot; None if all can."""
        reasons = (self._atoms[segment.atom].pinned for segment in self.resolve(dim) or ())
        return next((reason for reason in reasons if reason is not None), None)

    def index(self, dim: Dim, orders: dict[int, Tensor]) -> Tensor | None:
        """Index vector [size of dim] that reorders it when each atom is reordered by ``orders[representative]`` [n].

        None where no atom of ``dim`` is reordered.
        """
        dim = self.resolve(dim)
        if dim is None or not any(segment.atom in orders for segment in dim):
            return None
        parts, start = [], 0
        for segment in dim:
            size = self._atoms[segment.atom].size
            order = orders.get(segment.atom)
            order = torch.arange(size) if order is None else order.cpu()
            block = torch.arange(segment.outer)[:, None, None] * size + order[None, :, None]
            block = block * segment.inner + torch.arange(segment.inner)
            parts.append(block.flatten() + start)
            start += self.length(segment)
        return torch.cat(parts)

    # -- building ----------------------------------------------------------------------------------------------

    def new(self, size: int, label: str | None = None, pinned: str | None = None, uniform: bool = False) -> Dim:
        """A dimension that is a fresh atom."""
        self._atoms.append(Atom(size, label, pinned, uniform))
        self._parent.append(len(self._parent))
        return (Segment(len(self._parent) - 1),)

    def pin(self, dim: Dim, reason: str) -> None:
        """Forbids reordering the atoms of ``dim``; the first reason is kept."""
        for segment in self.resolve(dim) or ():
            atom = self._atoms[segment.atom]
            atom.pinned = atom.pinned or reason

    def refine(self, atom: int, dim: Dim, where: str = "refined") -> None:
        """Says that an atom is the sequence ``dim`` of segments over other atoms: only their orders are left to it.

        Raises:
            ValueError: ``dim`` has another size than the atom.
        """
        root, dim = self.find(atom), self.resolve(dim)
        known = self._atoms[root]
        if self.size(dim) != known.size:
            raise ValueError(f"dim must have the {known.size} elements of its atom, got {self.size(dim)}")
        if root in self._refined:
            self.unify(self._refined[root], dim, where)
        elif known.pinned is not None:
            self.pin(dim, known.pinned)
        elif dim != (Segment(root),):
            if any(segment.atom == root for segment in dim):
                self.pin(dim, f"{where} joins it with itself in another order")
                return
            for segment in dim:
                self._atoms[segment.atom].uniform &= known.uniform
            self._refined[root] = dim

    def multiply(self, dim: Dim, outer: int, inner: int) -> Dim:
        """``dim`` repeated ``outer`` times, every element of it ``inner`` times: a product with fixed dimensions."""
        if dim is None:
            return None
        return self.resolve(tuple(Segment(s.atom, s.outer, s.inner * inner) for s in self.resolve(dim)) * outer)

    def cut(self, dim: Dim, at: int, where: str) -> tuple[Dim, Dim]:
        """The first ``at`` elements of ``dim`` and the rest; an atom that is cut becomes the atoms of its pieces."""
        if dim is None:
            return None, None
        left: list[Segment] = []
        rest = list(self.resolve(dim))
        while at > 0 and rest:
            segment = rest.pop(0)
            if self.length(segment) <= at:
                left.append(segment)
                at -= self.length(segment)
                continue
            atom = self._atoms[segment.atom]
            repeats, offset = divmod(at, atom.size * segment.inner)
            if repeats:
                left.append(Segment(segment.atom, repeats, segment.inner))
                rest.insert(0, Segment(segment.atom, segment.outer - repeats, segment.inner))
                at = offset
            elif atom.pinned is None and offset % segment.inner == 0:
                before = offset // segment.inner
                pieces = [self.new(n, uniform=atom.uniform) for n in (before, atom.size - before)]
                self.refine(segment.atom, pieces[0] + pieces[1], where)
                rest = list(self.resolve((segment, *rest)))
            else:
                self.pin((segment,), f"{where} cuts it")
                sizes = (at, self.length(segment) - at)
                names = [None, None]
                if atom.label is not None:
                    whole = f"{atom.label}({segment.outer}x{segment.inner})"
                    names = [f"{whole}[:{at}]", f"{whole}[{at}:]"]
                first, second = (
                    self.new(n, name, atom.pinned, atom.uniform) for n, name in zip(sizes, names, strict=True)
                )
                left += first
                rest, at = [*second, *rest], 0
        return self.resolve(tuple(left)), self.resolve(tuple(rest))

    def unify(self, first: Dim, second: Dim, where: str) -> Dim:
        """One dimension for two that must be ordered alike.

        Where their structures differ both are refined to what they have in common: cut at each other's boundaries, and
        of two products the coarser blocks of either. Sizes that differ pin both.
        """
        if first is None or second is None:
            known = first or second
            if self.is_uniform(known):
                return None
            self.pin(known, f"{where} joins it with a tensor of unknown order")
            return known
        if self.size(first) != self.size(second):
            for dim in (first, second):
                self.pin(dim, f"{where} joins dimensions of different size")
            return first
        pairs = [(first, second)]
        while pairs:
            left, right = (self.resolve(dim) for dim in pairs.pop())
            if left == right:
                continue
            if len(left) == len(right) == 1:
                a, b = left[0], right[0]
                if (a.outer, a.inner) == (b.outer, b.inner):
                    self._join(a.atom, b.atom, where)
                elif self._common(a, b, where):
                    pairs.append((left, right))  # one step nearer to each other
                continue
            short = min(self.length(left[0]), self.length(right[0]))
            heads, tails = zip(*(self.cut(dim, short, where) for dim in (left, right)), strict=True)
            pairs += [tails, heads]
        return first

    def _common(self, a: Segment, b: Segment, where: str) -> bool:
        """Refines two products of equal length to the blocks that both can move; pins them where there are none."""
        outer, inner = math.lcm(a.outer, b.outer), math.lcm(a.inner, b.inner)
        length = self.length(a)
        pinned = self._atoms[a.atom].pinned or self._atoms[b.atom].pinned
        if pinned is None and length % (outer * inner) == 0 and length > outer * inner:
            common = self.new(length // (outer * inner))[0].atom
            for segment in (a, b):
                if segment.atom in self._refined:  # both products are of one atom
                    break
                part = Segment(common, outer // segment.outer, inner // segment.inner)
                self.refine(segment.atom, (part,), where)
            return True
        for segment in (a, b):
            self.pin((segment,), pinned or f"{where} joins dimensions of different structure")
        return False

    def _join(self, first: int, second: int, where: str) -> None:
        first, second = sorted((self.find(first), self.find(second)))
        if first == second:
            return
        keep, gone = self._atoms[first], self._atoms[second]
        if keep.uniform and not gone.uniform:
            keep.label = gone.label
        elif keep.label != gone.label and not gone.uniform:
            keep.pinned = keep.pinned or gone.pinned or f"{where} joins it with an input of the network"
            keep.label = None
        keep.pinned = keep.pinned or gone.pinned
        keep.uniform &= gone.uniform
        self._parent[second] = first

    def grid(self, dim: Dim, sizes: Sequence[int], position: int, where: str) -> list[Dim]:
        """Dimensions of the given sizes that ``dim`` is split into, ``position`` being the one that keeps an order.

        So ``dim`` is refined to what repeats alike in the dimensions before it and holds the ones behind it together.

        Raises:
            ValueError: ``sizes`` do not multiply to the size of ``dim``.
        """
        if math.prod(sizes) != self.size(dim):
            raise ValueError(f"sizes must multiply to {self.size(dim)}, got {list(sizes)}")
        before, behind = math.prod(sizes[:position]), math.prod(sizes[position + 1 :])
        piece, rest = self.cut(dim, self.size(dim) // before, where)
        while rest:
            other, rest = self.cut(rest, self.size(piece), where)
            self.unify(piece, other, where)
        # uniform as the dimension is, until it is joined with it
        kept = self.new(sizes[position], uniform=self.is_uniform(dim))
        self.unify(self.multiply(kept, 1, behind), piece, where)
        return [self.resolve(kept) if at == position else None for at in range(len(sizes))]

    def grid_positions(self, dim: Dim, sizes: Sequence[int]) -> list[int]:
        """Positions that ``grid`` can keep an order at, outermost first."""
        dim = self.resolve(dim)
        return [at for at, size in enumerate(sizes) if size > 1 and self._keeps(dim, sizes, at)]

    def _keeps(self, dim: tuple[Segment, ...], sizes: Sequence[int], position: int) -> bool:
        before, behind = math.prod(sizes[:position]), math.prod(sizes[position + 1 :])
        if len(dim) > 1 and before > 1:
            return True  # pieces of a concatenation become one order
        return any(
            self._atoms[s.atom].pinned is None
            and self.length(s) % (math.lcm(s.outer, before) * math.lcm(s.inner, behind)) == 0
            and self.length(s) > math.lcm(s.outer, before) * math.lcm(s.inner, behind)
            for s in dim
        )
