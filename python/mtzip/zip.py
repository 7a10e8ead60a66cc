"""``zip_networks`` and ``plan``: checks, tracing, and what the caller gets."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn
from tqdm import tqdm

from .arguments import check_arguments, check_keep_zeros, check_outputs, check_slots
from .distributed import Ranks, agree_, check_same, together
from .follow import check_follow, zip_following
from .inputs import device_of
from .memory import bytes_of, limit_of, shown
from .merging.options import Options
from .network.zipped import ZippedNetwork
from .planning.activations import same_form
from .planning.budget import Budget, Plan
from .planning.partial import partial_axes
from .planning.plan import make_plan
from .precision import exact_products
from .prepare import Prepared, prepare
from .trace.given import Given
from .trace.select import Select
from .within import counts_of, note_plan, predicted_counts, within, zip_prepared

_log = logging.getLogger("mtzip")


@exact_products()
def zip_networks(
    networks: Mapping[str, nn.Module],
    inputs: Mapping[str, Any],
    share: float | Mapping[str, float | int] | Budget | Plan = 1.0,
    method: str = "refit",
    *,
    matching: str = "optimal",
    affine: bool = True,
    damping: float | None = None,
    reconstructions: int = 1,
    follow: bool | Mapping[str, str] = True,
    samples: int | None = None,
    correspondence: Sequence[Given] | None = None,
    outputs: Mapping[str, Select] | None = None,
    memory: int | float | str | None = None,
    keep_moments: bool = False,
    slots: str = "all",
    keep_zeros: bool | str = False,
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
            each costs a fraction of a forward pass, and more than one has not paid.
        follow: whether a task may follow another: take over the trunk of another's network as it is, its head fitted
            to that by least squares, where this keeps the outputs of all tasks together better than merging the
            trunks (refit only). Networks trained apart for one task are like that. They must be one graph and take
            inputs of one form. A mapping, ``{"b": "a"}``, says who follows whom; the report has who did.
        samples: most calibration samples to take from each task; None takes all there are.
            Convolutions with many positions a sample take their moments from the first few hundred of them.
        correspondence: which layers answer to each other, where the graphs walked in parallel say it otherwise: a
            list of mappings from task name to layer path, one for every group, as in ``[{"a": "fc1", "b": "fc2"}]``.
            A layer named there leaves the group the walk put it in, and the walk goes on behind those paired; one named
            alone (or beside ``None``) stays private.
        outputs: task to what of its network's output counts: a name (of a dict, ``ModelOutput`` or dataclass), an
            index, or a function of the output. A task not named, or ``None``, takes plain tensors as they are, and
            of other objects the logits. Only what counts is kept right, retrained for and exported.
        memory: bytes, or a text such as "4GB", that activations, moments and factors of calibration may take beside the
            networks and the inputs; None for half of what is free. Activations beyond it go to a temporary folder (in
            ``TMPDIR``), which changes no result. On a GPU it is the GPU's memory. The report has what was needed.
        keep_moments: keep the second moments of what the shared layers read, so that :func:`add_network` can give the
            shared weights their due weight later, without these inputs. It costs the memory of a square matrix of every
            shared layer's columns a task.
        slots: of three and more tasks, which share a stored neuron: "all" of those that have the axis, or "some", any
            two or more of them. With "some" a neuron joins stored ones where that costs least, and as many neurons are
            stored: each axis has as many joins as "all" would make, whichever tasks they are of. Budgets and plans
            count on "all".
        keep_zeros: for pruned networks. True stores a weight as zero where all tasks that store it have a zero: private
            weights keep the network's own zeros, shared ones those that all have at the matched place. Networks pruned
            apart differ in most of them, and "count" keeps their number too: rows that tasks share have no more weights
            than the task with most has there, those that matter most. Rows are fitted under these zeros, and
            :func:`retrain` keeps them; the report counts what is not zero before and after.
        distributed: None works together with the processes of torch.distributed's default group, if there is one: call
            it in all of them with the same networks, each with its own part of the inputs (``x[rank::size]``, or what a
            DistributedSampler gives). All come to the same network, bit for bit. False works alone.
        progress: show a progress bar.

    Returns:
        The zipped network, with ``report``. It is in evaluation or training mode as the networks were.

    Raises:
        TypeError, ValueError: an argument is not as described.
        KeyError: a task that there is none of, in ``correspondence`` or ``outputs``.
        ZipError: a network cannot be traced.
        RuntimeError: another process of the group is gone.
    """
    check_arguments(networks, inputs, share, method, matching, damping, reconstructions, samples)
    check_slots(slots, share)
    check_outputs(outputs, networks)
    check_follow(follow, networks, method)
    check_keep_zeros(keep_zeros)
    allowed = bytes_of(memory)
    ranks = Ranks(distributed)
    settings = (
        list(networks),
        share,
        method,
        matching,
        affine,
        damping,
        reconstructions,
        follow,
        keep_zeros,
        correspondence,
        slots,
        _named(outputs),
    )
    check_same(ranks, networks, repr(settings))
    prepared = prepare(networks, inputs, samples, correspondence, outputs)
    _fit(prepared, allowed, progress and ranks.rank == 0)
    if matching == "activation" and not same_form(prepared.analyses):
        raise ValueError(
            "matching='activation' needs inputs of one shape and type, got networks that take different ones; "
            "use matching='optimal'"
        )
    affine = affine and method == "refit"
    bars = progress and ranks.rank == 0
    options = Options(method, {}, matching, affine, damping, reconstructions, bars, keep_moments, keep_zeros)
    if slots == "some":
        options.partial = partial_axes(prepared.analyses, prepared.correspondence)
    with together(ranks):
        make = partial(_make, share, options)
        result = zip_following(make, prepared, networks, follow if method == "refit" else False, share)
    result.outputs = {task: select for task, select in (outputs or {}).items() if select is not None}
    orders = {task: {path: o.tolist() for path, o in paths.items()} for task, paths in result.orders.items()}
    agree_(ranks, result, repr((result.layouts(), orders)))
    return result


