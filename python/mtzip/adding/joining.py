"""The sweep in which one network joins a zipped one: its own inputs, and second moments in the place of all others.

As :mod:`mtzip.merging.sweep`, but only the new network is run. At every group of layers the earlier tasks stand for
what they compute now, weighed by the second moments that were kept; rows that the new task joins are solved for
jointly, all others stay as they are, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..inputs import leading
from ..merging import merge
from ..merging.columns import axis_rows, unknown_columns
from ..merging.execute import Execution
from ..merging.kept import KeptLayer, KeptPart, kept_part, sharers
from ..merging.match import Slots
from ..merging.merge import Rows
from ..merging.options import Options
from ..merging.part import Part, Systems, place_of, positions, settle
from ..merging.sweep import Sweep
from ..network.layout import Run
from ..network.leaf import SharedLayer, replace_module
from ..network.zeros import nonzero
from ..planning.activations import correlations, same_form
from ..planning.observe import Observed, observe
from ..reports.report import AxisReport, Private, SharedBy
from ..trace.analysis import Analysis, Layer
from ..trace.correspond import AxisGroup, Correspondence, LayerGroup
from .join import Writer, joined_at, joined_slots, joining_scales, stored_slots

#: Samples of the new task that correlations of activations are taken over.
ACTIVATION_SAMPLES = 256


class Joining(Sweep):
    """The state of one joining. ``run`` changes ``networks``, the last of which is the new one's.

    Args:
        tasks, analyses, correspondence, networks, options: as in :class:`Sweep`; the analyses of earlier tasks are of
            their extracted networks, so their order is the stored one. ``options.counts`` is set by the caller, from
            what ``joinable`` gives.
        execution: of the new network.
        kept: earlier task's index to path to what was kept of its layers.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        analyses: Sequence[Analysis],
        correspondence: Correspondence,
        execution: Execution,
        networks: list[nn.Module],
        options: Options,
        kept: Sequence[Mapping[str, KeptLayer]],
    ):
        self.new = len(tasks) - 1
        super().__init__(tasks, analyses, correspondence, [None] * self.new + [execution], networks, options)
        self._earlier = kept
        self._open: list[AxisGroup] = []  # axes the new task may join
        self._joined: set[int] = set()  # those it has joined
        #: Name of a group that was joined to the parameters of the new task's layer, and those that are not zero.
        self.sizes: dict[str, tuple[int, int]] = {}
        for axis in correspondence.axes:
            slots = self._stored(axis) if self.new in axis.atoms else None
            if slots is not None:
                self._open.append(axis)
            else:
                slots = self._among_themselves(axis)
            if slots is not None:
                self.slots[id(axis)] = slots

    def joinable(self) -> list[AxisGroup]:
        """Axes whose neurons the new task may join, each with the widths that bound how many."""
        found = []
        for axis in self._open:
            slots = self.slots[id(axis)].table
            widths = {0: int((slots[:, : self.new] >= 0).any(1).sum()), self.new: axis.sizes[self.new]}
            found.append(AxisGroup(axis.name, axis.atoms, widths, axis.writers))
        return found

    def left_private(self) -> list[Private]:
        """What the new task could not join for want of second moments, and why."""
        task, found = self.tasks[self.new], []
        for axis in self.correspondence.axes:
            if self.new in axis.atoms and axis not in self._open:
                found.append(Private(task, axis.name, "no second moments of the layers that write it are kept"))
        for group in self.correspondence.layers:
            layer = group.layers.get(self.new)
            rows = [] if layer is None else self._row_axes(self.new, layer)
            if not rows or self._sharers(group):
                continue
            grouped = "the second moments of a convolution with groups are not kept"
            found.append(Private(task, layer.name, grouped if layer.groups > 1 else "no second moments of it are kept"))
        return found

    def run(self) -> None:
        """Joins every group in the new network's order, then runs to the end."""
        execution = self.executions[self.new]
        self._join_coupled()
        groups = [group for group in self.correspondence.layers if self.new in group.layers]
        for group in tqdm(groups, "join", unit="layer", disable=None if self.options.progress else True, leave=False):
            layer = group.layers[self.new]
            execution.advance(layer.node, self._visits(self.new))
            execution.finish(layer.node, self._join(group, layer))
        execution.advance(None, self._visits(self.new))

    # -- which axes --------------------------------------------------------------------------------------------

    def _sharers(self, group: LayerGroup) -> tuple[int, ...]:
        """Earlier tasks whose layers of a group the new one's can join; none where it cannot."""
        new = group.layers.get(self.new)
        if new is None or new.private is not None or new.groups > 1:
            return ()
        leaves = {}
        for task, layer in group.layers.items():
            if task != self.new and layer.path in self._earlier[task]:
                leaves[task] = self.networks[task].get_submodule(place_of(layer)[0])
        if not leaves or not all(isinstance(leaf, SharedLayer) for leaf in leaves.values()):
            return ()
        return sharers(list(leaves), leaves)

    def _whole(self, axis: AxisGroup) -> list[LayerGroup]:
        """The groups, with all their layers, whose rows lie on an axis and that the new task can join."""
        found = []
        for group in self.correspondence.layers:
            layer = group.layers.get(self.new)
            segments = () if layer is None else self.analyses[self.new].axes.resolve(layer.rows) or ()
            if any(segment.atom == axis.atoms.get(self.new) for segment in segments) and self._sharers(group):
                found.append(group)
        return found

    def _neurons(self, group: LayerGroup, axis: AxisGroup, tasks: Sequence[int]) -> dict[int, Tensor]:
        return {
            task: axis_rows(self.analyses[task], group.layers[task].rows, axis.atoms[task])
            for task in tasks
            if task in axis.atoms
        }

    def _stored(self, axis: AxisGroup) -> Slots | None:
        """How an axis is stored before the new task joins; None where no earlier task's moments are there."""
        for group in self._whole(axis):
            first = {task: rows[:, 0] for task, rows in self._neurons(group, axis, self._sharers(group)).items()}
            layouts = {t: self.networks[t].get_submodule(place_of(group.layers[t])[0]).layout for t in first}
            if first:
                return stored_slots(layouts, first, axis.sizes)
        return None

    def _among_themselves(self, axis: AxisGroup) -> Slots | None:
        """How earlier tasks store an axis the new one has not: what they share of the columns of a layer to come."""
        found: dict[int, Tensor] = {}
        layouts = {}
        for group in self.correspondence.layers:
            for task, layer in group.layers.items():
                segments = self.analyses[task].axes.resolve(layer.rows) or ()
                if task == self.new or task in found or axis.atoms.get(task) not in [s.atom for s in segments]:
                    continue
                leaf = self.networks[task].get_submodule(place_of(layer)[0])
                if isinstance(leaf, SharedLayer):
                    found[task] = axis_rows(self.analyses[task], layer.rows, axis.atoms[task])[:, 0]
                    layouts[task] = leaf.layout
        return stored_slots(layouts, found, {self.new: 0, **axis.sizes}) if found else None

    # -- matching ----------------------------------------------------------------------------------------------

    def _join_coupled(self) -> None:
        """Matches the axes that have to be matched before the sweep: several layers write them."""
        axes = [axis for axis in self.correspondence.axes if self.options.counts.get(axis.name)]
        coupled = [axis for axis in axes if not self._is_simple(axis)]
        if not coupled:
            return
        execution = self.executions[self.new]
        if same_form(self.analyses):
            batches = leading(execution.batches, ACTIVATION_SAMPLES)
            found = correlations(self.analyses, self.correspondence, [batches], coupled)
            for axis in coupled:
                likeness = self._likeness(axis, found[id(axis)])
                if likeness is not None:
                    slots = self._take(axis, likeness.max() - likeness)
                    slots.costs = None
                    self.store(axis, slots)
        paths = [g.layers[self.new].path for axis in coupled for g in self._whole(axis)]
        analysis = self.analyses[self.new]
        moments = observe(Execution(analysis, analysis.exported.network, execution.batches), paths)
        kept = [{path: layer.moment for path, layer in layers.items()} for layers in self._earlier]
        observed = Observed(
            self.analyses, self.correspondence, [*kept, moments], self.options.damping, dict(self.slots)
        )
        left = [axis for axis in coupled if id(axis) not in self._joined]
        for _ in range(2):  # the second time on columns that are matched
            for axis in left:
                observed.slots[id(axis)] = self._matched_on(axis, observed)
        for axis in left:
            self.store(axis, observed.slots[id(axis)])

    def _is_simple(self, axis: AxisGroup) -> bool:
        """Whether one layer alone writes an axis, which can then be matched when the sweep arrives there."""
        if self.options.matching == "activation":
            return False
        writers = [
            group
            for group in self.correspondence.layers
            if (layer := group.layers.get(self.new)) is not None
            and layer.groups == 1
            and any(s.atom == axis.atoms[self.new] for s in self.analyses[self.new].axes.resolve(layer.rows) or ())
        ]
        return len(writers) == 1

    def _likeness(self, axis: AxisGroup, found: Mapping[tuple[int, int], Tensor]) -> Tensor | None:
        """Mean correlation [slots, neurons] of the new task's neurons with those of each slot."""
        table = self.slots[id(axis)].table
        table = table[(table[:, : self.new] >= 0).any(1)]
        total = torch.zeros(len(table), axis.sizes[self.new], dtype=torch.float64)
        for task in range(self.new):
            used = table[:, task] >= 0
            if used.any():
                if (task, self.new) not in found:
                    return None
                total[used] += found[task, self.new].cpu().double()[table[used, task]]
        return total / (table[:, : self.new] >= 0).sum(1, keepdim=True)

    def _take(self, axis: AxisGroup, costs: Tensor) -> Slots:
        count, greedy = self.options.counts[axis.name], self.options.matching == "greedy"
        return joined_at(self.slots[id(axis)], self.new, costs, count, "greedy" if greedy else "optimal")

    def _matched_on(self, axis: AxisGroup, observed: Observed) -> Slots:
        """An axis matched on the original network's moments, at the present pairing of all others."""
        writers = []
        for group in self._whole(axis):
            parts = observed.parts(group, rows_of=axis)
            scales = {t: torch.ones(len(p.weight), dtype=torch.float64) for t, p in parts.items()}
            neurons = self._neurons(group, axis, [*self._sharers(group), self.new])
            writers.append(Writer(Systems(parts), neurons, scales))
        return self._slots(axis, writers)

    def _slots(self, axis: AxisGroup, writers: Sequence[Writer]) -> Slots:
        matching = "greedy" if self.options.matching == "greedy" else "optimal"
        count = self.options.counts[axis.name]
        return joined_slots(self.slots[id(axis)], self.new, count, matching, writers, self.options.method)

    def store(self, axis: AxisGroup, slots: Slots) -> None:
        """Takes over which neurons have joined: brings the new network into that order and reports it."""
        self.slots[id(axis)] = slots
        self._joined.add(id(axis))
        self.executions[self.new].reorder({axis.atoms[self.new]: slots.order(self.new)})
        report = AxisReport(axis.name, {self.tasks[t]: size for t, size in axis.sizes.items()}, slots.shared)
        report.sets = [SharedBy(tuple(self.tasks[t] for t in tasks), size) for tasks, size in slots.sets.items()]
        if self.options.method != "average" and slots.costs is not None and slots.energy:
            report.difference = slots.difference / slots.energy
        self.axes.append(report)

    # -- layers ------------------------------------------------------------------------------------------------

    def _join(self, group: LayerGroup, layer: Layer) -> bool:
        """Joins one layer of the new network, or refits it if nobody shares it; says whether it was changed."""
        new = self.new
        columns = self._runs({task: other.columns for task, other in group.layers.items()})
        axes, earlier = self._row_axes(new, layer), self._sharers(group)
        axes = [axis for axis in axes if any(task in axis.atoms for task in earlier)]
        if not axes or layer.private is not None:
            return self._refit_private(group, new, layer, columns[new])
        fold = self.options.method != "average"
        parts: dict[int, Part] = {}
        for task in earlier:
            member = group.layers[task]
            kept = self._earlier[task][member.path]
            network, zeros = self.networks[task], self.options.keep_zeros
            parts[task] = kept_part(kept, task, member, self.analyses[task], network, columns[task], fold, zeros)
        parts[new] = self._part(new, layer, columns[new], len(parts) + 1)
        settle(parts, self.options.affine)
        systems = Systems(parts)
        for axis in axes:
            if id(axis) not in self._joined:
                neurons = self._neurons(group, axis, list(parts))
                scales = {task: self._scale(parts[task]) for task in earlier}
                slots = self._slots(axis, [Writer(systems, neurons, scales)])
                chosen = neurons[new][slots.table[slots.table[:, :new].amax(1) >= 0, new]]
                variance = parts[new].target.variance.cpu()[chosen.flatten()]
                slots.energy = parts[new].alpha * float(variance.sum()) / 2
                self.store(axis, slots)
                orders = {axis.atoms[new]: slots.order(new)}
                parts[new].reorder_rows(parts[new].analysis.axes.index(layer.rows, orders))
        self._join_rows(group, systems)
        return True

    def _scale(self, part: KeptPart) -> Tensor:
        """Scale [r] of an earlier task's rows in the units of a joint fit."""
        if self.options.method != "refit":
            return torch.ones_like(part.scale)
        return part.scale if part.weighting is None else part.scale * part.weighting.to(part.scale)

    def _join_rows(self, group: LayerGroup, systems: Systems) -> None:
        """Solves for the rows that the new task has joined and its own, and installs all of the group."""
        parts, new, method = systems.parts, self.new, self.options.method
        runs = self._runs({task: part.layer.rows for task, part in parts.items()})
        starts = {task: torch.ones(len(part.weight), dtype=torch.float64) for task, part in parts.items()}
        solved = {}
        for tasks in dict.fromkeys(run.tasks for task_runs in runs.values() for run in task_runs):
            rows = {task: positions(runs[task], tasks, parts[task].weight.device) for task in tasks}
            if new not in tasks:
                solved[tasks] = _as_they_are(parts, rows)
                continue
            if method == "refit" and len(tasks) > 1 and all(parts[task].scalable for task in tasks):
                scales = {task: self._scale(parts[task])[rows[task]] for task in tasks if task != new}
                for task, start in joining_scales(systems, rows, scales).items():
                    starts[task][rows[task].cpu()] = start
            solved[tasks] = merge.solve_rows(systems, rows, starts, method)
        norms = {task: self._norm_of(part) for task, part in parts.items() if task != new}
        for task in norms:
            self._lay_open(task, parts[task].layer)
        with torch.enable_grad():  # what is trainable is seen by whether the weight has gradients
            report = self._install(group, parts, runs, solved)
        report.damping *= systems.escalation
        self._keep({new: parts[new]})
        own = parts[new].analysis.tensors_of(parts[new].layer)
        self.sizes[group.name] = sum(tensor.numel() for tensor in own), nonzero(own)
        for task, values in norms.items():
            left = torch.tensor([n for n, tasks in enumerate(_owners(runs[task])) if new not in tasks]).long()
            with torch.no_grad():
                for tensor, value in values:
                    tensor[left.to(tensor.device)] = value[left.to(value.device)]

    def _norm_of(self, part: Part) -> list[tuple[Tensor, Tensor]]:
        """Tensors of the BatchNorm behind a layer of an earlier task, each with a copy of what it is now."""
        norm, exported = part.layer.norm, part.analysis.exported
        if norm is None:
            return []
        paths = [path for path in (norm.mean, norm.variance, norm.weight, norm.bias) if path is not None]
        tensors = [exported.tensor(path, self.networks[part.task]) for path in paths]
        return [(tensor, tensor.detach().clone()) for tensor in tensors]

    def _lay_open(self, task: int, layer: Layer) -> None:
        """Puts the plain layer in the place of an earlier task's leaf: it is cut into blocks anew."""
        leaf = self.networks[task].get_submodule(place_of(layer)[0])
        plain, names = leaf.dense(), leaf.layout.block_tasks()
        trained = any(leaf._parameters[name].requires_grad for name in names)
        for parameter in plain._parameters.values():
            if parameter is not None:
                parameter.requires_grad_(trained)
        self._set_network(task, replace_module(self.networks[task], leaf, plain))

    def _set_network(self, task: int, network: nn.Module) -> None:
        self.networks[task] = network
        if self.executions[task] is not None:
            self.executions[task].network = network


def _as_they_are(parts: Mapping[int, Part], rows: Mapping[int, Tensor]):
    """Rows that the new task has not joined, in the form of :func:`mtzip.merging.merge.solve_rows`."""
    tasks = tuple(sorted(rows))
    unknown = unknown_columns({t: parts[t].columns for t in tasks}, tasks, parts[tasks[0]].inner)
    first = parts[tasks[0]]
    theta = first.stored.new_zeros(unknown.size, len(rows[tasks[0]]))
    solved = {}
    for task in tasks:
        part, own = parts[task], rows[task]
        index, chosen = (x.to(theta.device) for x in (unknown.index[task], unknown.columns[task]))
        theta[index] = part.stored[own][:, chosen].T
        solved[task] = Rows(part.stored[own], part.stored_scale[own], part.stored_bias[own])
    return unknown, theta, solved


def _owners(runs: Sequence[Run]) -> list[tuple[int, ...]]:
    """The tasks that store each neuron."""
    return [run.tasks for run in runs for _ in range(run.size)]
