"""Second moments of the original networks' layers, taken in one pass: what planning works on.

They stay as they are while axes are matched and matched again: reordering an axis permutes the columns of a moment, so
no further pass over the data is needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..merging.columns import dimension_runs
from ..merging.execute import Execution
from ..merging.match import Slots
from ..merging.moments import Moment, Target, View, collect, enough, heads
from ..merging.norms import folded_affine
from ..merging.part import Part, settle
from ..merging.solve import automatic_damping, own_target
from ..network.layout import Run
from ..trace.analysis import Analysis, Layer
from ..trace.correspond import Correspondence, LayerGroup

#: Positions to a column and samples that are enough to plan with.
PLAN_SAMPLES = (2, 128)

#: Columns up to which a moment is kept in the order it was last asked for: a descent asks for the same again and again.
KEPT_COLUMNS = 1024


def samples_needed(analysis: Analysis, paths: Sequence[str], samples: int) -> int:
    """How many of so many samples :func:`observe` takes for the named layers, from the shapes in the graph."""
    needed = min(PLAN_SAMPLES[1], samples)  # a layer may read its samples in another dimension than the first
    for path in paths:
        layer = analysis.layers[path]
        shape = analysis.shape(layer.input)
        each = max(shape[0] // analysis.exported.example.size, 1)  # more than one where a view splits a sample
        (taken,) = enough(View.of(layer), [torch.empty(samples * each, *shape[1:], device="meta")], *PLAN_SAMPLES)
        needed = max(needed, -(-taken // each))
    return needed


def observe(execution: Execution, paths: Sequence[str]) -> dict[str, Moment]:
    """Moments of what the named layers of an original network read, in graph order.

    Args:
        execution: a fresh one of the network; it is used up.
        paths: of the layers.
    """
    moments = {}
    wanted = set(paths)
    for layer in execution.analysis.layers.values():
        if not wanted:
            break
        execution.advance(layer.node)
        if layer.path in wanted:
            wanted.discard(layer.path)
            view = View.of(layer)
            inputs = execution.inputs(layer)
            moments[layer.path], _ = collect(view, heads(inputs, enough(view, inputs, *PLAN_SAMPLES)))
        execution.finish(layer.node, False)
    return moments


@dataclass
class Observed:
    """The original networks as planning sees them: moments of every layer, and how the axes are stored so far.

    Args:
        analyses: of all tasks.
        correspondence: of their layers.
        moments: path of a layer to its moment, for every task.
        damping: relative, None for the automatic one.
        slots: id of an axis group to how its neurons are stored.
    """

    analyses: Sequence[Analysis]
    correspondence: Correspondence
    moments: Sequence[Mapping[str, Moment]]
    damping: float | None = None
    slots: dict[int, Slots] = field(default_factory=dict)
    _layers: dict[tuple[int, str], tuple[Tensor, Tensor, Target]] = field(default_factory=dict, repr=False)
    _reordered: dict[tuple[int, str], tuple[Tensor, Moment, Tensor, Target]] = field(default_factory=dict, repr=False)

    def parts(self, group: LayerGroup, rows_of: object = None) -> dict[int, Part]:
        """The layers of a group with rows and columns in stored order.

        Args:
            group: layers that can be shared.
            rows_of: an axis group whose rows stay in the networks' own order, to be matched.
        """
        members = [task for task, layer in group.layers.items() if layer.path in self.moments[task]]
        layers = {task: group.layers[task] for task in members}
        runs = self.runs({task: layer.columns for task, layer in layers.items()})
        parts = {task: self._part(task, layer, runs[task], rows_of) for task, layer in layers.items()}
        settle(parts, affine=True)
        return parts

    def runs(self, dims) -> dict[int, tuple[Run, ...]]:
        """Runs of corresponding dimensions of several tasks."""
        return dimension_runs(dims, self.analyses, self.slots, self.correspondence.axis_of)

    def orders(self, task: int, without: object = None) -> dict[int, Tensor]:
        """Atom to stored order of every axis of a task that is matched."""
        return {
            axis.atoms[task]: self.slots[id(axis)].order(task)
            for axis in self.correspondence.axes
            if task in axis.atoms and id(axis) in self.slots and axis is not without
        }

    def _part(self, task: int, layer: Layer, columns: tuple[Run, ...], rows_of: object) -> Part:
        analysis = self.analyses[task]
        view = View.of(layer)
        moment = self.moments[task][layer.path]
        if (task, layer.path) not in self._layers:
            self._layers[task, layer.path] = self._layer(analysis, view, layer, moment)
        weight, bias, target = self._layers[task, layer.path]
        order = analysis.axes.index(layer.columns, self.orders(task))
        if order is not None:
            moment, weight, target = self._with_columns(task, layer, order)
        damping = self.damping or automatic_damping(len(moment.mean), moment.count)
        part = Part(task, layer, view, analysis, moment, target, weight, bias, columns, damping, unchanged=True)
        order = analysis.axes.index(layer.rows, self.orders(task, without=rows_of))
        if order is not None:
            part.reorder_rows(order)
        return part

    def _with_columns(self, task: int, layer: Layer, order: Tensor) -> tuple[Moment, Tensor, Target]:
        """A layer's moment, weight and target with its columns in some order; the last ones are kept."""
        key = task, layer.path
        known = self._reordered.get(key)
        if known is None or not torch.equal(known[0], order):
            weight, _, target = self._layers[key]
            inner = weight.shape[1] // len(order)
            every = (order[:, None] * inner + torch.arange(inner)).flatten().to(weight.device)
            cross = None if target.cross is None else target.cross[every]
            target = Target(target.mean, target.variance, cross, target.samples)
            known = order, self.moments[task][layer.path].select(every), weight[:, every], target
            if len(every) <= KEPT_COLUMNS:
                self._reordered[key] = known
        return known[1:]

    @staticmethod
    def _layer(analysis: Analysis, view: View, layer: Layer, moment: Moment) -> tuple[Tensor, Tensor, Target]:
        """Weight [r, d] and bias [r] with BatchNorm folded in, and what they put out; in the network's own order.

        Weights of many columns are in float32, as are the factors of their systems.
        """
        weight = view.matrix(analysis.exported.tensor(layer.weight).detach().double())
        bias = weight.new_zeros(len(weight))
        if layer.bias is not None:
            bias = analysis.exported.tensor(layer.bias).detach().double()
        if layer.norm is not None:
            scale, shift = folded_affine(analysis, layer.norm)
            weight, bias = weight * scale[:, None], bias * scale + shift
        target = own_target(moment, weight, bias)
        return weight if target.cross is None else weight.to(target.cross.dtype), bias, target
