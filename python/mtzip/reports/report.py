"""What a zip did: neurons shared on every axis and what that cost, parameters stored, what stayed private and why."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

from . import schema


@dataclass
class SharedBy:
    """How many neurons of an axis exactly these tasks, two or more, store together."""

    tasks: tuple[str, ...]
    neurons: int


@dataclass
class AxisReport:
    """One axis: a channel dimension that is shared between tasks.

    Args:
        name: path of the axis' first writer in the first task: the key for ``share={name: ...}``.
        neurons: task to width.
        shared: number of stored neurons that two or more tasks use.
        difference: functional difference of the merged neurons relative to the energy of their outputs; 0 is free,
            1 as bad as leaving the neurons out. None where nothing was measured.
        sets: which tasks use how many of those; empty in files of earlier versions, where all of an axis' tasks do.
    """

    name: str
    neurons: dict[str, int]
    shared: int
    difference: float | None = None
    sets: list[SharedBy] = field(default_factory=list)

    def used(self, task: str) -> int:
        """How many neurons of a task are shared with another."""
        if not self.sets:
            return min(self.shared, self.neurons[task])
        return sum(shared.neurons for shared in self.sets if task in shared.tasks)


@dataclass
class LayerReport:
    """One layer as merged: parameters before (sum over tasks) and after, samples, damping and error.

    Args:
        name: path in the first task.
        before: parameters of the layer summed over tasks.
        after: parameters stored.
        samples: task to number of positions its second moment was taken over.
        damping: lambda relative to the mean diagonal, after any escalation.
        space: "feature" (d x d second moment) or "sample" (n x n Gram matrix).
        error: task to mean squared error of the layer's output relative to its variance in the original.
        nonzero_before: parameters that are not zero, summed over tasks; None where that is not known.
        nonzero_after: the same of those stored.
    """

    name: str
    before: int
    after: int
    samples: dict[str, int] = field(default_factory=dict)
    damping: float = 0.0
    space: str = "feature"
    error: dict[str, float] = field(default_factory=dict)
    nonzero_before: int | None = None
    nonzero_after: int | None = None


@dataclass
class Private:
    """Something that was left private, and why."""

    task: str
    name: str
    reason: str


#: Values of a task's loss that a report keeps at most.
CURVE = 48


@dataclass
class Report:
    """What :func:`mtzip.zip_networks` did. ``print`` it for a table, :meth:`plot` it for a picture.

    Args:
        tasks: names of the tasks.
        method: "refit", "mtz" or "average".
        axes: channel dimensions that may be shared.
        layers: layers as merged, in the order of the sweep.
        private: what was left private, and why.
        parameters_before: of all networks together.
        parameters_after: stored in the zipped network, shared ones once.
        seconds: stage to time it took.
        planned: where a budget or plan was given, its predicted "parameters" and "error".
        output_error: where it was measured, task to relative output error on calibration inputs.
        memory: bytes: the "estimate" of what calibration takes where nothing goes to disk, the "least" that ``memory=``
            may be, the most of activations that was "kept" in memory, and what was "spilled" to disk.
        retraining: task to its loss over the steps of the last :func:`mtzip.retrain`, thinned out to ``CURVE`` values.
        retraining_steps: how many steps those were.
        follows: task to the one whose trunk it has taken over, instead of sharing one merged of both.
        errors: stage to task to test error, as ``{"originals": {"a": 1.6}, "zipped": {"a": 1.8}}``: yours to set, kept
            in the file.
        nonzero_before: parameters of all networks together that are not zero; None where that is not known.
        nonzero_after: the same of the zipped network, as it was zipped.
    """

    tasks: tuple[str, ...]
    method: str
    axes: list[AxisReport] = field(default_factory=list)
    layers: list[LayerReport] = field(default_factory=list)
    private: list[Private] = field(default_factory=list)
    parameters_before: int = 0
    parameters_after: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    planned: dict[str, float] = field(default_factory=dict)
    output_error: dict[str, float] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    retraining: dict[str, Sequence[float]] = field(default_factory=dict)
    retraining_steps: int = 0
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    follows: dict[str, str] = field(default_factory=dict)
    nonzero_before: int | None = None
    nonzero_after: int | None = None

    @property
    def ratio(self) -> float:
        """Parameters stored as a fraction of those before; 1 where there were none."""
        return self.parameters_after / self.parameters_before if self.parameters_before else 1.0

    @property
    def is_sparse(self) -> bool:
        """Whether the networks were pruned: a tenth of their parameters or more are zero."""
        return self.nonzero_before is not None and self.nonzero_before <= 0.9 * self.parameters_before

    def __str__(self) -> str:
        from .table import table

        return table(self)

    def plot(self, path=None):
        """Draws neurons shared and private, functional differences, and parameters before and after.

        Args:
            path: file to write (the ending chooses the format), or None.

        Returns:
            matplotlib.figure.Figure: not registered with pyplot, so there is nothing to close.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from .plot import plot

        return plot(self, path)

    def html(self, path, *, history=None, errors=None) -> None:
        """Writes a page to open in a browser: everything this report has, in one file that needs no other.

        Args:
            path: the file, usually ``.html``.
            history: what :func:`mtzip.retrain` returned, for its curves at every step; None for those of the report.
            follows: task to the one whose trunk it has taken over, instead of sharing one merged of both.
        errors: stage to task to test error; None for those of the report.

        Raises:
            OSError: the file cannot be written.
        """
        from .page import page, write_page

        write_page(path, page(self, history=history, errors=errors))

    def note_retraining(self, losses: Mapping[str, Sequence[float]]) -> None:
        """Keeps the curves of a retraining, in few values: task to its loss at every step."""
        self.retraining = {task: _thinned(values) for task, values in losses.items() if values}
        self.retraining_steps = max(map(len, losses.values()), default=0)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers, as JSON has them: None stands for a number that is not finite."""
        return _plain(asdict(self))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: a field missing, unknown or of the wrong kind; says which.
        """
        values = _REPORT(data, "report")
        axes = [{**axis, "sets": [SharedBy(**item) for item in axis["sets"]]} for axis in values["axes"]]
        values["axes"] = [AxisReport(**axis) for axis in axes]
        values["layers"] = [LayerReport(**layer) for layer in values["layers"]]
        values["private"] = [Private(**item) for item in values["private"]]
        return cls(**values)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value


