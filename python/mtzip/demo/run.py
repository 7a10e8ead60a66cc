"""Trains two networks, zips them at several share levels, retrains lightly, and shows what it cost."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

import mtzip

from .networks import DigitNet, LeNet5, LeNet300100
from .picture import draw
from .recipes import RECIPES, trained
from .table import Table
from .tasks import Task, digit_tasks, mnist_tasks
from .train import test_error

SHARES = (0.25, 0.5, 0.75, 0.9, 1.0)
STEPS = 100
CALIBRATION = 1000  # unlabelled training images a task


@dataclass(frozen=True)
class Level:
    """One share level: test errors in per cent and parameters.

    Args:
        share: fraction of the neurons of every hidden layer that the tasks store once; 0 for the originals.
        zipped: task to error without retraining.
        retrained: task to error after ``steps`` steps.
        stored: parameters of the zipped network.
        total: parameters of the originals together.
        steps: retraining steps.
    """

    share: float
    zipped: Mapping[str, float]
    retrained: Mapping[str, float]
    stored: int
    total: int
    steps: int


@dataclass(frozen=True)
class Outcome:
    """What the demonstration found for one kind of network."""

    network: str
    originals: Level
    levels: Sequence[Level]
    training_steps: Mapping[str, int]


def demonstrate(data: str | Path | None, output: str | Path, shares: Sequence[float] = SHARES) -> list[Outcome]:
    """Runs the demonstration and prints it.

    Args:
        data: folder of ``mnist`` and ``fashion-mnist`` with their original files; None for scikit-learn's digits.
        output: folder for the zipped networks and the picture, made if it is not there.
        shares: share levels, each in 0 ... 1.

    Returns:
        one outcome for each kind of network.

    Raises:
        OSError: the data cannot be read or the output cannot be written.
        ValueError: the data are damaged.
    """
    tasks = digit_tasks() if data is None else mnist_tasks(data)
    kinds = (DigitNet,) if data is None else (LeNet300100, LeNet5)
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    outcomes = [_zip_levels(kind, tasks, shares, output) for kind in kinds]
    picture = output / "share-against-error.png"
    draw(outcomes, picture)
    print(f"wrote {picture}")
    return outcomes


def _zip_levels(
    kind: Callable[[int], nn.Module], tasks: Sequence[Task], shares: Sequence[float], output: Path
) -> Outcome:
    originals = {task.name: trained(kind, task, seed) for seed, task in enumerate(tasks, start=1)}
    training_steps = {task.name: RECIPES[kind].steps(task) for task in tasks}
    calibration = {task.name: task.calibration(CALIBRATION) for task in tasks}
    errors = _errors(originals, tasks)
    total = sum(parameter.numel() for network in originals.values() for parameter in network.parameters())
    before = Level(0.0, errors, errors, total, total, 0)

    table = _table(kind.__name__, before, training_steps)
    levels = []
    for share in shares:
        zipped = mtzip.zip_networks(originals, calibration, share=share, progress=sys.stderr.isatty())
        at_once = _errors(zipped, tasks)
        mtzip.retrain(zipped, {task.name: (task.train_images, task.train_labels) for task in tasks}, STEPS)
        stored = sum(parameter.numel() for parameter in zipped.parameters())
        levels.append(Level(share, at_once, _errors(zipped, tasks), stored, total, STEPS))
        _row(table, levels[-1])
    file = output / f"{kind.__name__.lower()}.safetensors"
    mtzip.save(zipped, file)
    print(f"\nwrote {file}, the last of them: {file.stat().st_size:,} bytes; look at it with: mtzip show {file}\n")
    return Outcome(kind.__name__, before, levels, training_steps)


def _errors(networks: Mapping[str, nn.Module], tasks: Sequence[Task]) -> dict[str, float]:
    return {task.name: test_error(networks[task.name], task.test_images, task.test_labels) for task in tasks}


def _table(network: str, originals: Level, training_steps: Mapping[str, int]) -> Table:
    tasks = tuple(training_steps)
    trained_for = " and ".join(f"{steps:,}" for steps in training_steps.values())
    print(f"\n{network} for the tasks {' and '.join(tasks)}, trained for {trained_for} steps; test errors in %:\n")
    columns = ["neurons shared", "parameters", "of the sum", "retraining steps"]
    columns += [f"{task} {when}" for task in tasks for when in ("zipped", "retrained")]
    table = Table(columns)
    _row(table, originals)
    return table


def _row(table: Table, level: Level) -> None:
    errors: list[str] = []
    for task in level.zipped:
        errors += [f"{level.zipped[task]:.2f}", f"{level.retrained[task]:.2f}" if level.steps else ""]
    share = f"{level.share:.0%}" if level.steps else "originals"
    table.row([share, f"{level.stored:,}", f"{level.stored / level.total:.1%}", str(level.steps or ""), *errors])
