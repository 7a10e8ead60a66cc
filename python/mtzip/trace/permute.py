"""Reordering an axis of one network, and the proof that it computes the same function afterwards."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..inputs import Batch
from .analysis import Analysis, Note
from .correspond import AxisGroup, Correspondence

#: Largest difference allowed relative to the largest output; float32 sums in another order stay far below. In half
#: precision they do not: so many times the type's epsilon.
TOLERANCE, TOLERANCE_EPSILONS = 1e-3, 16
#: Of float64, which networks of up to so many parameters are compared in. A network that casts to float32 by itself, as
#: some normalisations do, rounds there all the same.
TOLERANCE_FLOAT64, TOLERANCE_CASTS, FLOAT64_PARAMETERS = 1e-7, 1e-4, 50_000_000


def permute_(network: nn.Module, analysis: Analysis, orders: dict[int, Tensor]) -> None:
    """Reorders axes of ``network`` in place: everything that lies on them, writers, readers and channel parameters.

    Args:
        network: a copy of the analysed network.
        analysis: its axis analysis.
        orders: representative atom to order [n]: position p gets what was at order[p].
    """
    with torch.no_grad():
        for path, dims in analysis.uses.items():
            tensor = analysis.exported.tensor(path, network)
            for position, dim in dims.items():
                index = analysis.axes.index(dim, orders)
                if index is not None:
                    tensor.copy_(tensor.index_select(position, index.to(tensor.device)))


def verify_axes(analysis: Analysis, task: int, correspondence: Correspondence) -> None:
    """Reorders every axis at random and compares outputs; an axis that changes them is taken out and noted.

    One pass where all is well; halves of the axes where it is not, until the ones at fault are found.

    Raises:
        ValueError: the outputs are not finite, so that nothing can be compared.
    """
    axes = {at: _shuffled(axis.sizes[task], at) for at, axis in enumerate(correspondence.axes) if task in axis.atoms}
    proof = _Proof(analysis)
    while axes:
        orders = {correspondence.axes[at].atoms[task]: (at, order) for at, order in axes.items()}
        wrong = proof.faults({atom: order for atom, (_, order) in orders.items()})
        if not wrong:
            break
        for atom in wrong:
            at = orders[atom][0]
            axes.pop(at)
            _take_out(correspondence.axes[at], task, correspondence)
    correspondence.axes[:] = [axis for axis in correspondence.axes if len(axis.atoms) > 1]


def _shuffled(size: int, seed: int) -> Tensor:
    """A random order that is not the given one."""
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    return order if not torch.equal(order, torch.arange(size)) else order.roll(1)


def _take_out(axis: AxisGroup, task: int, correspondence: Correspondence) -> None:
    del axis.atoms[task], axis.sizes[task]
    for writers in axis.writers:
        writers.layers.pop(task, None)
    correspondence.notes.append((task, Note(axis.name, "reordering it changed the network's outputs")))


class _Proof:
    """Outputs of a network as it is, and whether those of a reordered one agree."""

    def __init__(self, analysis: Analysis):
        self.analysis, exported = analysis, analysis.exported
        self.network, self.example = copy.deepcopy(exported.network), exported.example
        self.tolerance: float | None = None
        self.expected = self._outputs()
        if not all(bool(torch.isfinite(output).all()) for output in self.expected):
            raise ValueError(
                f"task {exported.task!r}: the network puts out NaN or Inf on its calibration inputs, "
                "expected finite values; check the network and its inputs"
            )
        if sum(p.numel() for p in exported.network.parameters()) <= FLOAT64_PARAMETERS:
            self._double()

    def faults(self, orders: dict[int, Tensor]) -> list[int]:
        """Atoms whose reordering changes the outputs; empty if all of ``orders`` together change nothing."""
        if self._agrees(orders):
            return []
        atoms = list(orders)
        if len(atoms) == 1:
            return atoms
        half = len(atoms) // 2
        found = [atom for part in (atoms[:half], atoms[half:]) for atom in self.faults({a: orders[a] for a in part})]
        return found or atoms  # each half by itself changes nothing: only both do

    def _double(self) -> None:
        """Computes in float64, unless the network insists on a type."""

        def double(leaf):
            return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

        network, example = self.network, self.example
        self.network = copy.deepcopy(network).double()
        self.example = Batch(*(pytree.tree_map(double, part) for part in (example.args, example.kwargs)))
        try:
            expected = self._outputs()
        except (RuntimeError, TypeError, ValueError):
            self.network, self.example = network, example
            return
        self.expected = expected
        graph = self.analysis.exported.graph
        casts = any("to" in str(node.target).split(".") or "_to_copy" in str(node.target) for node in graph.nodes)
        self.tolerance = TOLERANCE_CASTS if casts else TOLERANCE_FLOAT64

    def _agrees(self, orders: dict[int, Tensor]) -> bool:
        permute_(self.network, self.analysis, orders)
        outputs = self._outputs()
        permute_(self.network, self.analysis, {atom: torch.argsort(order) for atom, order in orders.items()})
        for got, want in zip(outputs, self.expected, strict=True):
            scale = want.abs().max().clamp_min(torch.finfo(want.dtype).tiny)
            tolerance = max(TOLERANCE, TOLERANCE_EPSILONS * torch.finfo(want.dtype).eps)
            if not bool((got - want).abs().max() <= (self.tolerance or tolerance) * scale):
                return False
        return True

    def _outputs(self) -> list[Tensor]:
        with torch.no_grad():
            return self.analysis.exported.outputs(self.network, self.example)
