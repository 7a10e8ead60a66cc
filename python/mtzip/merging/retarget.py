"""Gives the layers of a group, once solved for, targets adapted to what stands behind them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..network.layout import Run
from . import install
from .execute import Execution
from .moments import enough, heads
from .part import Part
from .reconstruct import corrected, correction, following

#: Positions to a column and samples that are enough for a substitution that corrects moments.
RECONSTRUCTION_SAMPLES = (20, 64)


def retarget_(
    parts: Mapping[int, Part], executions: Sequence[Execution], runs: Mapping[int, Sequence[Run]], solved: Mapping
) -> bool:
    """Replaces the targets by activation-aware ones; False where no part has an activation that allows it.

    For convolutions only: on fully connected layers it was measured not to pay beside weighted rows.
    """
    found = False
    for task, part in parts.items():
        layer, execution = part.layer, executions[task]
        follow = following(part.analysis, layer.node if layer.norm is None else layer.norm.node)
        if not follow or layer.kind == "linear" or part.moment.samples is not None:
            continue
        found = True
        view = part.view
        sizes = enough(view, execution.inputs(layer), *RECONSTRUCTION_SAMPLES)
        inputs = heads(execution.inputs(layer), sizes)
        originals = heads(execution.original[layer.node.name], sizes)
        rows = install.assembled(runs[task], solved, task)
        scale, bias = install.effective_affine(part, rows, install.Outputs.of(part, rows))
        weight = view.tensor(rows.weight * scale[:, None])
        outputs = [execution.call(layer, x, weight, bias) for x in inputs]
        targets = [part.original_output(z) for z in originals]
        if part.plain_target is None:
            part.plain_target = part.target
        part.target = corrected(part.plain_target, part.moment, *correction(view, inputs, outputs, targets, follow))
    return found
