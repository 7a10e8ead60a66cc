"""Three networks whose slots all tasks share, against slots that some of them share: what merging costs and breaks.

python -m bench slots [--quick] [--csv FILE]

No gradient step is taken. The functional difference is summed over all axes, relative to the energy of all neurons'
outputs, whether they are shared or not.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from functools import partial

import mtzip
from mtzip.demo.networks import LeNet300100
from mtzip.demo.recipes import trained
from mtzip.reports.report import Report

from . import data
from .networks import pretrained
from .zip import Pair

NAME = "slots"
HELP = "three networks: neurons that all tasks share against neurons that some of them share"
SHARES = (0.5, 0.8, 0.9)
SAMPLES = 1000  # calibration images a task


@dataclass
class Row:
    """One zip of three networks.

    Args:
        networks: which three.
        slots: "all" or "some".
        share: of every axis.
        stored: parameters, as a fraction of all networks' together.
        difference: functional difference, summed over the axes.
        originals: test errors in per cent, one a task.
        errors: those of the zipped network.
        increase: of their mean, in points.
    """

    networks: str
    slots: str
    share: float
    stored: float
    difference: float
    originals: str
    errors: str
    increase: float


def triples(quick: bool) -> Iterator[partial[Pair]]:
    """Three networks and their tasks, each loaded when called."""
    yield partial(_lenet_5)
    if not quick:
        yield partial(_lenet_300_100)
        yield partial(_resnet_20)


def _lenet_5() -> Pair:
    networks = {letter: pretrained(f"lenet-5-mnist/{letter}") for letter in "abc"}
    return Pair("LeNet-5, MNIST a, b, c", networks, dict.fromkeys("abc", data.task("mnist", data.mnist)))


def _lenet_300_100() -> Pair:
    networks = {letter: pretrained(f"lenet-300-100-mnist/{letter}") for letter in "ab"}
    tasks = dict.fromkeys("ab", data.task("mnist", data.mnist))
    tasks["clothes"] = data.task("fashion-mnist", data.fashion_mnist)
    networks["clothes"] = trained(LeNet300100, tasks["clothes"], 1)
    return Pair("LeNet-300-100, MNIST a, b and Fashion-MNIST", networks, tasks)


def _resnet_20() -> Pair:
    networks = {letter: pretrained(f"resnet20-cifar10/{letter}") for letter in "ab"}
    tasks = dict.fromkeys("ab", data.task("cifar10", data.cifar10, data.IMAGENET))
    networks["signs"], tasks["signs"] = pretrained("resnet20-gtsrb/a"), data.task("gtsrb", data.gtsrb, data.GTSRB)
    return Pair("ResNet-20, CIFAR-10 a, b and GTSRB", networks, tasks)


def total_difference(report: Report) -> float:
    """Functional difference of all axes, each relative to the energy of all of its neurons."""
    total = 0.0
    for axis in report.axes:
        used = sum(axis.used(task) for task in axis.neurons)
        total += (axis.difference or 0.0) * used / sum(axis.neurons.values())
    return total


def measure(triple: Pair) -> Iterator[Row]:
    """Both ways at every share."""
    images, originals = triple.calibration(SAMPLES, 0), triple.errors(triple.networks)
    for share in SHARES:
        for slots in ("all", "some"):
            zipped = mtzip.zip_networks(triple.networks, images, share, slots=slots)
            errors = triple.errors(zipped)
            increase = sum(errors[task] - originals[task] for task in errors) / len(errors)
            stored, difference = zipped.report.ratio, total_difference(zipped.report)
            texts = (" / ".join(f"{value:.2f}" for value in found.values()) for found in (originals, errors))
            yield Row(triple.name, slots, share, stored, difference, *texts, increase)


def run(options: argparse.Namespace) -> list[Row]:
    """Prints the table as it comes.

    Raises:
        OSError: the shared data or weights are not there.
    """
    rows: list[Row] = []
    print("| networks | shared | slots of | stored | difference | errors, % | mean increase |\n" + "|---" * 7 + "|")
    for load in triples(options.quick):
        for row in measure(load()):
            rows.append(row)
            figures = f"{row.stored:.1%} | {row.difference:.4f} | {row.errors} | {row.increase:+.3f}"
            print(f"| {row.networks} | {row.share:.0%} | {row.slots} | {figures} |", flush=True)
            if options.csv:
                write_csv(rows, options.csv)
    return rows


def write_csv(rows: list[Row], path: str) -> None:
    """The rows as a file."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
