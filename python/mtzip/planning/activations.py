"""Matching by activations: neurons that do the same on the same inputs, whatever layers write them.

Where the tasks' inputs have one form, every original network is run on the calibration inputs of all tasks, and neurons
are paired by the correlation of what the readers of their axis see and of what its writers put out (which tells neurons
apart that no reader ever sees active). All of them count alike.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from ..distributed import total
from ..inputs import Batch
from ..merging.columns import axis_rows
from ..merging.execute import Execution
from ..merging.joins import Forming
from ..merging.match import Slots, slots_of
from ..merging.moments import CONSTANT, at_least_float32
from ..trace.analysis import Analysis, Layer
from ..trace.correspond import AxisGroup, Correspondence, LayerGroup

#: Positions of an image, about, that correlations are taken over.
POSITIONS = 64

#: Correlation [n, m] of the neurons of two tasks (i < j) on one axis.
Correlations = dict[tuple[int, int], Tensor]


@dataclass
class Seen:
    """What channels do: chunks [channels, positions], and the sign [channels] to take each with, None for plus."""

    chunks: list[Tensor]
    sign: Tensor | None = None

    def select(self, channels: Tensor) -> Seen:
        """Some of the channels; all of them in their own order are not copied."""
        width = len(self.chunks[0])
        if len(channels) == width and bool((channels == torch.arange(width, device=channels.device)).all()):
            return self
        channels = channels.to(self.chunks[0].device)
        return Seen([x[channels] for x in self.chunks], None if self.sign is None else self.sign[channels])

    def centred(self) -> tuple[list[Tensor], Tensor]:
        """Chunks with mean zero, and the factor [channels] float64 to unit length; zero for one that never varies."""
        count = total(sum(x.shape[1] for x in self.chunks))
        mean = total(sum(x.mean(1).double() * x.shape[1] for x in self.chunks)) / count
        chunks = [x - mean.to(x.dtype)[:, None] for x in self.chunks]
        square = total(sum(torch.linalg.vector_norm(x, dim=1).double().square() for x in chunks))
        alive = square > CONSTANT * mean.square() * count
        scale = torch.where(alive, 1 / torch.where(alive, square, 1).sqrt(), 0)
        return chunks, scale if self.sign is None else scale * self.sign.to(scale.device)


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
    """Mean correlation, over where they are seen, of the neurons of every two tasks on every axis.

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
    seen: Counter[tuple[int, int, int]] = Counter()
    for group in correspondence.layers:
        for task, layer in group.layers.items():
            executions[task].advance(layer.node)
        read = {task: _channels(executions[task].inputs(layer), layer) for task, layer in group.layers.items()}
        written = {task: _outputs(executions[task], layer) for task, layer in group.layers.items()}
        for axis in axes:
            for values, side in ((read, "columns"), (written, "rows")):
                places = _places(analyses, group, axis, side)
                for first, second in combinations(sorted(places), 2):
                    if places[first].shape[1] == places[second].shape[1]:
                        found = _neuron_correlation(*((values[t], places[t]) for t in (first, second)))
                        sums[id(axis)][first, second] = sums[id(axis)].get((first, second), 0) + found
                        seen[id(axis), first, second] += 1
        for task, layer in group.layers.items():
            executions[task].finish(layer.node, False)
    for key, pairs in sums.items():
        for pair, found in pairs.items():
            found /= seen[key, *pair]
    return sums


def match_by_activations(
    axis: AxisGroup, found: Correlations, count: int, matching: str, partial: bool = False
) -> Slots | None:
    """Slots of an axis by the correlations of its neurons; None where two of its tasks have none.

    A neuron joins where the squared distances from the mean of a slot grow least, activations having unit variance: of
    two tasks, where the correlation is highest.

    Args:
        axis: all of whose tasks are matched.
        found: correlation of every two tasks.
        count, matching, partial: as in :func:`mtzip.merging.pairing.match_axis`.
    """
    tasks = sorted(axis.atoms)
    if any(pair not in found for pair in combinations(tasks, 2)):
        return None

    def cost(members, neurons: Tensor, scales: Tensor, new: int) -> tuple[Tensor, None]:
        size = len(members)
        likeness = sum(found[tasks[m], tasks[new]][neurons[:, at]] for at, m in enumerate(members)) / size
        inner = torch.full((len(neurons),), 1.0 / size, dtype=likeness.dtype, device=likeness.device)
        for (one, first), (two, second) in combinations(enumerate(members), 2):
            inner += 2 / size**2 * found[tasks[first], tasks[second]][neurons[:, one], neurons[:, two]]
        return (1 + inner[:, None] - 2 * likeness) * (size / (size + 1) / 2), None

    sizes = [axis.sizes[task] for task in tasks]
    forming = Forming(sizes, cost)
    formed = forming.form(count, matching, partial)
    return slots_of(formed.table, tasks, sizes)


def _places(analyses: Sequence[Analysis], group: LayerGroup, axis: AxisGroup, side: str) -> dict[int, Tensor]:
    """Task to the channels [n, m] of each neuron of the axis in what a layer reads ("columns") or writes ("rows")."""
    found = {}
    for task, layer in group.layers.items():
        dim = analyses[task].axes.resolve(getattr(layer, side)) or ()
        if any(segment.atom == axis.atoms.get(task) for segment in dim):
            found[task] = axis_rows(analyses[task], dim, axis.atoms[task])
    return found


def _outputs(execution: Execution, layer: Layer) -> Seen:
    """What a layer puts out, with the sign that the BatchNorm behind it gives it."""
    seen = _channels(execution.original[layer.node.name], layer)
    if layer.norm is not None and layer.norm.weight is not None:
        seen.sign = execution.analysis.exported.tensor(layer.norm.weight).detach().double().sign()
    return seen


def _channels(chunks: Sequence[Tensor], layer: Layer) -> Seen:
    """Chunks as channels x positions, float32 at least; of an image some positions, which are alike."""
    if layer.kind == "linear":
        return Seen([at_least_float32(x).reshape(-1, x.shape[-1]).T for x in chunks])
    step = chunks[0][0, 0].numel() // POSITIONS | 1  # odd: not the same column of every line
    return Seen([at_least_float32(x.flatten(2)[..., ::step].transpose(0, 1)).flatten(1) for x in chunks])


def _neuron_correlation(first: tuple[Seen, Tensor], second: tuple[Seen, Tensor]) -> Tensor:
    """Correlation [n, m] of neurons, the mean over their channels."""
    (x, rows), (y, columns) = first, second
    found = _correlation(x.select(rows.flatten()), y.select(columns.flatten()))
    width = rows.shape[1]
    return found.view(len(rows), width, len(columns), width).diagonal(dim1=1, dim2=3).mean(-1)


def _correlation(first: Seen, second: Seen) -> Tensor:
    """Correlation of the channels of two lists of chunks over the same positions."""
    (x, scale), (y, other) = first.centred(), second.centred()
    cross = total(sum((a @ b.T).double() for a, b in zip(x, y, strict=True)))
    return cross.mul_(scale[:, None]).mul_(other)
