"""Rows of an experiment: printed as they come, aligned at the end, and as a CSV file."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from mtzip.reports.table import columns


@dataclass(frozen=True)
class Row:
    """One method on one case after so many steps.

    Args:
        case: which networks.
        method: which method.
        share: of the neurons of every axis, as given.
        steps: of retraining.
        stored: parameters stored, each shared one once; originals and all else counted in the same way.
        fraction: of the originals' parameters together.
        original: test error of the originals in per cent, task by task.
        errors: the same of this network.
        increase: mean over tasks, percentage points.
        standard_error: of the increase, by drawing test images.
        seeds: how many runs were averaged.
        paper: what the paper reports.
        seconds: for zipping and retraining, a seed.
        worst: largest increase of a task, percentage points.
        nonzero: parameters stored that are not zero.
        recovered: steps until the mean increase was 0.1 (``bench.paper.recovery.WITHIN``) or less; "" if not looked at.
    """

    case: str
    method: str
    share: str
    steps: int
    stored: int
    fraction: float
    original: str
    errors: str
    increase: float
    standard_error: float
    seeds: int
    paper: str
    seconds: float
    worst: float
    nonzero: int = 0
    recovered: str = ""

    @property
    def cells(self) -> list[str]:
        """What the table shows, in the order of :data:`HEAD`."""
        rise = f"{self.increase:+.2f} ± {self.standard_error:.2f}"
        size = f"{self.stored:,}", f"{self.fraction:.1%}", f"{self.nonzero:,}"
        ends = f"{self.worst:+.2f}", self.recovered, f"{self.seeds}", f"{self.seconds:.0f}", self.paper
        return [self.case, self.method, self.share, f"{self.steps}", *size, self.original, self.errors, rise, *ends]


HEAD = ["case", "method", "shared", "steps", "stored", "of all", "not zero"]
HEAD += ["originals, error %", "error %", "mean increase", "worst", "recovered", "seeds", "s", "paper"]


def table(rows: Sequence[Row]) -> str:
    """The rows aligned."""
    return columns([HEAD, *(row.cells for row in rows)])


def write_csv(rows: Sequence[Row], file: str | Path) -> None:
    """The rows as a CSV file, whole or not at all."""
    part = Path(f"{file}.part")
    with open(part, "w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, [field.name for field in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    os.replace(part, file)
