"""``add_network``: one more task for a zipped network, without the other tasks' data."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..arguments import check_arguments, check_devices
from ..distributed import Ranks, agree_, check_same, together
from ..inputs import calibration_batches, device_of
from ..merging.execute import Execution
from ..merging.options import Options
from ..merging.orders import stored_orders
from ..merging.sensitivity import sensitivities
from ..network.example import example_of, remembered
from ..network.zeros import nonzero
from ..network.zipped import ZippedNetwork
from ..planning.budget import Budget, Plan
from ..precision import exact_products
from ..prepare import chunks_of
from ..reports.report import AxisReport, LayerReport, Private, Report
from ..trace.analysis import Analysis
from ..trace.correspond import correspond
from ..trace.export import export
from ..trace.permute import verify_axes
from ..within import counts_of
from .joining import Joining


@exact_products()
def add_network(
    zipped: ZippedNetwork,
    task: str,
    network: nn.Module,
    inputs: Any,
    share: float | Mapping[str, float | int] = 1.0,
    *,
    samples: int | None = None,
    distributed: bool | None = None,
    progress: bool = False,
) -> ZippedNetwork:
    """Adds a task to a zipped network, with that task's calibration inputs alone.

    Neurons of the new network join those that are stored, shared or not, where that costs least. The rows they join are
    solved for jointly, the earlier tasks weighed by the second moments that ``zip_networks(..., keep_moments=True)``
    kept: for each of them as much as if all had been zipped together, but for what the rows before have changed since.
    What the earlier tasks compute *now* is what they are held to, so a retrained network may be added to. Their private
    scales, shifts and BatchNorms follow the rows that change; all else of theirs stays as it is, bit for bit.

    Left private, and named in the report: what is private there, and convolutions with groups.

    Args:
        zipped: a zipped network with moments. Not changed.
        task: name of the new one.
        network: its pretrained network. Not changed.
        inputs: calibration inputs of the new task, in any form that :func:`zip_networks` takes.
        share: fraction of every axis' neurons that join stored ones, of the new network's width or the number stored,
            whichever is less; or a mapping from axis name to a fraction (float) or a count (int). With 0 the new
            network is stored by itself, bit for bit.
        samples: most of the inputs to take.
        distributed: as in :func:`zip_networks`.
        progress: show a bar.

    Returns:
        A new zipped network of all tasks, with moments, so that another may be added. Errors of earlier tasks in its
        report are what they were, plus what the moments say that joining has cost.

    Raises:
        TypeError, ValueError: an argument is not as described; the task is there already; no moments were kept.
        ZipError: the network cannot be traced.
    """
    _check_arguments(zipped, task, network, inputs, share, samples)
    ranks = Ranks(distributed)
    check_same(ranks, {task: network}, repr((zipped.tasks, task, share)))
    clock, kept = time.perf_counter(), zipped.moments
    with together(ranks):
        batches = calibration_batches(task, inputs, samples, device_of(network))
        analyses = [_traced(zipped, earlier) for earlier in zipped.tasks]
        analyses.append(Analysis(export(task, network, batches[0])))
        correspondence, new = correspond(analyses), len(analyses) - 1
        verify_axes(analyses[new], new, correspondence)
        networks = [*copy.deepcopy(zipped.networks).values(), copy.deepcopy(network)]
        execution = Execution(analyses[new], networks[new], chunks_of(analyses[new], batches))
        shown = progress and ranks.rank == 0
        options = Options(kept.method, {}, kept.matching, kept.affine, kept.damping, 0, shown, True, kept.keep_zeros)
        layers = [kept.layers[earlier] for earlier in zipped.tasks]
        tasks = [*zipped.tasks, task]
        sweep = Joining(tasks, analyses, correspondence, execution, networks, options, layers)
        options.counts = counts_of(share, sweep.joinable())
        if any(options.counts.values()):
            if options.affine:
                sweep.sensitivities[new] = sensitivities(analyses[new], execution.batches)
            sweep.run()
    result = _assembled(zipped, sweep, task, network, time.perf_counter() - clock)
    orders = {name: {path: o.tolist() for path, o in paths.items()} for name, paths in result.orders.items()}
    agree_(ranks, result, repr((result.layouts(), orders)))
    return result


def _check_arguments(zipped, task, network, inputs, share, samples) -> None:
    if not isinstance(zipped, ZippedNetwork):
        got = type(zipped).__name__
        raise TypeError(f"zipped must be a ZippedNetwork, got {got}; a wrapper (DDP, torch.compile) has it inside")
    if isinstance(share, (Budget, Plan)):
        raise TypeError(f"share must be a fraction or a mapping, got a {type(share).__name__}; budgets are for zipping")
    check_arguments({task: network}, {task: inputs}, share, "refit", "optimal", None, 0, samples)
    check_devices({**zipped.networks, task: network})
    if task in zipped:
        raise ValueError(f"task must be none of {list(zipped.tasks)}, got {task!r}; give the new one another name")
    if any(network is known for known in (*zipped.networks.values(), *(zipped.originals or {}).values())):
        raise ValueError("network must be an object of its own, got one of zipped; pass copy.deepcopy of it")
    known = set(zipped.modules())
    if any(module in known for module in network.modules()):
        raise ValueError("network must share no module with zipped, got one that does; pass zipped.extract(task)")
    if zipped.moments is None:
        raise ValueError(
            "zipped must have the second moments of its layers, got none; zip with keep_moments=True and add before "
            "saving: a file does not hold them"
        )


def _traced(zipped: ZippedNetwork, task: str) -> Analysis:
    """The analysis of one task as it is stored."""
    return Analysis(export(task, zipped.extract(task), example_of(task, zipped[task], None, zipped.example_inputs)))


def _assembled(zipped: ZippedNetwork, sweep: Joining, task: str, network: nn.Module, seconds: float) -> ZippedNetwork:
    """The zipped network of all tasks, with everything that goes with it."""
    exported = sweep.analyses[sweep.new].exported
    originals = None if zipped.originals is None else {**zipped.originals, task: exported.network}
    result = ZippedNetwork(dict(zip(sweep.tasks, sweep.networks, strict=True)), None, originals)
    result.orders = {**zipped.orders, task: stored_orders(sweep)[task]}
    result.example_inputs = {**zipped.example_inputs, task: remembered(exported.example, exported.fixed_batch)}
    result.training = zipped.training or network.training
    result.keep_zeros = zipped.keep_zeros
    moments = zipped.moments
    layers = {**moments.layers, task: sweep.kept[sweep.new]}
    result.moments = dataclasses.replace(moments, layers=layers)
    result.report = _report(zipped, sweep, task, network, seconds)
    result.report.parameters_after = result.parameter_count()
    result.report.nonzero_after = nonzero(result.parameters())
    return result


def _report(zipped: ZippedNetwork, sweep: Joining, task: str, network: nn.Module, seconds: float) -> Report:
    """The report of a zip, with what has joined it."""
    old = copy.deepcopy(zipped.report) or Report(zipped.tasks, zipped.moments.method)
    report = Report((*zipped.tasks, task), old.method, seconds={**old.seconds, "add": seconds})
    report.axes = _updated(old.axes, {axis.name: axis for axis in sweep.axes}, _axis)
    for layer in sweep.layers:
        if layer.name not in sweep.sizes and not layer.name.endswith(f"({task})"):
            layer.name = f"{layer.name} ({task})"
    report.layers = _updated(
        old.layers, {layer.name: layer for layer in sweep.layers}, lambda a, b: _layer(a, b, *sweep.sizes[a.name])
    )
    notes = [Private(task, note.name, note.reason) for at, note in sweep.correspondence.notes if at == sweep.new]
    report.private = [*old.private, *notes, *sweep.left_private()]
    report.parameters_before = old.parameters_before + sum(p.numel() for p in network.parameters())
    report.nonzero_before = _added(old.nonzero_before, nonzero(network.parameters()))
    return report


def _updated(before: list, found: dict[str, Any], join) -> list:
    updated = [join(item, found.pop(item.name)) if item.name in found else item for item in before]
    return [*updated, *found.values()]


def _axis(old: AxisReport, new: AxisReport) -> AxisReport:
    return AxisReport(old.name, {**old.neurons, **new.neurons}, new.shared, new.difference, new.sets)


def _added(count: int | None, more: int) -> int | None:
    return None if count is None else count + more


def _layer(old: LayerReport, new: LayerReport, size: int, nonzero: int) -> LayerReport:
    """A layer that a task of so many parameters there has joined, so many of them not zero."""
    errors = {**old.error, **{task: error + old.error.get(task, 0.0) for task, error in new.error.items()}}
    samples = {**old.samples, **new.samples}
    before = _added(old.nonzero_before, nonzero)
    sizes = old.name, old.before + size, new.after
    return LayerReport(*sizes, samples, new.damping, new.space, errors, before, new.nonzero_after)
