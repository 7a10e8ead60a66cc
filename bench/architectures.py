"""What can be shared of real architectures, and why the rest stays private.

The table that docs/ shows: ``python -m bench architectures --csv FILE``. Networks have random weights: what can be
shared does not depend on them.
"""

from __future__ import annotations

import argparse
import csv
import time
from dataclasses import asdict, dataclass, fields

import torch

from mtzip.errors import ZipError
from mtzip.inputs import as_batch
from mtzip.trace.analysis import Analysis, Note
from mtzip.trace.export import export
from mtzip.trace.sharable import sharable

from .zoo import ARCHITECTURES, Architecture
from .zoo_copies import differences

NAME, HELP = "architectures", "what can be shared of ResNets, transformers and others, and why the rest stays private"


@dataclass
class Row:
    """One architecture.

    Args:
        architecture: its name.
        parameters: all of them.
        sharable: fraction of what has neurons and is no head that can be shared.
        heads: fraction of all in heads, embedding tables that are heads too among them.
        other: fraction of all in norms, embedding tables, positions.
        private: what else stays private and why.
        seconds: to trace and analyse.
        nothing_shared: largest relative difference of the outputs of the tiny network zipped with share=0.
        copy_shared: the same, zipped with a shuffled copy of itself and share=1.
    """

    architecture: str
    parameters: int
    sharable: float
    heads: float
    other: float
    private: str
    seconds: float
    nothing_shared: float | None = None
    copy_shared: float | None = None


def measure(architecture: Architecture, tiny: bool) -> Row:
    """Traces and analyses one architecture, and zips its tiny form."""
    network = architecture.build(tiny)
    example = as_batch(architecture.example(tiny))
    start = time.perf_counter()
    try:
        analysis = Analysis(export(architecture.name, network, example))
    except ZipError as error:
        count = sum(p.numel() for p in network.parameters())
        return Row(architecture.name, count, 0.0, 0.0, 0.0, str(error).splitlines()[0], time.perf_counter() - start)
    seconds = time.perf_counter() - start
    found = sharable(analysis)
    heads, other = found.heads / found.total, found.other / found.total
    row = Row(architecture.name, found.total, found.fraction, heads, other, reasons(analysis, found.notes), seconds)
    row.nothing_shared, row.copy_shared = differences(architecture)
    return row


def reasons(analysis: Analysis, notes: list[Note]) -> str:
    """What stays private by reason, heads left out: two names to each, and how many more."""
    names: dict[str, list[str]] = {}
    for note in notes:
        layer = analysis.layers.get(note.name)
        table = layer is not None and layer.weight in analysis.tables
        if note.reason != "it is an output of the network" and not table:
            names.setdefault(note.reason, []).append(note.name)
    parts = []
    for reason, owners in names.items():
        more = f" and {len(owners) - 2} more" if len(owners) > 2 else ""
        parts.append(f"{', '.join(owners[:2])}{more}: {reason}")
    return "; ".join(parts)


def run(options: argparse.Namespace) -> None:
    """Prints the table as it comes."""
    rows = []
    head = [
        "architecture",
        "parameters",
        "can be shared",
        "heads",
        "norms, tables",
        "share=0",
        "copy",
        "private, and why",
    ]
    print(f"| {' | '.join(head)} | seconds |")
    print("|---|---:|---:|---:|---:|---:|---:|---|---:|")
    for architecture in ARCHITECTURES:
        with torch.no_grad():
            row = measure(architecture, options.quick)
        rows.append(row)
        errors = " | ".join("" if e is None else f"{e:.1g}" for e in (row.nothing_shared, row.copy_shared))
        shares = f"{row.sharable:.1%} | {row.heads:.1%} | {row.other:.1%} | {errors}"
        print(f"| {row.architecture} | {row.parameters:,} | {shares} | {row.private} | {row.seconds:.1f} |", flush=True)
    if options.csv:
        with open(options.csv, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(Row)])
            writer.writeheader()
            writer.writerows(asdict(row) for row in rows)
