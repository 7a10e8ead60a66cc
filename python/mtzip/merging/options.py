"""How to merge: what the stages of one zip have to know of the user's choices."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass


@dataclass
class Options:
    """How to merge.

    Args:
        method: "refit", "mtz" or "average".
        counts: axis name to the number of neurons to share.
        matching: "optimal" or "greedy".
        affine: private scale and shift per shared neuron where no BatchNorm follows (refit only).
        damping: relative to the mean variance of a layer's columns; None chooses it by samples and columns.
        reconstructions: activation-aware substitutions of the target (refit only).
        progress: show a bar.
        keep_moments: keep what a task that joins later needs.
        keep_zeros: as in :func:`mtzip.zip_networks`.
        partial: names of axes whose slots any of their tasks may share; of all others all tasks share each.
    """

    method: str
    counts: Mapping[str, int]
    matching: str = "optimal"
    affine: bool = True
    damping: float | None = None
    reconstructions: int = 0
    progress: bool = False
    keep_moments: bool = False
    keep_zeros: bool | str = False
    partial: Collection[str] = ()
