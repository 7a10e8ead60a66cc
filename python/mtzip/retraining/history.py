"""What happened while retraining, step by step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Step:
    """One step of :func:`mtzip.retrain`.

    Args:
        step: its number, from 0.
        losses: task to loss before the step, without the task's factor.
        lr: learning rate of the optimiser's first parameter group.
        seconds: since retraining began, without the time between runs where it was resumed.
        weights: task to factor of its loss; 1 where not given.
    """

    step: int
    losses: dict[str, float]
    lr: float
    seconds: float
    weights: dict[str, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        """Sum of the tasks' losses, each times its factor: what the step descended."""
        return sum(self.weights.get(task, 1.0) * loss for task, loss in self.losses.items())

    def scalars(self) -> dict[str, float]:
        """One number a name, as TensorBoard wants them: ``loss/<task>``, ``weight/<task>``, ``lr``, ``seconds``."""
        losses = {f"loss/{task}": loss for task, loss in self.losses.items()}
        weights = {f"weight/{task}": self.weights.get(task, 1.0) for task in self.losses}
        return losses | weights | {"lr": self.lr, "seconds": self.seconds}


@dataclass(frozen=True)
class Validation:
    """What ``validate=`` returned.

    Args:
        step: number of steps taken before it.
        scores: name to score, lower is better; a single number is called "score".
    """

    step: int
    scores: dict[str, float]

    @property
    def score(self) -> float:
        """Mean of the scores: what best weights and early stopping go by."""
        return sum(self.scores.values()) / len(self.scores)


@dataclass
class History:
    """Steps in their order: iterate over them, index them, or take one task's curve with :meth:`losses`.

    Args:
        tasks: names of the tasks.
        rows: one a step.
        validations: one each time ``validate=`` was called, that before the first step included.
        best: number of steps after which the network had the weights it was left with; None for the last ones.
    """

    tasks: tuple[str, ...]
    rows: list[Step] = field(default_factory=list)
    validations: list[Validation] = field(default_factory=list)
    best: int | None = None

    def append(self, step: Step) -> None:
        self.rows.append(step)

    def losses(self, task: str) -> list[float]:
        """Loss of ``task`` at every step."""
        return [row.losses[task] for row in self.rows]

    @property
    def seconds(self) -> float:
        """Time of the whole run."""
        return self.rows[-1].seconds if self.rows else 0.0

    def __iter__(self) -> Iterator[Step]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Step:
        return self.rows[index]

    def __str__(self) -> str:
        if not self.rows:
            return "no steps"
        curves = (f"{task} {self.rows[0].losses[task]:.4g} -> {self.rows[-1].losses[task]:.4g}" for task in self.tasks)
        best = "" if self.best is None else f", weights of step {self.best} kept"
        return f"{len(self)} steps in {self.seconds:.1f} s, loss {', '.join(curves)}{best}"

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers."""
        rows, validations = [asdict(row) for row in self.rows], [asdict(row) for row in self.validations]
        return {"tasks": list(self.tasks), "rows": rows, "validations": validations, "best": self.best}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> History:
        """The inverse of :meth:`to_dict`."""
        rows = [Step(**row) for row in data["rows"]]
        validations = [Validation(**row) for row in data.get("validations", ())]
        return cls(tuple(data["tasks"]), rows, validations, data.get("best"))
