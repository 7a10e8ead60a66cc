"""Validation while retraining: the best weights are kept, and a run that gets no better is stopped."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..network.zipped import ZippedNetwork
from .guard import Snapshot, modes_kept, random_kept
from .history import Validation


class Best:
    """The best weights so far, by a score where lower is better.

    Args:
        zipped: the network being retrained.
        validate: what scores it: a number, or a mapping from name to number whose mean counts.
        every: number of steps between two validations.
        patience: stop after so many validations without a better score; None never stops.
    """

    def __init__(self, zipped: ZippedNetwork, validate: Callable, every: int, patience: int | None):
        self.zipped, self.validate, self.every, self.patience = zipped, validate, every, patience
        self.score, self.step, self.waited = math.inf, 0, 0
        self.weights = Snapshot(zipped)

    def due(self, step: int, steps: int) -> bool:
        """True where ``step`` of ``steps`` steps taken is a time to validate."""
        return step % self.every == 0 or step == steps

    def look(self, step: int, device: torch.device, together: Callable[[Mapping[str, float]], dict[str, float]]):
        """Scores the network in evaluation mode; keeps its weights if they are the best.

        Args:
            step: number of steps taken.
            device: of the network; the generators there end as they were.
            together: makes one of the scores of all processes.

        Returns:
            Validation: the scores.

        Raises:
            TypeError: ``validate`` returns no number.
        """
        with modes_kept([self.zipped]), random_kept(device), torch.no_grad():
            self.zipped.eval()
            found = self.validate(self.zipped)
        result = Validation(step, together(_scores(found)))
        if result.score < self.score:  # never for NaN
            self.score, self.step, self.waited = result.score, step, 0
            self.weights.keep()
        else:
            self.waited += 1
        return result

    @property
    def exhausted(self) -> bool:
        """True where patience has run out."""
        return self.patience is not None and self.waited >= self.patience

    def state(self) -> dict[str, Any]:
        """For :meth:`load`."""
        return {"score": self.score, "step": self.step, "waited": self.waited, "weights": self.weights.kept}

    def load(self, state: Mapping[str, Any]) -> None:
        """Continues from another's state."""
        self.score, self.step, self.waited = float(state["score"]), int(state["step"]), int(state["waited"])
        self.weights.fill(state["weights"])


def _scores(found: Any) -> dict[str, float]:
    scores = found if isinstance(found, Mapping) else {"score": found}
    try:
        scores = {str(name): float(score) for name, score in scores.items()}
    except (TypeError, ValueError, RuntimeError):
        scores = {}
    if not scores:
        raise TypeError(
            f"validate must return a number, lower is better, or a dict of them, got {type(found).__name__}; "
            "return the error, not the accuracy"
        )
    return scores
