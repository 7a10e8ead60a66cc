"""Reordering an axis of one network, and the proof that it computes the same function afterwards."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .trace.analysis import Analysis, Note
from .trace.correspond import Correspondence

#: Largest difference allowed relative to the largest output; float32 sums in another order stay far below. In half
#: precision they do not: so many times the type's epsilon.
TOLERANCE, TOLERANCE_EPSILONS = 1e-3, 16


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

    Raises:
        ValueError: the outputs are not finite, so that nothing can be compared.
    """
    orders = {
        axis.atoms[task]: torch.randperm(axis.sizes[task], generator=torch.Generator().manual_seed(at))
        for at, axis in enumerate(correspondence.axes)
        if task in axis.atoms
    }
    expected = _outputs(analysis, analysis.exported.network)
    if not all(bool(torch.isfinite(output).all()) for output in expected):
        raise ValueError(
            f"task {analysis.exported.task!r}: the network puts out NaN or Inf on its calibration inputs, "
            "expected finite values; check the network and its inputs"
        )
    if not orders or _agrees(analysis, orders, expected):
        return
    for axis in list(correspondence.axes):
        atom = axis.atoms.get(task)
        if atom is not None and not _agrees(analysis, {atom: orders[atom]}, expected):
            del axis.atoms[task], axis.sizes[task]
            for writers in axis.writers:
                writers.layers.pop(task, None)
            correspondence.notes.append((task, Note(axis.name, "reordering it changed the network's outputs")))
            if len(axis.atoms) < 2:
                correspondence.axes.remove(axis)


def _agrees(analysis: Analysis, orders: dict[int, Tensor], expected: list[Tensor]) -> bool:
    network = copy.deepcopy(analysis.exported.network)
    permute_(network, analysis, orders)
    for got, want in zip(_outputs(analysis, network), expected, strict=True):
        scale = want.abs().max().clamp_min(torch.finfo(want.dtype).tiny)
        tolerance = max(TOLERANCE, TOLERANCE_EPSILONS * torch.finfo(want.dtype).eps)
        if not bool((got - want).abs().max() <= tolerance * scale):
            return False
    return True


def _outputs(analysis: Analysis, network: nn.Module) -> list[Tensor]:
    example = analysis.exported.example
    with torch.no_grad():
        leaves = pytree.tree_leaves(network(*example.args, **example.kwargs))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.numel()]
