"""Trains two networks, zips them at several share levels, retrains lightly, and shows what it cost."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import mtzip

from .networks import DigitNet, LeNet5, LeNet300100
from .picture import draw
from .recipes import RECIPES, trained
from .table import Table
from .tasks import Task, digit_tasks, mnist_tasks
from .train import test_error

SHARES = (0.25, 0.5, 0.75, 0.9, 1.0)
STEPS = 100  # of retraining
BATCH = 128  # images a task in a retraining step
CALIBRATION = 1000  # unlabelled training images a task


@dataclass(frozen=True)
class Level:
    """Test errors in per cent at one share level.

    Args:
        share: fraction of the neurons of every hidden layer that the tasks store once.
        averaged: task to error where closest neurons are averaged, the baseline, without retraining.
        zipped: task to error without retraining.
        retrained: task to error after retraining.
        stored: parameters of the zipped network.
    """

    share: float
    averaged: Mapping[str, float]
    zipped: Mapping[str, float]
    retrained: Mapping[str, float]
    stored: int


@dataclass(frozen=True)
class Outcome:
    """What the demonstration found for one kind of network.

    Args:
        network: name of the class.
        originals: task to test error in per cent.
        total: parameters of the originals together.
        training_steps: task to gradient steps its original was trained for.
        retraining_steps: gradient steps of retraining.
        levels: one for each share.
    """

    network: str
    originals: Mapping[str, float]
    total: int
    training_steps: Mapping[str, int]
    retraining_steps: int
    levels: Sequence[Level]


def demonstrate(
    data: str | Path | None, output: str | Path, shares: Sequence[float] = SHARES, steps: int = STEPS
) -> list[Outcome]:
    """Runs the demonstration and prints it.

    Args:
        data: folder of ``mnist`` and ``fashion-mnist`` with their original files; None for scikit-learn's digits.
        output: folder for the zipped networks and the picture, made if it is not there.
        shares: share levels, each in 0 ... 1; the network of the last is written.
        steps: of retraining.

    Returns:
        one outcome for each kind of network.

    Raises:
        OSError: the data cannot be read or the output cannot be written.
        ValueError: the data are damaged.
    """
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    if data is None:
        # Layers of some twenty neurons: handing work to a second thread takes longer than the work.
        _lower_threads(1)
        outcomes = [_zip_levels(DigitNet, digit_tasks(), shares, steps, output)]
    else:
        tasks = mnist_tasks(data)
        outcomes = [_zip_levels(kind, tasks, shares, steps, output) for kind in (LeNet300100, LeNet5)]
    picture = output / "share-against-error.png"
    draw(outcomes, picture)
    print(f"wrote {picture}")
    return outcomes


def _lower_threads(number: int) -> None:
    """At most ``number`` threads from here on. Not raised again: torch 2.13's LU factorisation is wrong after that."""
    if torch.get_num_threads() > number:
        torch.set_num_threads(number)


def _zip_levels(
    kind: Callable[[int], nn.Module], tasks: Sequence[Task], shares: Sequence[float], steps: int, output: Path
) -> Outcome:
    originals = {task.name: trained(kind, task, seed) for seed, task in enumerate(tasks, start=1)}
    calibration = {task.name: task.calibration(CALIBRATION) for task in tasks}
    labelled = {task.name: (task.train_images, task.train_labels) for task in tasks}
    total = sum(parameter.numel() for network in originals.values() for parameter in network.parameters())
    training_steps = {task.name: RECIPES[kind].steps(task) for task in tasks}
    outcome = Outcome(kind.__name__, _errors(originals, tasks), total, training_steps, steps, levels := [])

    shown = sys.stderr.isatty()
    table = _heading(outcome)
    for share in shares:
        averaged = mtzip.zip_networks(originals, calibration, share=share, method="average", progress=shown)
        zipped = mtzip.zip_networks(originals, calibration, share=share, progress=shown)
        at_once = _errors(zipped, tasks)
        mtzip.retrain(zipped, labelled, steps, batch_size=BATCH)
        stored = sum(parameter.numel() for parameter in zipped.parameters())
        levels.append(Level(share, _errors(averaged, tasks), at_once, _errors(zipped, tasks), stored))
        _row(table, outcome, levels[-1])
    last = levels[-1]
    zipped.report.errors = {"originals": outcome.originals, "zipped": last.zipped, "retrained": last.retrained}
    file = output / f"{kind.__name__.lower()}.safetensors"
    mtzip.save(zipped, file)
    print(f"\nwrote {file}, the last row, {file.stat().st_size:,} bytes; look into it with: mtzip show {file}")
    return outcome


def _errors(networks: Mapping[str, nn.Module], tasks: Sequence[Task]) -> dict[str, float]:
    return {task.name: test_error(networks[task.name], task.test_images, task.test_labels) for task in tasks}


def _heading(outcome: Outcome) -> Table:
    tasks = tuple(outcome.training_steps)
    trained_for = " and ".join(f"{steps:,}" for steps in outcome.training_steps.values())
    print(
        f"\n{outcome.network} for the tasks {' and '.join(tasks)}, trained for {trained_for} steps.\n"
        "average: closest neurons averaged; zipped: neither has seen a gradient step; "
        f"retrained: zipped, then {outcome.retraining_steps} steps.\n"
    )
    stored = ("stored", ["parameters", "of the sum"])
    errors = [(f"{task}, test error %", ["average", "zipped", "retrained"]) for task in tasks]
    table = Table([("", ["shared"]), stored, *errors])
    cells = [cell for task in tasks for cell in ("", f"{outcome.originals[task]:.2f}", "")]
    table.row(["originals", f"{outcome.total:,}", "100.0%", *cells])
    return table


def _row(table: Table, outcome: Outcome, level: Level) -> None:
    kinds = (level.averaged, level.zipped, level.retrained)
    errors = [f"{kind[task]:.2f}" for task in outcome.originals for kind in kinds]
    table.row([f"{level.share:.0%}", f"{level.stored:,}", f"{level.stored / outcome.total:.1%}", *errors])
