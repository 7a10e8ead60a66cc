"""What happened while retraining, step by step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Step:
    """One step of :func:`mtzip.retrain`.

    Args:
        step: its number, from 0.
        losses: task to loss before the step, weight of the task included.
        lr: learning rate of the optimiser's first parameter group.
        seconds: since retraining began.
    """

    step: int
    losses: dict[str, float]
    lr: float
    seconds: float

    @property
    def total(self) -> float:
        """Sum of the tasks' losses: what the step descended."""
        return sum(self.losses.values())


@dataclass
class History:
    """Steps in their order: iterate over them, index them, or take one task's curve with :meth:`losses`."""

    tasks: tuple[str, ...]
    rows: list[Step] = field(default_factory=list)

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
        return f"{len(self)} steps in {self.seconds:.1f} s, loss {', '.join(curves)}"

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers."""
        return {"tasks": list(self.tasks), "rows": [asdict(row) for row in self.rows]}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> History:
        """The inverse of :meth:`to_dict`."""
        return cls(tuple(data["tasks"]), [Step(**row) for row in data["rows"]])
