"""How many parameters a zip will store, from counts of shared neurons alone: what budgets are made of."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from ..merging.columns import dimension_runs
from ..merging.match import Slots, slots_of
from ..merging.part import place_of
from ..network.layout import Layout, Run
from ..network.leaf import LEAVES
from ..trace.analysis import Analysis, Layer
from ..trace.correspond import AxisGroup, Correspondence, LayerGroup


class Arithmetic:
    """Parameters stored, as a function of how many neurons of every axis are shared.

    Args:
        analyses: of all tasks.
        correspondence: of their layers.
        affine: whether tasks keep a private scale and shift where no BatchNorm follows.
    """

    def __init__(self, analyses: Sequence[Analysis], correspondence: Correspondence, affine: bool):
        self.analyses, self.correspondence, self.affine = analyses, correspondence, affine
        self.total = sum(p.numel() for analysis in analyses for p in analysis.exported.network.parameters())
        self._axes = {axis.name: axis for axis in correspondence.axes}
        self._touching = [self._names(group) for group in correspondence.layers]
        self._sizes: dict[tuple, int] = {}
        self._rest = self.total - sum(
            analyses[task].size_of(layer) for group in correspondence.layers for task, layer in group.layers.items()
        )

    def stored(self, counts: Mapping[str, int]) -> int:
        """Parameters stored when so many neurons of every axis are shared."""
        total = self._rest
        for at, group in enumerate(self.correspondence.layers):
            key = (at, *(counts.get(name, 0) for name in self._touching[at]))
            if key not in self._sizes:
                self._sizes[key] = self._group_size(group, counts)
            total += self._sizes[key]
        return total

    def _names(self, group: LayerGroup) -> list[str]:
        names = []
        for task, layer in group.layers.items():
            for dim in (layer.rows, layer.columns):
                for segment in self.analyses[task].axes.resolve(dim) or ():
                    axis = self.correspondence.axis_of(task, segment.atom)
                    names += [axis.name] if axis is not None and axis.name not in names else []
        return names

    def _group_size(self, group: LayerGroup, counts: Mapping[str, int]) -> int:
        slots = {id(axis): _first(axis, counts[name]) for name, axis in self._axes.items() if counts.get(name)}
        sharing = [t for t, layer in group.layers.items() if layer.private is None and self._shares(t, layer, slots)]
        own = sum(self.analyses[t].size_of(layer) for t, layer in group.layers.items() if t not in sharing)
        if len(sharing) < 2:
            return own + sum(self.analyses[t].size_of(group.layers[t]) for t in sharing)
        layers = {task: group.layers[task] for task in sharing}
        every = {task: layer.columns for task, layer in group.layers.items()}
        rows = self._runs({task: layer.rows for task, layer in layers.items()}, slots)
        columns = self._runs(every, slots)
        normed = all(layer.norm is not None for layer in layers.values())
        biased = all(layer.bias is not None for layer in layers.values())
        blocks: dict[tuple, int] = {}
        for task, layer in layers.items():
            if layer.groups > 1:
                columns[task] = (Run(tuple(sharing), self._columns_of_a_group(task, layer)),)
            bare = layer.norm is None
            layout = Layout(task, rows[task], columns[task], rows[task])
            inner = math.prod(layer.kernel)
            for name, (height, width) in layout.weight_blocks().items():
                blocks["weight", name] = height * width * inner
            height = sum(run.size for run in rows[task])
            if layer.bias is not None or (self.affine and bare and self._takes_bias(task, layer)):
                if normed or (not self.affine and not any(x.norm for x in layers.values()) and biased):
                    blocks |= {("bias", name): size for name, size in layout.bias_blocks().items()}
                else:
                    blocks["bias", task] = height
            if self.affine and bare:
                blocks["scale", task] = sum(run.size for run in rows[task] if len(run.tasks) > 1)
        return own + sum(blocks.values())

    def _shares(self, task: int, layer: Layer, slots: Mapping[int, Slots]) -> bool:
        segments = self.analyses[task].axes.resolve(layer.rows) or ()
        return any(id(self.correspondence.axis_of(task, segment.atom)) in slots for segment in segments)

    def _runs(self, dims, slots) -> dict[int, tuple[Run, ...]]:
        return dimension_runs(dims, self.analyses, slots, self.correspondence.axis_of)

    def _columns_of_a_group(self, task: int, layer: Layer) -> int:
        return self.analyses[task].exported.tensor(layer.weight).shape[1]

    def _takes_bias(self, task: int, layer: Layer) -> bool:
        return type(self.analyses[task].exported.network.get_submodule(place_of(layer)[0])) in LEAVES


def _first(axis: AxisGroup, count: int) -> Slots:
    """The first neurons of every task shared: for arithmetic it does not matter which."""
    tasks = sorted(axis.atoms)
    shared = torch.arange(count)[:, None].expand(count, len(tasks))
    return slots_of(shared, tasks, [axis.sizes[task] for task in tasks])
