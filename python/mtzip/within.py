"""One zip of prepared networks, and the zips that a budget asks for."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from .distributed import own_share, total
from .merging.execute import Execution
from .merging.kept import Kept
from .merging.options import Options
from .merging.orders import stored_orders
from .merging.sensitivity import sensitivities
from .merging.spill import Store
from .merging.sweep import Sweep
from .network.example import remembered
from .network.zeros import nonzero
from .network.zipped import ZippedNetwork
from .planning.budget import Budget, Plan, counts_for_parameters, path_of_counts
from .planning.plan import make_plan, plan_axes
from .prepare import Prepared
from .reports.report import Private, Report
from .trace.correspond import AxisGroup

#: Samples of every task that the output error of a budget is measured on.
ERROR_SAMPLES = 1024


def zip_prepared(prepared: Prepared, networks: Mapping[str, nn.Module], options: Options) -> ZippedNetwork:
    """One zip with the counts of the options."""
    with Store(prepared.limit) as store:
        return _zip(prepared, networks, options, store)


def _zip(prepared: Prepared, networks: Mapping[str, nn.Module], options: Options, store: Store) -> ZippedNetwork:
    clock = time.perf_counter()
    tasks, analyses, correspondence = list(prepared.tasks), prepared.analyses, prepared.correspondence
    zipped = [copy.deepcopy(network) for network in networks.values()]
    executions = [Execution(a, n, c, store) for a, n, c in zip(analyses, zipped, prepared.chunks, strict=True)]
    sweep = Sweep(tasks, analyses, correspondence, executions, zipped, options)
    if any(options.counts.values()):
        if options.method == "refit" and options.affine:
            if not prepared.sensitivities:
                prepared.sensitivities = [sensitivities(e.analysis, e.batches) for e in executions]
            sweep.sensitivities = prepared.sensitivities
        for axis, slots in plan_axes(
            analyses,
            correspondence,
            prepared.chunks,
            options.counts,
            options.method,
            options.matching,
            options.damping,
            store,
            options.partial,
        ):
            sweep.store(axis, slots)
        sweep.run()
    seconds = {"trace": prepared.seconds, "zip": time.perf_counter() - clock}
    report = Report(tuple(tasks), options.method, sweep.axes, sweep.layers, seconds=seconds)
    wanted = prepared.need
    report.memory = {"estimate": wanted.total, "least": wanted.least, "kept": store.peak, "spilled": store.spilled}
    report.private = [Private(tasks[task], note.name, note.reason) for task, note in correspondence.notes]
    report.parameters_before = sum(p.numel() for network in networks.values() for p in network.parameters())
    report.nonzero_before = sum(nonzero(original.parameters()) for original in prepared.originals)
    originals = dict(zip(tasks, prepared.originals, strict=True))
    result = ZippedNetwork(dict(zip(tasks, sweep.networks, strict=True)), report, originals)
    result.orders = stored_orders(sweep)
    if options.keep_moments:
        layers = dict(zip(tasks, sweep.kept, strict=True))
        how = options.method, options.matching, options.affine, options.damping
        result.moments = Kept(*how, layers, options.keep_zeros)
    result.keep_zeros = bool(options.keep_zeros)
    result.training = any(network.training for network in networks.values())
    report.parameters_after = result.parameter_count()
    report.nonzero_after = nonzero(result.parameters())
    for analysis in analyses:
        exported = analysis.exported
        result.example_inputs[exported.task] = remembered(exported.example, exported.fixed_batch)
    return result


def counts_of(share: float | Mapping[str, float | int], axes: Sequence[AxisGroup]) -> dict[str, int]:
    """Number of neurons to share on every axis.

    Raises:
        ValueError: an axis there is none of, or more neurons than it has.
    """
    counts = {}
    if isinstance(share, Mapping):
        known = [axis.name for axis in axes]
        unknown = [name for name in share if name not in known]
        if unknown:
            raise ValueError(f"share must name axes among {known}, got {unknown[0]!r}")
    for axis in axes:
        wanted = share.get(axis.name, 0) if isinstance(share, Mapping) else share
        width = min(axis.sizes.values())
        is_count = isinstance(share, Mapping) and isinstance(wanted, int)
        count = wanted if is_count else round(wanted * width)
        if not 0 <= count <= width:
            raise ValueError(f"share[{axis.name!r}] must be at most its smaller width {width}, got {wanted}")
        counts[axis.name] = int(count)
    return counts


def within(budget: Budget, prepared: Prepared, networks: Mapping[str, nn.Module], options: Options) -> ZippedNetwork:
    """The zip that shares least within a budget of parameters, or most within one of error."""
    made = make_plan(prepared, options.affine, options.matching, options.damping)
    if budget.parameters is not None:
        options.counts = made.counts = predicted_counts(budget, made)
        result = zip_prepared(prepared, networks, options)
        result.report.output_error = output_errors(result, prepared)
        return note_plan(result, made)
    path = path_of_counts(made.axes, made.arithmetic)
    low, high, best = 0, len(path) - 1, None  # halving: the error falls along the path but for noise
    while low <= high:
        middle = (low + high) // 2
        options.counts = path[middle]
        result = zip_prepared(prepared, networks, options)
        errors = result.report.output_error = output_errors(result, prepared)
        if sum(errors.values()) / len(errors) <= budget.error:
            made.counts, best, high = path[middle], result, middle - 1
        else:
            low = middle + 1
    return note_plan(best, made)  # the end of the path shares nothing and has no error


def predicted_counts(budget: Budget, made: Plan) -> dict[str, int]:
    """Counts within a budget as far as the plan can tell."""
    if budget.parameters is not None:
        return counts_for_parameters(made.axes, made.arithmetic, budget.parameters)
    path = path_of_counts(made.axes, made.arithmetic)
    return next((c for c in path if Plan(made.axes, c, made.arithmetic).error <= budget.error), path[-1])


def note_plan(result: ZippedNetwork, made: Plan) -> ZippedNetwork:
    """Writes what a plan predicted into the report."""
    result.report.planned = {"parameters": made.parameters / max(made.parameters_before, 1), "error": made.error}
    return result


def output_errors(zipped: ZippedNetwork, prepared: Prepared) -> dict[str, float]:
    """Task to relative output error on calibration inputs: mean squared change of the outputs over their variance.

    Over the inputs of all processes, so that all take the same way through a budget.
    """
    found = {}
    for at, (task, chunks) in enumerate(zip(prepared.tasks, prepared.chunks, strict=True)):
        exported = prepared.analyses[at].exported
        networks = prepared.originals[at], copy.deepcopy(zipped[task]).eval()
        pairs, taken = [], 0
        for batch in chunks:
            if taken >= own_share(ERROR_SAMPLES):
                break
            taken += batch.size
            with torch.no_grad():
                pairs += [zip(*(exported.outputs(n, batch) for n in networks), strict=True)]
        change = variance = 0.0
        for wanted, got in (map(torch.cat, zip(*leaves, strict=True)) for leaves in zip(*pairs, strict=True)):
            wanted, got = wanted.double(), got.double()
            mean = total(wanted.sum(0)) / total(len(wanted))
            change += total(float((got - wanted).square().sum()))
            variance += total(float((wanted - mean).square().sum()))
        found[task] = change / variance if variance > 0 else change
    return found