_COUNTS, _NUMBERS = schema.mapping(schema.count), schema.mapping(schema.number)
_NONZERO = dict.fromkeys(("nonzero_before", "nonzero_after"), schema.optional(schema.count))
_AXIS = schema.fields(
    {
        "name": schema.text,
        "neurons": _COUNTS,
        "shared": schema.count,
        "difference": schema.optional(schema.number),
        "sets": schema.listing(schema.fields({"tasks": schema.listing(schema.text), "neurons": schema.count})),
    },
    defaults={"sets": ()},
)
_LAYER = schema.fields(
    {
        "name": schema.text,
        "before": schema.count,
        "after": schema.count,
        "samples": _COUNTS,
        "damping": schema.number,
        "space": schema.text,
        "error": _NUMBERS,
        **_NONZERO,
    },
    defaults=dict.fromkeys(_NONZERO),
)
_PRIVATE = schema.fields({"task": schema.text, "name": schema.text, "reason": schema.text})
_REPORT = schema.fields(
    {
        "tasks": schema.listing(schema.text),
        "method": schema.text,
        "axes": schema.listing(_AXIS),
        "layers": schema.listing(_LAYER),
        "private": schema.listing(_PRIVATE),
        "parameters_before": schema.count,
        "parameters_after": schema.count,
        "seconds": _NUMBERS,
        "planned": _NUMBERS,
        "output_error": _NUMBERS,
        "memory": _COUNTS,
        "retraining": schema.mapping(schema.listing(schema.number)),
        "retraining_steps": schema.count,
        "errors": schema.mapping(_NUMBERS),
        "follows": schema.mapping(schema.text),
        **_NONZERO,
    },
    defaults={
        "memory": {},
        "retraining": {},
        "retraining_steps": 0,
        "errors": {},
        "follows": {},
        **dict.fromkeys(_NONZERO),
    },
)


def _thinned(losses: Sequence[float]) -> list[float]:
    """A curve in at most ``CURVE`` values, four digits each: the first, the last, and means of the steps between."""
    if len(losses) > CURVE:
        edges = [1 + at * (len(losses) - 2) // (CURVE - 2) for at in range(CURVE - 1)]
        means = [sum(losses[a:b]) / (b - a) for a, b in pairwise(edges)]
        losses = [losses[0], *means, losses[-1]]
    return [float(f"{loss:.4g}") for loss in losses]
