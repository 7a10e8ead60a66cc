"""Matching by activations: neurons that do the same on the same inputs, whatever layers write them.

Where the tasks' inputs have one form, every original network is run on the calibration inputs of all tasks, and neurons
are paired by the correlation of what the readers of their axis see and of what its writers put out (which tells neurons
apart that no reader ever sees active). All of them count alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor

import mtz_ext

from ..distributed import total
from ..inputs import Batch
from ..merging.columns import axis_rows
from ..merging.execute import Execution
from ..merging.match import Slots, slots_of
from ..merging.moments import CONSTANT, at_least_float32
from ..trace.analysis import Analysis, Layer
from ..trace.correspond import AxisGroup, Correspondence, LayerGroup

#: Correlation [n, m] of the neurons of two tasks (i < j) on one axis.
Correlations = dict[tuple[int, int], Tensor]


def same_form(analyses: Sequence[Analysis]) -> bool:
    """Whether the networks take inputs of one shape and type, the batch aside."""
    forms = []
    for analysis in analyses:
        nodes = [node for node in analysis.exported.graph.nodes if node.name in analysis.exported.inputs]
        forms.append([(analysis.shape(node)[1:], node.meta["val"].dtype) for node in nodes if analysis.shape(node)])
    return all(form == forms[0] for form in forms)


def correlations(
    analyses: Sequence[Analysis],
    correspondence: Correspondence,
    batches: Sequence[list[Batch]],
    axes: Sequence[AxisGroup],
) -> dict[int, Correlations]:
    """Summed correlations of the neurons of every two tasks on every axis.

    Args:
        analyses: of networks whose inputs have one form.
        correspondence: of their layers.
        batches: calibration chunks of every task; each network runs on all of them.
        axes: axis groups.

    Returns:
        id of an axis group to its correlations; an axis that nothing corresponding reads has none.
    """
    everything = [batch for chunks in batches for batch in chunks]
    executions = [Execution(analysis, analysis.exported.network, everything) for analysis in analyses]
    sums: dict[int, Correlations] = {id(axis): {} for axis in axes}
    for group in correspondence.layers:
        for task, layer in group.layers.items():
            executions[task].advance(layer.node, lambda *_: False)
        read = {task: _channels(executions[task].inputs(layer), layer) for task, layer in group.layers.items()}
        written = {task: _outputs(executions[task], layer) for task, layer in group.layers.items()}
        for axis in axes:
            for values, side in ((read, "columns"), (written, "rows")):
                places = _places(analyses, group, axis, side)
                for first, second in combinations(sorted(places), 2):
                    if places[first].shape[1] == places[second].shape[1]:
                        found = _neuron_correlation(*((values[t], places[t]) for t in (first, second)))
                        known = sums[id(axis)].get((first, second), 0)
                        sums[id(axis)][first, second] = known + found
        for task, layer in group.layers.items():
            executions[task].finish(layer.node, False)
    return sums


def match_by_activations(axis: AxisGroup, found: Correlations, count: int, matching: str) -> Slots | None:
    """Slots that all tasks of an axis share, by their correlations; None where a pair of tasks has none."""
    tasks = sorted(axis.atoms)
    if any(pair not in found for pair in combinations(tasks, 2)):
        return None
    table = torch.arange(axis.sizes[tasks[0]])[:, None]
    for at, task in enumerate(tasks[1:], 1):
        likeness = sum(found[earlier, task][table[:, i]] for i, earlier in enumerate(tasks[:at]))
        pairs = mtz_ext.match_neurons((likeness.max() - likeness).contiguous(), count, method=matching).cpu()
        table = torch.cat([table[pairs[:, 0]], pairs[:, 1:]], 1)
    return slots_of(table, tasks, [axis.sizes[task] for task in tasks])


def _places(analyses: Sequence[Analysis], group: LayerGroup, axis: AxisGroup, side: str) -> dict[int, Tensor]:
    """Task to the channels [n, m] of each neuron of the axis in what a layer reads ("columns") or writes ("rows")."""
    found = {}
    for task, layer in group.layers.items():
        dim = analyses[task].axes.resolve(getattr(layer, side)) or ()
        if any(segment.atom == axis.atoms.get(task) for segment in dim):
            found[task] = axis_rows(analyses[task], dim, axis.atoms[task])
    return found


def _outputs(execution: Execution, layer: Layer) -> list[Tensor]:
    """What a layer puts out, with the sign that the BatchNorm behind it gives it."""
    chunks = _channels(execution.original[layer.node.name], layer)
    if layer.norm is None or layer.norm.weight is None:
        return chunks
    sign = execution.analysis.exported.tensor(layer.norm.weight).sign()
    return [x * sign.to(x.dtype) for x in chunks]


def _channels(chunks: Sequence[Tensor], layer: Layer) -> list[Tensor]:
    """Chunks as positions x channels."""
    if layer.kind == "linear":
        return [x.reshape(-1, x.shape[-1]) for x in chunks]
    return [x.movedim(1, -1).reshape(-1, x.shape[1]) for x in chunks]


def _neuron_correlation(first: tuple[list[Tensor], Tensor], second: tuple[list[Tensor], Tensor]) -> Tensor:
    """Correlation [n, m] of neurons, the mean over their channels."""
    (x, rows), (y, columns) = first, second
    found = _correlation([c[:, rows.flatten()] for c in x], [c[:, columns.flatten()] for c in y])
    width = rows.shape[1]
    return found.view(len(rows), width, len(columns), width).diagonal(dim1=1, dim2=3).mean(-1)


def _correlation(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    """Correlation of the columns of two lists of chunks [positions, columns]."""
    first, second = _standardised(first), _standardised(second)
    return total(sum((x.T @ y).double() for x, y in zip(first, second, strict=True)))


def _standardised(chunks: Sequence[Tensor]) -> list[Tensor]:
    """Columns with mean zero and unit length over all chunks; a column that never varies becomes zero."""
    chunks = [at_least_float32(x) for x in chunks]
    count = total(sum(len(x) for x in chunks))
    mean = total(sum(x.sum(0, dtype=torch.float64) for x in chunks)) / count
    chunks = [x - mean.to(x.dtype) for x in chunks]
    length = total(sum(x.square().sum(0, dtype=torch.float64) for x in chunks)).sqrt()
    alive = length.square() > CONSTANT * mean.square() * sum(len(x) for x in chunks)
    scale = torch.where(alive, 1 / torch.where(alive, length, 1), 0)
    return [x * scale.to(x.dtype) for x in chunks]
