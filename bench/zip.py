"""What zipping must reach on real networks: test errors, time against forward passes, stored parameters, file size.

python -m bench zip [--quick] [--calibration 1000] [--draws 3] [--csv FILE]
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import mtzip
from mtzip.demo.networks import LeNet5, LeNet300100
from mtzip.demo.recipes import trained
from mtzip.demo.tasks import Task
from mtzip.demo.train import evaluating, test_error
from mtzip.reports.table import columns

from . import data
from .networks import Vgg16, pretrained
from .stored import expected_parameters

NAME = "zip"
HELP = "end to end: errors of zipped networks on real data, time against forward passes, stored parameters"
STEPS = 100  # of retraining
BATCH = 128  # images a task in a retraining step
TIMED_IMAGES = 1000  # calibration images a task where time is measured


@dataclass(frozen=True)
class Options:
    """Settings of a run.

    Args:
        quick: one draw, the first pair of each kind, no full-width VGG-16.
        calibration: unlabelled training images a task.
        draws: calibration sets and retraining seeds that errors are averaged over.
        csv: file to write the rows to, or None.
    """

    quick: bool = False
    calibration: int = 10_000
    draws: int = 3
    csv: str | None = None


@dataclass(frozen=True)
class Row:
    """One measured value against what it must reach.

    Args:
        work: what was done.
        measure: what the value is.
        value: measured.
        must: highest value allowed.
        aim: value aimed for.
        detail: what the value was computed from.
    """

    work: str
    measure: str
    value: float
    must: float
    aim: float
    detail: str

    @property
    def verdict(self) -> str:
        """ "aim", "must" or "misses"."""
        # Errors are counts of images: what differs in the tenth digit is equal.
        reached = [name for name, bound in (("aim", self.aim), ("must", self.must)) if self.value <= bound + 1e-9]
        return reached[0] if reached else "misses"


@dataclass(frozen=True)
class Pair:
    """Two networks and the tasks they were trained for."""

    name: str
    networks: Mapping[str, nn.Module]
    tasks: Mapping[str, Task]

    def errors(self, networks: Mapping[str, nn.Module]) -> dict[str, float]:
        """Task to test error in per cent."""
        return {
            name: test_error(networks[name], task.test_images, task.test_labels) for name, task in self.tasks.items()
        }

    def calibration(self, count: int, draw: int) -> dict[str, Tensor]:
        """Task to its own unlabelled images: tasks with the same data get different ones."""
        return {name: task.calibration(count, 100 * draw + at) for at, (name, task) in enumerate(self.tasks.items())}

    def labelled(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Task to training images and labels."""
        return {name: (task.train_images, task.train_labels) for name, task in self.tasks.items()}


def run(options: Options | argparse.Namespace) -> list[Row]:
    """Measures, prints every row as it is known and the table at the end.

    Raises:
        OSError: the shared data or weights are not there.
    """
    rows = []
    for row in _rows(options):
        rows.append(row)
        print(f"{row.work}, {row.measure}: {row.value:.3f} ({row.verdict}); {row.detail}", flush=True)
    print(f"\n{table(rows)}")
    if options.csv:
        write_csv(rows, options.csv)
    return rows


def table(rows: Sequence[Row]) -> str:
    """The rows beside what they must reach, aligned."""
    cells = [["work", "measure", "measured", "must", "aim", "reaches"]]
    cells += [
        [row.work, row.measure, f"{row.value:+.3f}", f"{row.must:+.2f}", f"{row.aim:+.2f}", row.verdict] for row in rows
    ]
    return columns(cells)


