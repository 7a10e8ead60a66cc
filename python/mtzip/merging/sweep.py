"""One sweep over the graphs: every group of corresponding layers is merged when the sweep arrives at it.

Original and zipped networks run side by side over the calibration inputs, node by node. At a group of layers the sweep
takes the moments of what arrives in the zipped networks and of what the originals put out, matches the axis if it is
new, solves for the rows, installs them, and runs on. So a zip costs two forward passes and the moments.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import fx, nn
from tqdm import tqdm

from ..memory import MOMENT_SAMPLES
from ..network.layout import Run
from ..network.leaf import LEAVES
from ..network.zeros import nonzero
from ..reports.report import AxisReport, LayerReport, SharedBy
from ..trace.analysis import Analysis, Layer, Norm
from ..trace.axes import Dim
from ..trace.correspond import AxisGroup, Correspondence, LayerGroup
from . import install, merge, pairing
from .columns import axis_rows, dimension_runs
from .execute import Execution
from .grouped import GroupedPart, grouped_part, kernel_costs, solve_grouped
from .kept import KeptLayer
from .match import Slots
from .moments import View, collect, enough, heads
from .norms import channel_statistics, folded_affine, refit_norm_, set_statistics_
from .options import Options
from .part import Part, Systems, positions, settle
from .residual import without_loss
from .retarget import retarget_
from .sensitivity import row_weighting
from .solve import automatic_damping

_log = logging.getLogger("mtzip")


class Sweep:
    """The state of one sweep. ``run`` changes ``networks``; the results are ``networks``, ``axes`` and ``layers``."""

    def __init__(
        self,
        tasks: Sequence[str],
        analyses: Sequence[Analysis],
        correspondence: Correspondence,
        executions: Sequence[Execution],
        networks: list[nn.Module],
        options: Options,
    ):
        self.tasks, self.analyses, self.correspondence = tasks, analyses, correspondence
        self.executions, self.networks, self.options = executions, networks, options
        self.sensitivities: list[dict[str, torch.Tensor]] = [{} for _ in tasks]
        self.slots: dict[int, Slots] = {}
        self.axes: list[AxisReport] = []
        self.layers: list[LayerReport] = []
        self.kept: list[dict[str, KeptLayer]] = [{} for _ in tasks]
        self._solved_norms: set[tuple[int, str]] = set()

    def run(self) -> None:
        """Merges every group in graph order, then runs to the end."""
        bar = tqdm(
            self.correspondence.layers,
            desc="zip",
            unit="layer",
            disable=None if self.options.progress else True,
            leave=False,
        )
        for group in bar:
            bar.set_postfix_str(group.name)
            clock = time.perf_counter()
            for task, layer in group.layers.items():
                self.executions[task].advance(layer.node, self._visits(task))
            changed = self._merge(group)
            for task, layer in group.layers.items():
                self.executions[task].finish(layer.node, changed[task])
            _log.debug("%s: %.1f s", group.name, time.perf_counter() - clock)
        for task, execution in enumerate(self.executions):
            execution.advance(None, self._visits(task))

    # -- nodes that are no layer of a group --------------------------------------------------------------------

    def _visits(self, task: int) -> dict[str, Callable[[], bool]]:
        """What to do at the BatchNorms of a task that no layer before them was solved with."""
        norms = [norm for norm in self.analyses[task].norms if (task, norm.node.name) not in self._solved_norms]
        return {norm.node.name: partial(self._refit_norm, task, norm) for norm in norms}

    def _refit_norm(self, task: int, norm: Norm) -> bool:
        """Fits a BatchNorm to what it put out in the original; False where its input is the original's."""
        execution, node = self.executions[task], norm.node
        if not execution.is_changed(node.args[0]):
            return False
        order = self._order_of(task, node)
        targets = execution.original[node.name]
        if order is not None:
            targets = [z[:, order.to(z.device)] for z in targets]
        inputs = execution.zipped[node.args[0].name]
        mean, variance, slope, target = channel_statistics(inputs, targets)
        if self.options.method == "average":
            set_statistics_(self.analyses[task], norm, self.networks[task], mean, variance)
        else:
            refit_norm_(self.analyses[task], norm, self.networks[task], mean, variance, slope, target)
        return True

    def _orders(self, task: int) -> dict[int, torch.Tensor]:
        """Atom to stored order of every axis of a task that is matched."""
        return {
            axis.atoms[task]: self.slots[id(axis)].order(task)
            for axis in self.correspondence.axes
            if task in axis.atoms and id(axis) in self.slots
        }

    def _order_of(self, task: int, node: fx.Node) -> torch.Tensor | None:
        """Stored order of dimension 1 of a node's value, None where it is the network's own."""
        analysis = self.analyses[task]
        return analysis.axes.index(analysis.dims(node)[1], self._orders(task))

    # -- groups ------------------------------------------------------------------------------------------------

    def _axis_of(self, task: int, atom: int) -> AxisGroup | None:
        return self.correspondence.axis_of(task, atom)

    def _row_axes(self, task: int, layer: Layer) -> list[AxisGroup]:
        """Axes a layer writes of which some neurons are to be shared."""
        found = []
        for segment in self.analyses[task].axes.resolve(layer.rows) or ():
            axis = self._axis_of(task, segment.atom)
            if axis is not None and self.options.counts.get(axis.name) and axis not in found:
                found.append(axis)
        return found

    def _runs(self, dims: Mapping[int, Dim]) -> dict[int, tuple[Run, ...]]:
        return dimension_runs(dims, self.analyses, self.slots, self._axis_of)

    def _merge(self, group: LayerGroup) -> dict[int, bool]:
        """Merges what can be shared of a group and refits the rest; says which layers changed."""
        axes: list[AxisGroup] = []
        writers: dict[int, list[int]] = {}
        for task, layer in group.layers.items():
            for axis in self._row_axes(task, layer) if layer.private is None else ():
                writers.setdefault(id(axis), []).append(task)
                axes += [] if axis in axes else [axis]
        # Groups are not matched by themselves: their axis is that of a layer before them.
        grouped = any(layer.groups > 1 for layer in group.layers.values())
        axes = [a for a in axes if len(writers[id(a)]) > 1 and (not grouped or id(a) in self.slots)]
        members = sorted({task for axis in axes for task in writers[id(axis)]})
        columns = self._runs({task: layer.columns for task, layer in group.layers.items()})
        changed = {}
        if members and grouped:
            self._share_grouped(group, members)
            changed = dict.fromkeys(members, True)
        elif members:
            parts = {task: self._part(task, group.layers[task], columns[task], len(members)) for task in members}
            settle(parts, self.options.affine)
            systems = Systems(parts)
            for axis in axes:
                if id(axis) not in self.slots:
                    self._match(axis, systems, writers[id(axis)])
            self._share(group, systems)
            changed = dict.fromkeys(members, True)
        for task, layer in group.layers.items():
            if task not in members:
                changed[task] = self._refit_private(group, task, layer, columns[task])
        return changed

    def _part(self, task: int, layer: Layer, columns: tuple[Run, ...], sharers: int) -> Part:
        """A layer's moments and weights, in stored row order as far as its axes are matched.

        Args:
            sharers: tasks that share it; where they are more than one, its BatchNorm is folded in.
        """
        shared = sharers > 1
        execution, analysis, network = self.executions[task], self.analyses[task], self.networks[task]
        view = View.of(layer)
        inputs, outputs = execution.inputs(layer), execution.original[layer.node.name]
        sizes = enough(view, inputs, *MOMENT_SAMPLES)
        inputs, outputs = heads(inputs, sizes), heads(outputs, sizes)
        order = analysis.axes.index(layer.rows, self._orders(task))
        fold = None
        if shared and self.options.method != "average" and layer.norm is not None:
            fold = folded_affine(analysis, layer.norm)
        moved = None
        if self.options.method == "refit" and (shared or layer.norm is None):
            moved = without_loss(execution, layer, outputs, order, fold)
        moment, target = collect(view, inputs, moved or outputs, sharers)
        if not (torch.isfinite(moment.mean).all() and torch.isfinite(target.variance).all()):
            raise ValueError(
                f"task {self.tasks[task]!r}: {layer.name} reads or puts out NaN or Inf on the calibration inputs, "
                "expected finite values; check the network and its inputs"
            )
        # Copies: matching reorders the network's rows in place, and those of the part by themselves.
        weight = view.matrix(analysis.exported.tensor(layer.weight, network).detach().to(torch.float64, copy=True))
        bias = weight.new_zeros(len(weight))
        if layer.bias is not None:
            bias = analysis.exported.tensor(layer.bias, network).detach().to(torch.float64, copy=True)
        damping = self.options.damping or automatic_damping(len(moment.mean), moment.count)
        part = Part(task, layer, view, analysis, moment, target, weight, bias, columns, damping)
        part.normalised = self.options.method != "mtz"
        part.takes_bias = type(network.get_submodule(part.place[0])) in LEAVES
        part.note_zeros(weight, self.options.keep_zeros)
        sensitivity = self.sensitivities[task].get(layer.path)
        part.fold = fold
        if fold is not None and moved is None:
            part.target = target.scaled(*fold)
        if shared and sensitivity is not None:
            part.weighting = row_weighting(sensitivity.to(weight.device), None if part.fold is None else part.fold[0])
        if order is not None:
            part.reorder_rows(order, weights=False)
        if part.fold is not None:  # both in the same order now
            scale, shift = part.fold
            part.weight, part.bias = weight * scale[:, None], bias * scale + shift
        return part

    def _share(self, group: LayerGroup, systems: Systems) -> None:
        """Solves for the rows of a group whose axes are matched, and installs them."""
        options, parts = self.options, systems.parts
        runs = self._runs({task: part.layer.rows for task, part in parts.items()})
        starts = self._starts(systems)
        solved = self._solve(systems, runs, starts)
        if options.method == "refit":
            for _ in range(options.reconstructions):
                if not retarget_(parts, self.executions, runs, solved):
                    break
                solved = self._solve(systems, runs, starts)
        report = self._install(group, parts, runs, solved)
        report.damping *= systems.escalation
        self._keep(parts)

    def _keep(self, parts: Mapping[int, Part]) -> None:
        """Remembers the second moments of a group's layers, if that was asked for."""
        if self.options.keep_moments:
            for task, part in parts.items():
                self.kept[task][part.layer.path] = KeptLayer.of(part)

    def _share_grouped(self, group: LayerGroup, members: Sequence[int]) -> None:
        """The same for a convolution with groups."""
        parts = {}
        for task in members:
            order = self.analyses[task].axes.index(group.layers[task].rows, self._orders(task))
            execution, network, options = self.executions[task], self.networks[task], self.options
            part = grouped_part(task, group.layers[task], members, execution, network, order, options)
            part.takes_bias = type(network.get_submodule(part.place[0])) in LEAVES
            parts[task] = part
        settle(parts, self.options.affine)
        runs = self._runs({task: part.layer.rows for task, part in parts.items()})
        solved = {}
        for tasks in dict.fromkeys(run.tasks for task_runs in runs.values() for run in task_runs):
            rows = {task: positions(runs[task], tasks, parts[task].weight.device) for task in tasks}
            solved[tasks] = solve_grouped(parts, rows, self.options.method)
        self._install(group, parts, runs, solved)

    def _install(self, group: LayerGroup, parts: Mapping[int, Part], runs, solved) -> LayerReport:
        """Installs solved rows as leaves, fits the BatchNorm behind them, and reports the layer."""
        options = self.options
        before = sum(part.analysis.size_of(part.layer) for part in parts.values())
        install.install_shared(parts, self.networks, runs, solved, options.affine, self._set_network)
        report = LayerReport(group.name, before, 0)
        for task, part in parts.items():
            rows = install.assembled(runs[task], solved, task)
            outputs = part.outputs(rows) if isinstance(part, GroupedPart) else install.Outputs.of(part, rows)
            if part.layer.norm is not None:
                self._solved_norms.add((task, part.layer.norm.node.name))
                install.fit_following_norm(part, self.networks[task], outputs, options.method == "average")
            report.samples[self.tasks[task]] = part.moment.count
            report.error[self.tasks[task]] = install.relative_error(part, rows, outputs)
            report.space = "sample" if part.moment.samples is not None else "feature"
        report.damping = max(part.damping for part in parts.values())
        stored = _distinct(self.networks, parts)
        report.after, report.nonzero_after = sum(tensor.numel() for tensor in stored), nonzero(stored)
        report.nonzero_before = sum(nonzero(part.analysis.tensors_of(part.layer)) for part in parts.values())
        self.layers.append(report)
        return report

    def _starts(self, systems: Systems) -> dict[int, torch.Tensor]:
        """Task to the private scale [r] that matching found for every row, in stored order."""
        parts = systems.parts
        starts = {task: torch.ones(len(part.weight), dtype=torch.float64) for task, part in parts.items()}
        axes = {id(axis): axis for task, part in parts.items() for axis in self._row_axes(task, part.layer)}
        for axis in axes.values():
            slots, members = self.slots[id(axis)], [task for task in parts if task in axis.atoms]
            rows = {t: axis_rows(parts[t].analysis, parts[t].layer.rows, axis.atoms[t]) for t in members}
            for task in members:
                starts[task][rows[task]] = slots.scale(task)[:, None].expand(rows[task].shape)
            if len(axis.writers) > 1 and self.options.method == "refit":
                self._start_pairs(systems, slots, rows, starts)
        return starts

    @staticmethod
    def _start_pairs(systems: Systems, slots: Slots, rows: Mapping[int, torch.Tensor], starts) -> None:
        """Scales of neurons that two tasks share on an axis paired for all its writers: each has scales of its own."""
        members = sorted(rows)
        runs = {task: slots.runs(task, members) for task in members}
        for pair in {run.tasks for task in members for run in runs[task] if len(run.tasks) == 2}:
            shared = {t: rows[t][positions(runs[t], pair, rows[t].device)].flatten() for t in pair}
            _, ratio = pairing.shared_cost(systems, shared)
            starts[pair[1]][shared[pair[1]]] = ratio.cpu()

    def _solve(self, systems: Systems, runs: Mapping[int, tuple[Run, ...]], starts: Mapping[int, torch.Tensor]):
        """Rows of every set of tasks that stores some together."""
        solved = {}
        for tasks in dict.fromkeys(run.tasks for task_runs in runs.values() for run in task_runs):
            rows = {task: positions(runs[task], tasks, systems.parts[task].weight.device) for task in tasks}
            solved[tasks] = merge.solve_rows(systems, rows, starts, self.options.method)
        return solved

    def _match(self, axis: AxisGroup, systems: Systems, tasks: Sequence[int]) -> None:
        """Matches an axis at the layers that write it, and brings the networks and parts into stored order."""
        count, parts = self.options.counts[axis.name], {task: systems.parts[task] for task in tasks}
        neurons = {task: axis_rows(part.analysis, part.layer.rows, axis.atoms[task]) for task, part in parts.items()}
        matching = "greedy" if self.options.matching == "greedy" else "optimal"
        extra = kernel_costs(axis, self.analyses, tasks) if self.options.method != "average" and len(tasks) == 2 else []
        settings = {"partial": axis.name in self.options.partial, "sizes": axis.sizes}
        slots = pairing.match_axis([(systems, neurons)], count, self.options.method, matching, extra, **settings)
        self.store(axis, slots)
        for task, part in parts.items():
            orders = {axis.atoms[task]: slots.order(task)}
            part.reorder_rows(part.analysis.axes.index(part.layer.rows, orders))

    def store(self, axis: AxisGroup, slots: Slots) -> None:
        """Takes over how an axis is stored: brings the networks into that order and reports it."""
        self.slots[id(axis)] = slots
        for task, atom in axis.atoms.items():
            self.executions[task].reorder({atom: slots.order(task)})
        used = sum(len(tasks) * size for tasks, size in slots.sets.items())
        energy = slots.energy * used / sum(axis.sizes.values())
        report = AxisReport(axis.name, {self.tasks[t]: size for t, size in axis.sizes.items()}, slots.shared)
        report.sets = [SharedBy(tuple(self.tasks[t] for t in tasks), size) for tasks, size in slots.sets.items()]
        report.difference = slots.difference / energy if energy else 0.0
        if self.options.method == "average" or slots.costs is None:
            report.difference = None
        self.axes.append(report)

    def _refit_private(self, group: LayerGroup, task: int, layer: Layer, columns: tuple[Run, ...]) -> bool:
        """Refits a layer no other task shares, if what it reads has changed; says whether it was changed."""
        reordered = self.analyses[task].axes.index(layer.rows, self._orders(task)) is not None
        if not self.executions[task].input_changed(layer):
            return reordered
        if self.options.method != "refit" or layer.calls > 1 or layer.groups > 1:
            return True
        part = self._part(task, layer, columns, sharers=1)
        part.columns = (Run((task,), sum(run.size for run in columns)),)
        if layer.bias is None and layer.norm is None:
            part.constant = "none"
        rows = torch.arange(len(part.weight), device=part.weight.device)
        _, _, solved = merge.solve_rows(Systems({task: part}), {task: rows}, None, "refit")
        install.install_private(part, self.networks[task], solved[task])
        size = self.analyses[task].size_of(layer)
        name = self.tasks[task]
        error = install.relative_error(part, solved[task], install.Outputs.of(part, solved[task]))
        space = "sample" if part.moment.samples is not None else "feature"
        label = f"{layer.path} ({name})" if len(group.layers) > 1 else layer.path
        report = LayerReport(label, size, size, {name: part.moment.count}, part.damping, space, {name: error})
        report.nonzero_before = nonzero(part.analysis.tensors_of(layer))
        report.nonzero_after = nonzero(part.analysis.tensors_of(layer, self.networks[task]))
        self.layers.append(report)
        return True

    def _set_network(self, task: int, network: nn.Module) -> None:
        self.networks[task] = network
        self.executions[task].network = network


def _distinct(networks: Sequence[nn.Module], parts: Mapping[int, Part]) -> list[torch.Tensor]:
    """What the leaves of some layers store, each tensor once."""
    distinct = {}
    for task, part in parts.items():
        leaf = networks[task].get_submodule(part.place[0])
        for name in leaf.layout.block_tasks():
            distinct[id(leaf._parameters[name])] = leaf._parameters[name]
    return list(distinct.values())
