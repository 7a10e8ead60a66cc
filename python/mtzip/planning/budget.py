"""Choosing how many neurons of every axis to share: a budget instead of a dict.

From everything shared, the neurons are given up that cost most error for each parameter they save. That orders all
neurons once; a budget of parameters or of error is a point on that path.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .stored import Arithmetic

#: Steps a whole axis is given up in: finer ones cost time and were not seen to matter.
STEPS = 16


@dataclass(frozen=True)
class Budget:
    """How small, or how exact, a zip is to be: one of the two.

    Args:
        parameters: stored parameters as a fraction of all networks' together, in (0, 1].
        error: relative output error on the calibration inputs, mean of the tasks: mean squared change of the outputs
            over their variance, >= 0.
    """

    parameters: float | None = None
    error: float | None = None

    def __post_init__(self) -> None:
        if (self.parameters is None) == (self.error is None):
            raise ValueError(
                f"Budget must have parameters or error, got parameters={self.parameters!r} and error={self.error!r}; "
                "write Budget(parameters=0.6) or Budget(error=0.02)"
            )
        if self.parameters is not None and not 0 < self.parameters <= 1:
            raise ValueError(f"Budget.parameters must be a fraction in (0, 1], got {self.parameters!r}")
        if self.error is not None and not 0 <= self.error < float("inf"):
            raise ValueError(f"Budget.error must be a number >= 0, got {self.error!r}")


@dataclass
class PlannedAxis:
    """One axis of a plan.

    Args:
        name: the key of ``Plan.counts``.
        neurons: task to width.
        costs: predicted relative output error of sharing each further neuron, the cheapest first.
    """

    name: str
    neurons: dict[str, int]
    costs: list[float] = field(default_factory=list)

    @property
    def width(self) -> int:
        """Most neurons that can be shared."""
        return min(self.neurons.values())


class Plan:
    """What would be shared: look at it, change ``counts`` by hand, give it to :func:`zip_networks` as ``share``.

    Args:
        axes: what can be shared.
        counts: axis name to number of neurons to share.
        arithmetic: of parameters.
    """

    def __init__(self, axes: Sequence[PlannedAxis], counts: Mapping[str, int], arithmetic: Arithmetic):
        self.axes, self.counts, self.arithmetic = list(axes), dict(counts), arithmetic

    @property
    def parameters_before(self) -> int:
        """Of all networks together."""
        return self.arithmetic.total

    @property
    def parameters(self) -> int:
        """Stored with these counts: exact."""
        return self.arithmetic.stored(self.counts)

    @property
    def error(self) -> float:
        """Predicted relative output error: the errors of all merged neurons added up, as if they were independent."""
        return sum(sum(axis.costs[: self.counts.get(axis.name, 0)]) for axis in self.axes)

    def __str__(self) -> str:
        width = max([len(axis.name) for axis in self.axes] + [4])
        lines = [f"{'axis':{width}}  of  shared      %  predicted error"]
        for axis in self.axes:
            count = self.counts.get(axis.name, 0)
            share = 100 * count / axis.width if axis.width else 0
            lines.append(f"{axis.name:{width}} {axis.width:4d} {count:6d} {share:6.0f}  {sum(axis.costs[:count]):.3g}")
        ratio = self.parameters / self.parameters_before if self.parameters_before else 1
        lines.append(
            f"{self.parameters:,} parameters of {self.parameters_before:,} ({ratio:.1%}), "
            f"predicted relative output error {self.error:.3g}"
        )
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"Plan({self.counts})"


def path_of_counts(axes: Sequence[PlannedAxis], arithmetic: Arithmetic) -> list[dict[str, int]]:
    """Counts from everything shared down to nothing, giving up at each step what costs most error per parameter."""
    counts = {axis.name: axis.width for axis in axes}
    path = [dict(counts)]
    while any(counts.values()):
        stored = arithmetic.stored(counts)
        best, chosen = -1.0, None
        for axis in axes:
            count = counts[axis.name]
            if not count:
                continue
            fewer = max(count - max(axis.width // STEPS, 1), 0)
            relieved = sum(axis.costs[fewer:count])
            added = max(arithmetic.stored({**counts, axis.name: fewer}) - stored, 1)
            if relieved / added > best:
                best, chosen = relieved / added, (axis.name, fewer)
        counts[chosen[0]] = chosen[1]
        path.append(dict(counts))
    return path


def counts_for_parameters(axes: Sequence[PlannedAxis], arithmetic: Arithmetic, fraction: float) -> dict[str, int]:
    """The point of the path that shares least within so many parameters; raises ValueError where none does."""
    allowed = fraction * arithmetic.total
    fitting = [counts for counts in path_of_counts(axes, arithmetic) if arithmetic.stored(counts) <= allowed]
    if not fitting:
        least = arithmetic.stored({axis.name: axis.width for axis in axes}) / max(arithmetic.total, 1)
        raise ValueError(
            f"Budget.parameters must be at least {least:.4f}, what is stored with everything shared, got {fraction}"
        )
    return fitting[-1]