def write_csv(rows: Sequence[Row], file: str | Path) -> None:
    """The rows as a CSV file."""
    with open(file, "w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["work", "measure", "value", "must", "aim", "reaches", "detail"])
        for row in rows:
            writer.writerow([row.work, row.measure, row.value, row.must, row.aim, row.verdict, row.detail])


def _rows(options: Options) -> Iterator[Row]:
    yield from _same_task(options)
    yield from _different_tasks(options)
    yield from _time(options)


def _same_task(options: Options) -> Iterator[Row]:
    mnist = data.task("mnist", data.mnist)
    kinds = [
        ("LeNet-300-100", "lenet-300-100-mnist", ["ab"], (0.35, 0.15), (0.10, 0.00)),
        ("LeNet-5", "lenet-5-mnist", ["ab", "ac", "bc"], (1.0, 0.3), (0.10, 0.00)),
    ]
    for name, folder, pairs, at_once, after in kinds:
        for letters in pairs[: 1 if options.quick else None]:
            networks = {letter: pretrained(f"{folder}/{letter}") for letter in letters}
            pair = Pair(f"{name} {'+'.join(letters)} MNIST", networks, dict.fromkeys(letters, mnist))
            measured = _measure(pair, 1.0, STEPS, options)
            yield _mean_row(pair, "no retraining", measured, 0, at_once)
            yield _mean_row(pair, f"{STEPS} steps", measured, 1, after)
            yield from _stored(pair)


def _different_tasks(options: Options) -> Iterator[Row]:
    tasks = [data.task("mnist", data.mnist), data.task("fashion-mnist", data.fashion_mnist)]
    for kind, name, bounds in ((LeNet300100, "LeNet-300-100", (1.0, 0.3)), (LeNet5, "LeNet-5 ReLU", (0.8, 0.3))):
        networks = {task.name: trained(kind, task, seed) for seed, task in enumerate(tasks, start=1)}
        pair = Pair(f"{name} MNIST + Fashion", networks, {task.name: task for task in tasks})
        if kind is LeNet300100:
            measured = _measure(pair, 0.8, 0, options)
            before, after = measured[0], measured[1]
            worst = max(after[task] - before[task] for task in before)
            yield Row(f"{pair.name}, 80 %", "no retraining, worse task", worst, 0.5, 0.2, _detail(measured[:2]))
        measured = _measure(pair, 1.0, STEPS, options)
        yield _mean_row(pair, "no retraining", measured, 0, bounds)
        # The issue asks nothing of this one: it is here to be seen.
        yield _mean_row(pair, f"{STEPS} steps", measured, 1, bounds)
        yield from _stored(pair)


def _measure(pair: Pair, share: float, steps: int, options: Options) -> list[dict[str, float]]:
    """Mean errors of the originals, the zipped network, and the retrained one if there are steps."""
    found: list[list[dict[str, float]]] = []
    for draw in range(1 if options.quick else options.draws):
        zipped = _zip(pair.networks, pair.calibration(options.calibration, draw), share)
        errors = [pair.errors(pair.networks), pair.errors(zipped)]
        if steps:
            mtzip.retrain(zipped, pair.labelled(), steps, batch_size=BATCH, seed=draw)
            errors.append(pair.errors(zipped))
        found.append(errors)
    return [
        {task: statistics.mean(errors[task] for errors in stage) for task in stage[0]}
        for stage in zip(*found, strict=True)
    ]


def _zip(networks: Mapping[str, nn.Module], calibration: Mapping[str, Tensor], share: float, follow: bool = True):
    return mtzip.zip_networks(networks, calibration, share=share, follow=follow, progress=sys.stderr.isatty())


def _mean_row(pair: Pair, when: str, measured: list[dict[str, float]], stage: int, bounds: tuple[float, float]) -> Row:
    before, after = measured[0], measured[stage + 1]
    rise = statistics.mean(after.values()) - statistics.mean(before.values())
    return Row(f"{pair.name}, 100 %", f"{when}, mean", rise, *bounds, _detail([before, after]))


def _detail(stages: Sequence[Mapping[str, float]]) -> str:
    tasks = stages[0]
    return ", ".join(f"{task} " + " -> ".join(f"{stage[task]:.2f}" for stage in stages) for task in tasks)


def _stored(pair: Pair) -> Iterator[Row]:
    """Stored parameters against arithmetic, and the file against four bytes a value."""
    zipped = _zip(pair.networks, pair.calibration(1000, 0), 1.0)
    stored = sum(parameter.numel() for parameter in zipped.parameters())
    expected = expected_parameters(pair.networks, {axis.name: axis.shared for axis in zipped.report.axes})
    detail = f"{stored:,} stored, {expected:,} by arithmetic"
    yield Row(f"{pair.name}, 100 %", "stored - arithmetic", stored - expected, 0, 0, detail)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "zipped.safetensors"
        mtzip.save(zipped, file)
        size = file.stat().st_size
    yield Row(
        f"{pair.name}, 100 %", "file size off by, %", abs(100 * (size / (4 * expected) - 1)), 1, 1, f"{size:,} bytes"
    )


def _time(options: Options) -> Iterator[Row]:
    cifar = data.normalised(data.cifar10_jpeg("test")[0][:TIMED_IMAGES], data.IMAGENET)
    signs = data.normalised(data.gtsrb("test")[0][:TIMED_IMAGES], data.GTSRB)
    inputs = {"cifar10": cifar, "gtsrb": signs}
    names = {"cifar10": "vgg16-quarter-bn/cifar10-jpeg", "gtsrb": "vgg16-quarter-bn/gtsrb"}
    quarter = {task: pretrained(name) for task, name in names.items()}
    repeats = 1 if options.quick else 5
    yield _time_row("VGG-16 quarter width, CIFAR-10 + GTSRB", quarter, inputs, repeats)
    residual = {"cifar10": pretrained("resnet20-cifar10/a"), "gtsrb": pretrained("resnet20-gtsrb/a")}
    yield _time_row("ResNet-20, CIFAR-10 + GTSRB", residual, inputs, repeats)
    if not options.quick:
        torch.manual_seed(0)
        full = {"cifar10": Vgg16(10).eval(), "gtsrb": Vgg16(43).eval()}
        # Untrained networks put out next to nothing, so one would follow the other: nothing that a user zips.
        yield _time_row("VGG-16 full width, random weights, merged", full, inputs, repeats=1, follow=False)


def _time_row(
    name: str, networks: Mapping[str, nn.Module], inputs: Mapping[str, Tensor], repeats: int, follow: bool = True
) -> Row:
    _forward_seconds(networks, inputs)
    pairs = [
        (_forward_seconds(networks, inputs), _zip(networks, inputs, 1.0, follow).report.seconds) for _ in range(repeats)
    ]
    forward, zips = statistics.median(spent for spent, _ in pairs), [one for _, one in pairs]
    seconds = statistics.median(sum(spent for stage, spent in one.items() if stage != "trace") for one in zips)
    traced = statistics.median(one.get("trace", 0.0) for one in zips)
    detail = f"zip {seconds:.1f} s, tracing {traced:.1f} s apart, forward passes {forward:.1f} s, {_threads()}"
    return Row(name, f"zip / forward, {TIMED_IMAGES} images", seconds / forward, 6, 3, detail)


@torch.no_grad()
def _forward_seconds(networks: Mapping[str, nn.Module], inputs: Mapping[str, Tensor]) -> float:
    start = time.perf_counter()
    for task, network in networks.items():
        with evaluating(network):
            for chunk in inputs[task].split(BATCH):
                network(chunk)
    return time.perf_counter() - start


def _threads() -> str:
    return f"{torch.get_num_threads()} threads"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The settings of :class:`Options` as command-line arguments."""
    defaults = Options()
    parser.add_argument("--quick", action="store_true", help="one draw, one pair of each kind, no full-width VGG-16")
    parser.add_argument("--calibration", type=int, default=defaults.calibration, help="images a task (%(default)s)")
    parser.add_argument("--draws", type=int, default=defaults.draws, help="calibration sets to average (%(default)s)")
    parser.add_argument("--csv", metavar="FILE", help="write the rows there too")


def main() -> None:
    """The benchmark from the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.zip", description=HELP)
    add_arguments(parser)
    run(parser.parse_args())


if __name__ == "__main__":
    main()
