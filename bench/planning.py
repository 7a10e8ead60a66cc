"""How long planning takes for a pair of transformers, second moments given: how the neurons of all axes are paired.

The networks have random weights and the moments are invented: neither changes the work but for the number of rounds.
"""

from __future__ import annotations

import argparse
import csv
import time
from dataclasses import asdict, dataclass, fields

import torch

from mtzip.inputs import as_batch
from mtzip.merging.moments import Moment
from mtzip.planning.descend import Descent
from mtzip.planning.observe import Observed
from mtzip.planning.plan import ROUNDS
from mtzip.trace.analysis import Analysis
from mtzip.trace.correspond import correspond
from mtzip.trace.export import export

from .zoo import TRANSFORMERS

NAME, HELP = "planning", "pairing the neurons of two ViT-Base, second moments given: seconds against what they may take"

#: Seconds that planning for the pair must and should stay below on two cores.
MUST, AIM = 120.0, 30.0

#: Positions that the invented moments are of.
POSITIONS = 20_000


@dataclass
class Row:
    """One way to plan.

    Args:
        networks: what is paired.
        matching: of their axes.
        axes: how many are paired.
        seconds: to plan.
        total: functional difference of everything that is shared.
        threads: of torch.
        must, aim: seconds; None for small networks.
    """

    networks: str
    matching: str
    axes: int
    seconds: float
    total: float
    threads: int
    must: float | None = None
    aim: float | None = None


class Moments:
    """Invented second moments: columns that hang together, each of a variance of its own."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(0)
        self.bases: dict[int, torch.Tensor] = {}

    def __call__(self, columns: int) -> Moment:
        """Of so many columns."""
        if columns not in self.bases:
            x = torch.randn(2 * columns, columns, generator=self.generator)
            self.bases[columns] = (x.T @ x / len(x)).double()
        scale = torch.rand(columns, generator=self.generator, dtype=torch.float64) + 0.5
        covariance = self.bases[columns] * scale[:, None] * scale
        return Moment(POSITIONS, torch.zeros(columns, dtype=torch.float64), covariance)


def observed(tiny: bool) -> Observed:
    """Two vision transformers as planning sees them."""
    (architecture,) = (found for found in TRANSFORMERS if found.name == "ViT-B/16")
    example = as_batch(architecture.example(tiny))
    analyses = [Analysis(export(task, architecture.build(tiny, seed), example)) for seed, task in enumerate("ab")]
    correspondence, invented = correspond(analyses), Moments()
    moments: list[dict[str, Moment]] = [{} for _ in analyses]
    for group in correspondence.layers:
        for task, layer in group.layers.items():
            if layer.private is None and layer.groups == 1 and len(group.layers) > 1:
                moments[task][layer.path] = invented(analyses[task].exported.tensor(layer.weight)[0].numel())
    return Observed(analyses, correspondence, moments)


def measure(found: Observed, matching: str, tiny: bool) -> Row:
    """Plans once, everything shared."""
    axes = found.correspondence.axes
    counts = {axis.name: min(axis.sizes.values()) for axis in axes}
    start = time.perf_counter()
    fresh = Observed(found.analyses, found.correspondence, found.moments)
    total = Descent(fresh, axes, counts, matching).run(ROUNDS)
    seconds = time.perf_counter() - start
    limits = (None, None) if tiny else (MUST, AIM)
    name = "2 x tiny ViT" if tiny else "2 x ViT-B/16"
    return Row(name, matching, len(axes), seconds, total, torch.get_num_threads(), *limits)


@torch.no_grad()
def run(options: argparse.Namespace) -> None:
    """Prints a line for each way to match."""
    rows, found = [], observed(options.quick)
    print("| networks | matching | axes | seconds | must | aim | functional difference |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for matching in ("optimal", "greedy"):
        row = measure(found, matching, options.quick)
        rows.append(row)
        limits = " | ".join("" if limit is None else f"{limit:.0f}" for limit in (row.must, row.aim))
        print(
            f"| {row.networks} | {row.matching} | {row.axes} | {row.seconds:.1f} | {limits} | {row.total:.4g} |",
            flush=True,
        )
    if options.csv:
        with open(options.csv, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(Row)])
            writer.writeheader()
            writer.writerows(asdict(row) for row in rows)
