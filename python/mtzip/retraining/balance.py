"""Factors of the tasks' losses: given ones, or balanced so that no task starves another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: Share of a new loss in the running mean that a task's progress is measured by.
MOMENTUM = 0.1


class Fixed:
    """The factors the user gave, 1 where not given."""

    def __init__(self, weights: Mapping[str, float]):
        self.weights = dict(weights)

    def update(self, losses: Mapping[str, float]) -> None:
        """Nothing is learned from the losses."""

    def state(self) -> dict[str, Any]:
        return {}

    def load(self, state: Mapping[str, Any]) -> None:
        """There is nothing to load."""


class Balanced:
    """Every loss relative to what it was at first, and more weight to the tasks that have come down least.

    w_t is proportional to r_t / L_t(0), with L_t(0) the loss of the first step and r_t = L_t / L_t(0) what is left of
    it, the relative inverse training rate of GradNorm (Chen et al., ICML 2018, eq. 1) used as a factor itself, as in
    Dynamic Weight Average (Liu, Johns, Davison, CVPR 2019), with no gradient norms to compute. The factors are scaled
    so that sum_t w_t L_t(0) = sum_t L_t(0): the summed loss starts as it would without them.

    So a task's unit of loss does not matter, and a task that is held back by the others gains weight until it is not.
    """

    def __init__(self, tasks: tuple[str, ...]):
        self.weights = dict.fromkeys(tasks, 1.0)
        self.first: dict[str, float] = {}
        self.running: dict[str, float] = {}

    def update(self, losses: Mapping[str, float]) -> None:
        """Takes in the losses of a step; the factors are for the next one."""
        if not self.first:
            self.first = {task: max(loss, 1e-12) for task, loss in losses.items()}
            self.running = dict(self.first)
        for task, loss in losses.items():
            self.running[task] += MOMENTUM * (loss - self.running[task])
        self._set()

    def _set(self) -> None:
        left = {task: max(self.running[task] / first, 1e-12) for task, first in self.first.items()}
        whole = sum(self.first.values()) / sum(left.values())
        self.weights = {task: whole * left[task] / first for task, first in self.first.items()}

    def state(self) -> dict[str, Any]:
        """For :meth:`load`."""
        return {"first": self.first, "running": self.running}

    def load(self, state: Mapping[str, Any]) -> None:
        """Continues from another's state."""
        self.first, self.running = dict(state["first"]), dict(state["running"])
        if self.first:
            self._set()