def _make(share, options: Options, prepared: Prepared, networks: Mapping[str, nn.Module]) -> ZippedNetwork:
    """The zip that ``share`` asks for."""
    if isinstance(share, Budget):
        return within(share, prepared, networks, options)
    counts = share.counts if isinstance(share, Plan) else share
    options.counts = counts_of(counts, prepared.correspondence.axes)
    result = zip_prepared(prepared, networks, options)
    return note_plan(result, share) if isinstance(share, Plan) else result


@exact_products()
def plan(
    networks: Mapping[str, nn.Module],
    inputs: Mapping[str, Any],
    share: float | Mapping[str, float | int] | Budget = 1.0,
    *,
    matching: str = "optimal",
    affine: bool = True,
    damping: float | None = None,
    samples: int | None = None,
    correspondence: Sequence[Given] | None = None,
    outputs: Mapping[str, Select] | None = None,
    memory: int | float | str | None = None,
) -> Plan:
    """What :func:`zip_networks` would share, and what each axis is predicted to cost, without merging anything.

    Args:
        networks, inputs, matching, affine, damping, samples, correspondence, outputs, memory: as in
            :func:`zip_networks`.
        share: as there; of a ``Budget(error=...)`` the predicted error is taken, which adds up the errors of single
            layers and is rough: zipping to that budget measures.

    Returns:
        A plan: print it, change ``plan.counts`` by hand, give it to :func:`zip_networks` as ``share``.
    """
    allowed = bytes_of(memory)
    check_arguments(networks, inputs, share, "refit", matching, damping, 0, samples)
    check_outputs(outputs, networks)
    prepared = prepare(networks, inputs, samples, correspondence, outputs)
    _fit(prepared, allowed, False)
    made = make_plan(prepared, affine, matching, damping)
    if isinstance(share, Budget):
        made.counts = predicted_counts(share, made)
    else:
        made.counts = counts_of(share.counts if isinstance(share, Plan) else share, prepared.correspondence.axes)
    return made


def _fit(prepared: Prepared, memory: int | None, progress: bool) -> None:
    """Says what is needed, and how much of it may stay in memory."""
    device = device_of(prepared.analyses[0].exported.network)
    prepared.limit = limit_of(memory, prepared.need, device)
    allowed = prepared.limit + prepared.need.working
    beyond = "; what is beyond goes to disk" if prepared.need.total > allowed else ""
    text = f"estimated memory {shown(prepared.need.total)} of {shown(allowed)}, {prepared.need.samples} samples{beyond}"
    _log.info(text)
    if progress:
        tqdm.write(text)


def _named(outputs: Mapping[str, Select] | None) -> dict[str, Any]:
    """What is the same in every process: functions by their name, without their address."""
    return {t: getattr(s, "__qualname__", "function") if callable(s) else s for t, s in (outputs or {}).items()}
