"""How a layer's tensors are cut into blocks that tasks may share.

Rows and columns of a layer fall into *runs*, a run being consecutive neurons stored by the same set of tasks. There is
one block for every pair (tasks sharing the rows, tasks sharing the columns)::

                  columns of A and B    columns of A alone
    rows of A, B  [ shared by A and B |  private to A      ]
    rows of A     [ private to A                           ]

Runs of the same tasks may occur several times (queries, keys and values of attention lie one behind the other): they
are pieces of one block.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Run:
    """``size`` consecutive neurons that exactly the tasks with indices ``tasks`` store together."""

    tasks: tuple[int, ...]
    size: int


def merge_runs(runs: Sequence[Run]) -> tuple[Run, ...]:
    """Neighbouring runs of the same tasks as one, empty ones left out."""
    merged: list[Run] = []
    for run in runs:
        if merged and merged[-1].tasks == run.tasks:
            merged[-1] = Run(run.tasks, merged[-1].size + run.size)
        elif run.size:
            merged.append(run)
    return tuple(merged)


def pieces(runs: Sequence[Run]) -> Iterator[tuple[Run, slice]]:
    """Every run and where it lies among all neurons of the same tasks."""
    taken: dict[tuple[int, ...], int] = {}
    for run in runs:
        start = taken.get(run.tasks, 0)
        taken[run.tasks] = start + run.size
        yield run, slice(start, start + run.size)


def totals(runs: Sequence[Run]) -> dict[tuple[int, ...], int]:
    """Set of tasks to how many neurons it stores, in the order the sets first occur."""
    sums: dict[tuple[int, ...], int] = {}
    for run in runs:
        sums[run.tasks] = sums.get(run.tasks, 0) + run.size
    return sums


@dataclass(frozen=True)
class Layout:
    """How the tensors of one task's layer are cut into blocks.

    Args:
        task: index of the task this leaf belongs to; a member of every run.
        rows: runs of output neurons.
        columns: runs of input neurons (input channels of a convolution).
        bias: runs of the bias, None for a layer without one. A bias private to the task is a single run of all rows.
        scaled: how many rows carry a private scale, ``y = scale * (W x) + bias``: none, or all that tasks share.
        weight: name of the layer's parameter that the blocks make up.
        bias_name: name of its bias.
        transposed: True where that parameter has its columns first, [columns, rows, ...].
    """

    task: int
    rows: tuple[Run, ...]
    columns: tuple[Run, ...]
    bias: tuple[Run, ...] | None
    scaled: int = 0
    weight: str = "weight"
    bias_name: str = "bias"
    transposed: bool = False

    @property
    def names(self) -> tuple[str, str]:
        """The parameters of the plain layer that a leaf assembles."""
        return self.weight, self.bias_name

    @property
    def scale_name(self) -> str:
        """Name of the private scale."""
        return "scale" if self.weight == "weight" else f"{self.weight}_scale"

    def block_name(self, rows: tuple[int, ...], columns: tuple[int, ...]) -> str:
        """Name of the block of these rows and columns: stored by the tasks that share both."""
        both = [task for task in rows if task in columns]
        return f"{self.weight}_rows_{_join(rows)}_columns_{_join(both)}"

    def bias_block(self, rows: tuple[int, ...]) -> str:
        """Name of the bias of these rows."""
        return f"{self.bias_name}_rows_{_join(rows)}"

    def column_pieces(self, rows: tuple[int, ...]) -> list[tuple[str, slice, slice]]:
        """What the weight of these rows consists of, from left to right.

        Returns:
            Name of a block, its columns, and where those lie among the columns of the layer. What follows on another in
            both is one piece: rows of one task alone are one block for all columns.
        """
        found: list[tuple[str, slice, slice]] = []
        taken: dict[str, int] = {}
        left = 0
        for column in self.columns:
            name = self.block_name(rows, column.tasks)
            start = taken.get(name, 0)
            taken[name] = start + column.size
            first = (start, left)
            left += column.size
            if found and found[-1][0] == name:
                first = found[-1][1].start, found[-1][2].start
                found.pop()
            found.append((name, slice(first[0], taken[name]), slice(first[1], left)))
        return found

    def weight_blocks(self) -> dict[str, tuple[int, int]]:
        """Name to (rows, columns) of every weight block."""
        shapes: dict[str, tuple[int, int]] = {}
        for rows, height in totals(self.rows).items():
            for column in self.columns:
                name = self.block_name(rows, column.tasks)
                shapes[name] = (height, shapes.get(name, (0, 0))[1] + column.size)
        return shapes

    def bias_blocks(self) -> dict[str, int]:
        """Name to length of every bias block."""
        return {self.bias_block(tasks): size for tasks, size in totals(self.bias or ()).items()}

    def block_tasks(self) -> dict[str, set[int]]:
        """Name of every block to the tasks that store it."""
        found: dict[str, set[int]] = {}
        for rows in totals(self.rows):
            for columns in totals(self.columns):
                found[self.block_name(rows, columns)] = set(rows) & set(columns)
        found |= {self.bias_block(tasks): set(tasks) for tasks in totals(self.bias or ())}
        return found | ({self.scale_name: {self.task}} if self.scaled else {})

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, for a manifest."""

        def runs(items: tuple[Run, ...]) -> list[list[Any]]:
            return [[list(run.tasks), run.size] for run in items]

        return {
            "task": self.task,
            "rows": runs(self.rows),
            "columns": runs(self.columns),
            "bias": None if self.bias is None else runs(self.bias),
            "scaled": self.scaled,
            "weight": self.weight,
            "bias_name": self.bias_name,
            "transposed": self.transposed,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Layout:
        """The inverse of :meth:`to_dict`."""

        def runs(items: list[list[Any]]) -> tuple[Run, ...]:
            return tuple(Run(tuple(int(task) for task in tasks), int(size)) for tasks, size in items)

        return cls(
            int(data["task"]),
            runs(data["rows"]),
            runs(data["columns"]),
            None if data["bias"] is None else runs(data["bias"]),
            int(data["scaled"]),
            str(data["weight"]),
            str(data["bias_name"]),
            bool(data["transposed"]),
        )


def _join(tasks) -> str:
    return "_".join(map(str, tasks))
