"""What is kept of a zip's layers for tasks that join later: second moments, and how much each task weighs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ..network.layout import Run
from ..network.leaf import LEAVES, SharedLayer
from ..trace.analysis import Analysis, Layer
from .moments import Moment, View
from .norms import folded_affine
from .part import Part, place_of
from .solve import own_target


@dataclass
class KeptLayer:
    """One task's side of a merged layer; rows and columns in stored order.

    Args:
        moment: of what the layer reads in the zipped network.
        alpha: weight of the task.
        damping: relative.
        weighting: [r] how much its rows count, None for all alike.
    """

    moment: Moment
    alpha: float
    damping: float
    weighting: Tensor | None = None

    @classmethod
    def of(cls, part: Part) -> KeptLayer:
        """What is kept of a layer that has been merged."""
        return cls(part.moment, part.alpha, part.damping, part.weighting)


@dataclass
class Kept:
    """All of a zipped network, and how it was merged.

    Args:
        method, matching, affine, damping, keep_zeros: as in :func:`mtzip.zip_networks`.
        layers: task to path to what is kept of that layer.
    """

    method: str
    matching: str
    affine: bool
    damping: float | None
    layers: dict[str, dict[str, KeptLayer]]
    keep_zeros: bool | str = False

    @property
    def nbytes(self) -> int:
        """Bytes of the second moments."""
        moments = [layer.moment for layers in self.layers.values() for layer in layers.values()]
        return sum(x.nbytes for m in moments for x in (m.mean, m.covariance, m.samples) if x is not None)


@dataclass
class KeptPart(Part):
    """A layer of an earlier task whose inputs are gone: its moment is what was kept, its target what it computes now.

    Where the rows are the joint optimum of the tasks that share them, sum_t s_t b_t = sum_t s_t^2 Q_t theta: fitting to
    what they compute now weighs as much as fitting to the originals, and what retraining has changed is kept.

    Args:
        kept_alpha: weight of the task.
        scale: [r] its private scale of every row, or that of the BatchNorm behind them.
        stored: [r, d] the rows as stored, without any scale.
        stored_scale: [r] private scale as stored, ones where there is none.
        stored_bias: [r] bias as stored.
    """

    kept_alpha: float = 1.0
    scale: Tensor | None = None
    stored: Tensor | None = None
    stored_scale: Tensor | None = None
    stored_bias: Tensor | None = None

    @property
    def alpha(self) -> float:
        """As it was in the merge."""
        return self.kept_alpha


def kept_part(
    kept: KeptLayer,
    task: int,
    layer: Layer,
    analysis: Analysis,
    network: nn.Module,
    columns: tuple[Run, ...],
    fold: bool,
    keep_zeros: bool | str = False,
) -> KeptPart:
    """A layer of an earlier task as the merge sees it.

    Args:
        kept: what is kept of it.
        task: index.
        layer, analysis: of its extracted network, traced anew: in stored order.
        network: the zipped one.
        columns: runs of its columns.
        fold: whether the BatchNorm behind it is folded in.
        keep_zeros: which of its zeros stay, as in :func:`mtzip.zip_networks`.
    """
    view = View.of(layer)
    leaf = network.get_submodule(place_of(layer)[0])
    assert isinstance(leaf, SharedLayer)
    plain = leaf.unscaled_weight().detach()
    stored = view.matrix(plain.transpose(0, 1) if view.transposed else plain).double()
    ones = stored.new_ones(len(stored))
    scale = leaf.full_scale().detach().double() if leaf.layout.scaled else ones
    bias = stored.new_zeros(len(stored)) if leaf.layout.bias is None else leaf.assembled_bias().detach().double()
    weight, shift, affine, effective = stored * scale[:, None], bias, None, scale
    if layer.norm is not None and fold:
        affine = folded_affine(analysis, layer.norm)
        weight, shift, effective = weight * affine[0][:, None], bias * affine[0] + affine[1], scale * affine[0]
    target = own_target(kept.moment, weight, shift)
    part = KeptPart(task, layer, view, analysis, kept.moment, target, weight, shift, columns, kept.damping)
    part.kept_alpha, part.weighting, part.fold = kept.alpha, kept.weighting, affine
    part.note_zeros(stored, keep_zeros)
    part.scale, part.stored, part.stored_scale, part.stored_bias = effective, stored, scale, bias
    owner = analysis.exported.network.get_submodule(place_of(layer)[0])
    part.takes_bias = type(owner) in LEAVES
    return part


def sharers(tasks: Sequence[int], leaves: Mapping[int, SharedLayer]) -> tuple[int, ...]:
    """The tasks of some leaves if they share with nobody else, so that all can be taken apart together; else none."""
    everyone = {t for task in tasks for named in leaves[task].layout.block_tasks().values() for t in named}
    return tuple(sorted(tasks)) if everyone == set(tasks) else ()
