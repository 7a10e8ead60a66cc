"""Three networks merged jointly, against merging two and then the third with the result: functional differences.

python -m bench tasks [--quick] [--csv FILE]

At one pairing of the neurons, every layer is merged twice. *Jointly*, with the second moments of all tasks. *Chained*,
as tools for two networks do it: the first two are merged in closed form, and what comes out is merged with the third as
if it were one network of one task, whose second moment is the mean of the two it came from. Printed is what both cost:
the sum over the tasks of 1/2 (m - w_t)^T Q_t (m - w_t), over all shared rows of a layer.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial

import torch
from torch import Tensor, nn

from mtzip.demo.networks import LeNet300100
from mtzip.demo.recipes import trained
from mtzip.demo.tasks import Task
from mtzip.merging import pairing
from mtzip.merging.columns import axis_rows
from mtzip.merging.part import Systems, positions
from mtzip.merging.solve import JointSystem, joint_rows
from mtzip.planning.activations import same_form
from mtzip.planning.observe import Observed
from mtzip.planning.plan import observe_all, pairings_by_activation
from mtzip.prepare import prepare

from . import data
from .networks import pretrained

NAME = "tasks"
HELP = "three networks merged jointly against a chain of pairwise merges: functional differences layer by layer"
SAMPLES = 1000  # calibration images a task


@dataclass
class Row:
    """One layer of one triple.

    Args:
        networks: which three.
        layer: its path.
        rows: that all three share.
        joint: sum of functional differences, merged jointly.
        chained: the same, merged two and then the third.
    """

    networks: str
    layer: str
    rows: int
    joint: float
    chained: float


def jointly(system: JointSystem, weights: Sequence[Tensor]) -> Tensor:
    """Rows [size, r] merged with the second moments of all tasks at once, from rows [d, r] of every side."""
    return joint_rows(system, [side.apply(w) for side, w in zip(system.sides, weights, strict=True)])[0]


def chained(system: JointSystem, weights: Sequence[Tensor]) -> Tensor:
    """The same by one pairwise merge after another, each result counting as one network of one task."""
    merged, moment = system.scatter(0, weights[0]), _dense(system, 0)
    for at in range(1, len(weights)):
        new = _dense(system, at)
        right = moment @ merged + new @ system.scatter(at, weights[at])
        merged, moment = torch.linalg.solve(moment + new, right), (moment + new) / 2
    return merged


def summed(system: JointSystem, weights: Sequence[Tensor], merged: Tensor) -> float:
    """Sum over tasks and rows of 1/2 (m - w_t)^T Q_t (m - w_t)."""
    total = 0.0
    for at, (side, w) in enumerate(zip(system.sides, weights, strict=True)):
        change = system.gather(at, merged) - w
        total += float((change * side.apply(change)).sum()) / 2
    return total


def _dense(system: JointSystem, at: int) -> Tensor:
    """Q of one side over the unknown columns, [size, size]."""
    side = system.sides[at]
    matrix = side.apply(torch.eye(len(side.index), dtype=torch.float64, device=side.moment.mean.device))
    out = matrix.new_zeros(system.size, system.size)
    return out.index_put_((side.index[:, None], side.index), matrix)


def compare(name: str, networks: Mapping[str, nn.Module], inputs: Mapping[str, Tensor]) -> list[Row]:
    """Every layer that all networks share, merged both ways at the same pairing.

    Args:
        name: for the rows.
        networks: task to network.
        inputs: task to calibration inputs.
    """
    prepared = prepare(networks, inputs, None)
    observed = observe_all(prepared.analyses, prepared.correspondence, prepared.chunks, None)
    _pair(observed, prepared.chunks)
    rows = []
    for group in prepared.correspondence.layers:
        parts = observed.parts(group)
        every = tuple(sorted(parts))
        if len(every) < len(networks):
            continue
        runs = observed.runs({task: part.layer.rows for task, part in parts.items()})
        shared = {task: positions(runs[task], every, part.weight.device) for task, part in parts.items()}
        unknown, system = Systems(parts).of(every, shared_only=True)
        # Those of many columns are planned with in float32.
        weights = [parts[task].weight_of(shared[task], unknown.columns[task]).T.double() for task in every]
        if not (system.size and weights[0].shape[1]):
            continue
        costs = [summed(system, weights, way(system, weights)) for way in (jointly, chained)]
        rows.append(Row(name, group.name, weights[0].shape[1], *costs))
    return rows


def _pair(observed: Observed, chunks) -> None:
    """Pairs every axis over all tasks: by functional difference in graph order, coupled ones by activations first."""
    axes = observed.correspondence.axes
    counts = {axis.name: min(axis.sizes.values()) for axis in axes}
    if same_form(observed.analyses) and any(len(axis.writers) > 1 for axis in axes):
        observed.slots = pairings_by_activation(
            observed.analyses, observed.correspondence, chunks, axes, counts, "optimal"
        )
    for axis in axes:
        if id(axis) in observed.slots:
            continue
        groups = []
        for group in axis.writers:
            parts = observed.parts(group, rows_of=axis)
            if len(parts) == len(axis.atoms):
                rows = {t: axis_rows(p.analysis, p.layer.rows, axis.atoms[t]) for t, p in parts.items()}
                groups.append((Systems(parts), rows))
        observed.slots[id(axis)] = pairing.match_axis(groups, counts[axis.name], "mtz", "optimal")


def triples(quick: bool):
    """Name to a function that gives networks and calibration images of three tasks."""
    found = {"LeNet-5, MNIST a, b, c": partial(_of_one_set, "lenet-5-mnist", "abc", data.task("mnist", data.mnist))}
    if not quick:
        found["LeNet-300-100, MNIST a, b and Fashion-MNIST"] = _lenet_300_100
        found["ResNet-20, CIFAR-10 a, b and GTSRB"] = _resnet20
    return found


def _of_one_set(folder: str, letters: str, task: Task):
    networks = {letter: pretrained(f"{folder}/{letter}") for letter in letters}
    return networks, {letter: task.calibration(SAMPLES, at) for at, letter in enumerate(letters)}


def _lenet_300_100():
    networks, images = _of_one_set("lenet-300-100-mnist", "ab", data.task("mnist", data.mnist))
    clothes = data.task("fashion-mnist", data.fashion_mnist)
    networks["clothes"] = trained(LeNet300100, clothes, 1)
    return networks, images | {"clothes": clothes.calibration(SAMPLES, 2)}


def _resnet20():
    pictures = data.task("cifar10", data.cifar10, data.IMAGENET)
    networks, images = _of_one_set("resnet20-cifar10", "ab", pictures)
    signs = data.task("gtsrb", data.gtsrb, data.GTSRB)
    networks["signs"] = pretrained("resnet20-gtsrb/a")
    return networks, images | {"signs": signs.calibration(SAMPLES, 2)}


def run(options: argparse.Namespace) -> list[Row]:
    """Prints the table as it comes.

    Raises:
        OSError: the shared data or weights are not there.
    """
    rows: list[Row] = []
    print("| networks | layer | shared rows | joint | chained | chained / joint |\n|---|---|---:|---:|---:|---:|")
    for name, load in triples(options.quick).items():
        for row in compare(name, *load()):
            rows.append(row)
            ratio = f"{row.chained / row.joint:.3f}" if row.joint else ""
            print(f"| {name} | {row.layer} | {row.rows} | {row.joint:.4g} | {row.chained:.4g} | {ratio} |", flush=True)
    print(f"\njoint is lower on {sum(row.joint < row.chained for row in rows)} of {len(rows)} layers")
    if options.csv:
        with open(options.csv, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(Row)])
            writer.writeheader()
            writer.writerows(asdict(row) for row in rows)
    return rows
