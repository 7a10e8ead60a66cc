"""How many steps of retraining it takes until the error has come back to that of the originals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import mtzip
from mtzip.network.assembly import assembled_anew

from . import measure
from .case import Case

WITHIN = 0.1  # percentage points that the mean error over the tasks may be above the originals'


class Recovery:
    """Looks at the test error every few steps until it has recovered; given to :func:`mtzip.retrain` as ``log=``.

    Args:
        zipped: the network being retrained, which looking does not change.
        case: with the test images, and how often to look.
        before: what the originals get wrong.
    """

    def __init__(self, zipped: mtzip.ZippedNetwork, case: Case, before: measure.Wrong):
        self.zipped, self.case, self.before = zipped, case, before
        self.steps = math.inf
        self.increases: dict[int, float] = {}

    def __call__(self, step: int, _: object = None) -> None:
        """Looks, if it is time to."""
        if math.isfinite(self.steps) or not self.case.every or step % self.case.every:
            return
        with assembled_anew():  # a fused optimiser leaves no trace by which kept weights would be known to be old
            now = measure.wrong({task: self.zipped[task] for task in self.zipped}, self.case.tasks)
        self.increases[step] = measure.increase(self.before, now, self.case.tasks)[0]
        if self.increases[step] <= WITHIN:
            self.steps = step


def shown(steps: Sequence[float], most: int) -> str:
    """The median over runs, or that it took more than there were."""
    median = statistics.median(steps)
    return f"{median:g}" if math.isfinite(median) else f"> {most}"
