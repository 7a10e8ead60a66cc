"""What a zip did: neurons shared on every axis, what it cost, parameters before and after, what stayed private and why."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class AxisReport:
    """One axis: a channel dimension that is shared between tasks.

    Args:
        name: path of the axis' first writer in the first task: the key for ``share={name: ...}``.
        neurons: task to width.
        shared: number of neurons stored once (of the smallest width).
        difference: functional difference of the merged neurons relative to the energy of their outputs; 0 is free,
            1 as bad as leaving the neurons out. None where nothing was measured.
    """

    name: str
    neurons: dict[str, int]
    shared: int
    difference: float | None = None


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
    """

    name: str
    before: int
    after: int
    samples: dict[str, int] = field(default_factory=dict)
    damping: float = 0.0
    space: str = "feature"
    error: dict[str, float] = field(default_factory=dict)


@dataclass
class Private:
    """Something that was left private, and why."""

    task: str
    name: str
    reason: str


@dataclass
class Report:
    """What :func:`mtzip.zip_networks` did."""

    tasks: tuple[str, ...]
    method: str
    axes: list[AxisReport] = field(default_factory=list)
    layers: list[LayerReport] = field(default_factory=list)
    private: list[Private] = field(default_factory=list)
    parameters_before: int = 0
    parameters_after: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers."""
        return asdict(self)
