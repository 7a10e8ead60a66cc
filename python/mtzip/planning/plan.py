"""What is decided before merging: how axes that several layers write are paired.

An axis that one layer writes is matched when the sweep arrives at that layer, on what really reaches it. An axis with
several writers (a residual stream) has to be paired for all of them before the first is merged.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import Tensor

from ..distributed import own_share
from ..inputs import Batch, leading
from ..merging.execute import Execution
from ..merging.match import Slots
from ..merging.moments import View
from ..merging.sensitivity import sensitivities
from ..merging.spill import Store
from ..prepare import Prepared
from ..trace.analysis import Analysis
from ..trace.correspond import AxisGroup, Correspondence, LayerGroup
from .activations import correlations, match_by_activations, same_form
from .budget import Plan, PlannedAxis
from .descend import Descent, is_wide
from .observe import Observed, observe, samples_needed
from .stored import Arithmetic

#: Rounds of coordinate descent at most; later ones were seen to change the total by less than a hundredth.
ROUNDS = 4

#: Samples of every task that correlations of activations are taken over, and those that a descent starts from: more
#: were measured to make no difference to where it ends.
ACTIVATION_SAMPLES, FIRST_SAMPLES = 256, 64


def plan_axes(
    analyses: Sequence[Analysis],
    correspondence: Correspondence,
    batches: Sequence[list[Batch]],
    counts: Mapping[str, int],
    method: str,
    matching: str,
    damping: float | None = None,
    store: Store | None = None,
    partial: Collection[str] = (),
) -> list[tuple[AxisGroup, Slots]]:
    """Pairings that have to be known before the sweep.

    Args:
        analyses: of the networks.
        correspondence: of their layers.
        batches: calibration chunks of every task.
        counts: axis name to number of neurons to share.
        method: "refit", "mtz" or "average".
        matching: "optimal", "greedy", or "activation", which pairs every axis here.
        damping: relative, None for the automatic one.
        store: that keeps activations; None keeps all in memory.
        partial: names of axes whose slots any of their tasks may share; of all others all tasks share each.
    """
    axes = [axis for axis in correspondence.axes if counts.get(axis.name)]
    coupled = [axis for axis in axes if sum(_is_dense(group) for group in axis.writers) > 1]
    if matching == "activation":
        found = pairings_by_activation(analyses, correspondence, batches, axes, counts, "optimal", partial=partial)
        return [(axis, found[id(axis)]) for axis in axes if id(axis) in found]
    if not coupled or method == "average":
        return []
    observed = observe_all(analyses, correspondence, batches, damping, store)
    if same_form(analyses):
        observed.slots = pairings_by_activation(
            analyses, correspondence, batches, axes, counts, matching, first=True, partial=partial
        )
    Descent(observed, axes, counts, matching, partial).run(ROUNDS)
    return [(axis, observed.slots[id(axis)]) for axis in coupled]


def make_plan(prepared: Prepared, affine: bool, matching: str, damping: float | None) -> Plan:
    """What sharing each neuron of every axis is predicted to cost, everything shared.

    Args:
        prepared: the networks.
        affine: whether tasks keep a private scale and shift.
        matching: "optimal", "greedy" or "activation".
        damping: relative, None for the automatic one.
    """
    analyses, correspondence = prepared.analyses, prepared.correspondence
    axes = correspondence.axes
    full = {axis.name: min(axis.sizes.values()) for axis in axes}
    with Store(prepared.limit) as store:
        observed = observe_all(analyses, correspondence, prepared.chunks, damping, store)
    assignment = "greedy" if matching == "greedy" else "optimal"
    if same_form(analyses):
        observed.slots = pairings_by_activation(
            analyses, correspondence, prepared.chunks, axes, full, assignment, first=True
        )
    descent = Descent(observed, axes, full, assignment)
    descent.run(1)
    sensitive = [sensitivities(analysis, chunks) for analysis, chunks in zip(analyses, prepared.chunks, strict=True)]
    planned = []
    for axis in axes:
        slots = descent.priced(axis)
        weight = sum(_importance(observed, group, sensitive) for group in axis.writers)
        costs = slots.costs.clamp_min(0).sort().values * (weight / slots.energy if slots.energy else 0.0)
        neurons = {prepared.tasks[task]: size for task, size in axis.sizes.items()}
        planned.append(PlannedAxis(axis.name, neurons, costs.tolist()))
    return Plan(planned, full, Arithmetic(analyses, correspondence, affine))


def _importance(observed: Observed, group: LayerGroup, sensitive: Sequence[Mapping[str, Tensor]]) -> float:
    """Relative output error if a group's layers put out their means only: mean of the tasks."""
    found = []
    for task, layer in group.layers.items():
        moment, weights = observed.moments[task].get(layer.path), sensitive[task].get(layer.path)
        if moment is not None and weights is not None:
            view = View.of(layer)
            matrix = view.matrix(observed.analyses[task].exported.tensor(layer.weight).detach().double())
            found.append(float((weights.to(matrix.device) * moment.variance(matrix)).sum()))
    return sum(found) / len(found) if found else 0.0


def pairings_by_activation(
    analyses, correspondence, batches, axes, counts, matching: str, first: bool = False, partial: Collection[str] = ()
) -> dict[int, Slots]:
    """id of an axis group to its pairing by correlation of activations, where there is one.

    Wide axes are paired greedily where these are the ``first`` pairings of a descent.
    """
    samples = own_share(FIRST_SAMPLES if first else ACTIVATION_SAMPLES)
    few = [leading(chunks, samples) for chunks in batches]
    found = correlations(analyses, correspondence, few, axes)
    slots = {}
    for axis in axes:
        way = "greedy" if first and is_wide(axis) else matching
        slots[id(axis)] = match_by_activations(axis, found[id(axis)], counts[axis.name], way, axis.name in partial)
    return {key: value for key, value in slots.items() if value is not None}


def observe_all(
    analyses: Sequence[Analysis],
    correspondence: Correspondence,
    batches: Sequence[list[Batch]],
    damping: float | None,
    store: Store | None = None,
) -> Observed:
    """Moments of every layer that tasks could share."""
    paths: list[list[str]] = [[] for _ in analyses]
    for group in correspondence.layers:
        for task, layer in group.layers.items():
            if layer.private is None and layer.groups == 1 and len(group.layers) > 1:
                paths[task].append(layer.path)
    moments = []
    for analysis, chunks, wanted in zip(analyses, batches, paths, strict=True):
        needed = samples_needed(analysis, wanted, sum(batch.size for batch in chunks))
        execution = Execution(analysis, analysis.exported.network, leading(chunks, needed), store)
        moments.append(observe(execution, wanted))
    return Observed(analyses, correspondence, moments, damping)


def _is_dense(group: LayerGroup) -> bool:
    return all(layer.private is None and layer.groups == 1 for layer in group.layers.values())
