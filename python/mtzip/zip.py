"""``zip_networks``: checks, tracing, the sweep, and the zipped network."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .activations import same_form
from .deploy.example import remembered
from .distributed import Ranks, agree_, check_same, together
from .execute import Execution
from .inputs import calibration_batches, device_of
from .leaf import LEAVES
from .orders import stored_orders
from .permute import verify_axes
from .plan import plan_axes
from .report import Private, Report
from .sensitivity import sensitivities
from .share import ZippedNetwork, check_name
from .sweep import Options, Sweep
from .trace.analysis import Analysis
from .trace.correspond import AxisGroup, correspond
from .trace.export import export

METHODS = ("refit", "mtz", "average")
MATCHINGS = ("optimal", "greedy", "activation")


def zip_networks(
    networks: Mapping[str, nn.Module],
    inputs: Mapping[str, Any],
    share: float | Mapping[str, float | int] = 1.0,
    method: str = "refit",
    *,
    matching: str = "optimal",
    affine: bool = True,
    damping: float | None = None,
    reconstructions: int = 0,
    samples: int | None = None,
    distributed: bool | None = None,
    progress: bool = False,
) -> ZippedNetwork:
    """Zips pretrained networks into one that stores shared weights once.

    Layer by layer, neurons of the networks whose weights are closest under the second moment of their inputs are
    paired, their weights merged in closed form, and (``method="refit"``) every layer is fitted by least squares to what
    the originals compute, so that no training is needed to start with.

    Args:
        networks: task name to pretrained network, at least one, two to share anything. Never changed.
        inputs: task name to calibration inputs without labels: a tensor [N, ...], an iterable of batches or a
            DataLoader giving inputs or (inputs, targets). A few hundred to a few thousand samples.
        share: fraction of every axis to share, of the smaller width; or a mapping from axis name (path of its first
            layer in the first network, as in the report) to a fraction (float) or a count (int), axes not named staying
            private. ``share=0`` gives the originals, bit for bit.
        method: "refit" (merge and joint least squares onto the originals), "mtz" (Multi-Task Zipping as published:
            functional difference and closed-form merge; He, Zhou, Thiele, NeurIPS 2018), or "average" (Euclidean
            match, plain mean, BatchNorm re-estimated), a baseline.
        matching: by functional difference, with "optimal" assignment or "greedy"; or "activation": by the correlation
            of activations, each network run on the inputs of all tasks, which must have one form.
        affine: each task keeps a private scale and shift for every shared neuron that no BatchNorm follows.
        damping: ridge of the second moments, relative to their mean diagonal; None chooses 0.1 times columns over
            positions, at least 0.001.
        reconstructions: how often the fit's target is adapted to the ReLU or max-pooling behind a layer (refit only);
            each costs a fraction of a forward pass.
        samples: most calibration samples to take from each task; None takes all there are.
            Convolutions with many positions a sample take their moments from the first few hundred of them.
        distributed: None works together with the processes of torch.distributed's default group, if there is one: call
            it in all of them with the same networks, each with its own part of the inputs (``x[rank::size]``, or what a
            DistributedSampler gives). All come to the same network, bit for bit. False works alone.
        progress: show a progress bar.

    Returns:
        The zipped network, with ``report``. It is in evaluation or training mode as the networks were.

    Raises:
        TypeError, ValueError: an argument is not as described.
        ZipError: a network cannot be traced.
        RuntimeError: another process of the group is gone.
    """
    _check(networks, inputs, share, method, matching, damping, reconstructions, samples)
    ranks = Ranks(distributed)
    check_same(ranks, networks, repr((list(networks), share, method, matching, affine, damping, reconstructions)))
    clock = time.perf_counter()
    seconds: dict[str, float] = {}
    tasks = list(networks)
    batches = {t: calibration_batches(t, inputs[t], samples, device_of(networks[t])) for t in tasks}
    analyses = [Analysis(export(t, networks[t], batches[t][0]), tuple(LEAVES)) for t in tasks]
    correspondence = correspond(analyses)
    if matching == "activation" and not same_form(analyses):
        raise ValueError(
            "matching='activation' needs inputs of one shape and type, got networks that take different ones; "
            "use matching='optimal'"
        )
    for task, analysis in enumerate(analyses):
        verify_axes(analysis, task, correspondence)
    seconds["trace"] = time.perf_counter() - clock
    clock = time.perf_counter()
    zipped = [copy.deepcopy(network) for network in networks.values()]
    options = Options(
        method,
        _counts(share, correspondence.axes),
        matching,
        affine and method == "refit",
        damping,
        reconstructions,
        progress and ranks.rank == 0,
    )
    chunks = [_chunks(analyses[t], batches[name]) for t, name in enumerate(tasks)]
    executions = [Execution(analyses[t], zipped[t], chunks[t]) for t in range(len(tasks))]
    sweep = Sweep(tasks, analyses, correspondence, executions, zipped, options)
    if any(options.counts.values()):
        with together(ranks):
            if method == "refit" and affine:
                sweep.sensitivities = [sensitivities(execution.analysis, execution.batches) for execution in executions]
            for axis, slots in plan_axes(analyses, correspondence, chunks, options.counts, method, matching, damping):
                sweep.store(axis, slots)
            sweep.run()
    seconds["zip"] = time.perf_counter() - clock
    report = Report(tuple(tasks), method, sweep.axes, sweep.layers, seconds=seconds)
    report.private = [Private(tasks[task], note.name, note.reason) for task, note in correspondence.notes]
    report.parameters_before = sum(p.numel() for network in networks.values() for p in network.parameters())
    originals = {name: analyses[t].exported.network for t, name in enumerate(tasks)}
    result = ZippedNetwork(dict(zip(tasks, sweep.networks, strict=True)), report, originals)
    result.orders = stored_orders(sweep)
    orders = {task: {path: o.tolist() for path, o in paths.items()} for task, paths in result.orders.items()}
    agree_(ranks, result, repr((result.layouts(), orders)))
    result.training = any(network.training for network in networks.values())
    report.parameters_after = result.parameter_count()
    for analysis in analyses:
        exported = analysis.exported
        result.example_inputs[exported.task] = remembered(exported.example, exported.fixed_batch)
    return result


def _chunks(analysis: Analysis, batches):
    """Calibration chunks; of the traced size where the graph insists on one."""
    fixed = analysis.exported.fixed_batch
    if fixed is None:
        return batches
    pieces = [batch.narrow(at, fixed) for batch in batches for at in range(0, batch.size - fixed + 1, fixed)]
    if not pieces:
        raise ValueError(
            f"task {analysis.exported.task!r} only runs on batches of {fixed} samples, as its forward fixes the batch "
            "size, and no calibration batch is that long; write x.size(0) or -1 instead of a number"
        )
    return pieces


def _counts(share: float | Mapping[str, float | int], axes: list[AxisGroup]) -> dict[str, int]:
    """Number of neurons to share on every axis."""
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


def _check(networks, inputs, share, method, matching, damping, reconstructions, samples) -> None:
    for name, value in (("networks", networks), ("inputs", inputs)):
        if not isinstance(value, Mapping):
            raise TypeError(f"{name} must be a mapping from task name to value, got {type(value).__name__}")
    if not networks:
        raise ValueError("networks must hold at least one network, got none")
    for task, network in networks.items():
        check_name(task)
        if not isinstance(network, nn.Module):
            raise TypeError(f"networks[{task!r}] must be an nn.Module, got {type(network).__name__}")
    if set(networks) != set(inputs):
        raise ValueError(f"inputs must have the tasks of networks, {sorted(networks)}, got {sorted(inputs)}")
    if len({id(network) for network in networks.values()}) < len(networks):
        raise ValueError("networks must be different objects, got the same one twice; pass copy.deepcopy of it")
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    if matching not in MATCHINGS:
        raise ValueError(f"matching must be one of {MATCHINGS}, got {matching!r}")
    values = share.values() if isinstance(share, Mapping) else [share]
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value or value < 0:
            raise ValueError(f"share must be a fraction in [0, 1] or a mapping of fractions and counts, got {value!r}")
        if (isinstance(value, float) or not isinstance(share, Mapping)) and value > 1:
            raise ValueError(f"share must be a fraction in [0, 1], got {value!r}; counts are ints in a mapping")
    if damping is not None and not 0 < damping < float("inf"):
        raise ValueError(f"damping must be a positive number or None, got {damping!r}")
    if reconstructions < 0:
        raise ValueError(f"reconstructions must be 0 or more, got {reconstructions!r}")
    if samples is not None and samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples!r}")
    for task, network in networks.items():
        for path, parameter in network.named_parameters():
            if parameter.is_floating_point() and not torch.isfinite(parameter).all():
                raise ValueError(f"networks[{task!r}]: {path} must be finite, got NaN or Inf")
