"""``zip_networks`` and ``plan``: checks, tracing, and what the caller gets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .activations import same_form
from .budget import Budget, Plan
from .distributed import Ranks, agree_, check_same, together
from .plan import make_plan
from .prepare import prepare
from .share import ZippedNetwork, check_name
from .sweep import Options
from .within import counts_of, note_plan, predicted_counts, within, zip_prepared

METHODS = ("refit", "mtz", "average")
MATCHINGS = ("optimal", "greedy", "activation")


def zip_networks(
    networks: Mapping[str, nn.Module],
    inputs: Mapping[str, Any],
    share: float | Mapping[str, float | int] | Budget | Plan = 1.0,
    method: str = "refit",
    *,
    matching: str = "optimal",
    affine: bool = True,
    damping: float | None = None,
    reconstructions: int = 0,
    samples: int | None = None,
    keep_moments: bool = False,
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
            private. ``share=0`` gives the originals, bit for bit. ``Budget(parameters=0.6)`` or ``Budget(error=0.02)``
            chooses the counts; a :class:`Plan` made by :func:`plan` has them.
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
        keep_moments: keep the second moments of what the shared layers read, so that :func:`add_network` can give the
            shared weights their due weight later, without these inputs. It costs the memory of a square matrix of every
            shared layer's columns a task.
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
    prepared = prepare(networks, inputs, samples)
    if matching == "activation" and not same_form(prepared.analyses):
        raise ValueError(
            "matching='activation' needs inputs of one shape and type, got networks that take different ones; "
            "use matching='optimal'"
        )
    affine = affine and method == "refit"
    shown = progress and ranks.rank == 0
    options = Options(method, {}, matching, affine, damping, reconstructions, shown, keep_moments)
    with together(ranks):
        if isinstance(share, Budget):
            result = within(share, prepared, networks, options)
        else:
            counts = share.counts if isinstance(share, Plan) else share
            options.counts = counts_of(counts, prepared.correspondence.axes)
            result = zip_prepared(prepared, networks, options)
            if isinstance(share, Plan):
                note_plan(result, share)
    orders = {task: {path: o.tolist() for path, o in paths.items()} for task, paths in result.orders.items()}
    agree_(ranks, result, repr((result.layouts(), orders)))
    return result


def plan(
    networks: Mapping[str, nn.Module],
    inputs: Mapping[str, Any],
    share: float | Mapping[str, float | int] | Budget = 1.0,
    *,
    matching: str = "optimal",
    affine: bool = True,
    damping: float | None = None,
    samples: int | None = None,
) -> Plan:
    """What :func:`zip_networks` would share, and what each axis is predicted to cost, without merging anything.

    Args:
        networks, inputs, matching, affine, damping, samples: as in :func:`zip_networks`.
        share: as there; of a ``Budget(error=...)`` the predicted error is taken, which adds up the errors of single
            layers and is rough: zipping to that budget measures.

    Returns:
        A plan: print it, change ``plan.counts`` by hand, give it to :func:`zip_networks` as ``share``.
    """
    _check(networks, inputs, share, "refit", matching, damping, 0, samples)
    prepared = prepare(networks, inputs, samples)
    made = make_plan(prepared, affine, matching, damping)
    if isinstance(share, Budget):
        made.counts = predicted_counts(share, made)
    else:
        made.counts = counts_of(share.counts if isinstance(share, Plan) else share, prepared.correspondence.axes)
    return made


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
    values = share.values() if isinstance(share, Mapping) else [] if isinstance(share, (Budget, Plan)) else [share]
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
