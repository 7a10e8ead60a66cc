"""python -m bench.paper NAME [--data DIR] [--quick]: an experiment of the paper, its table beside what it reports."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import os
import platform
from collections.abc import Iterator
from typing import Any

import torch

from .. import timer
from . import largest_share, vgg_16, vgg_16_full_size, vgg_16_full_width
from .methods import METHODS
from .run import rows
from .table import Row, table, write_csv

EXPERIMENTS = (
    *("lenet-300-100", "lenet-5", "vgg-16", "vgg-16-full-width", "vgg-16-full-size", "resnets", "resnets-tasks"),
    *("ablations", "largest-share", "largest-share-full-width"),
)


def main(arguments: list[str] | None = None) -> list[Row]:
    """The command line; returns the rows."""
    parser = argparse.ArgumentParser(prog="python -m bench.paper", description=__doc__)
    parser.add_argument("name", metavar="NAME", choices=EXPERIMENTS, help=", ".join(EXPERIMENTS))
    parser.add_argument("--data", metavar="DIR", help="folder with data/ and weights/ (MTZ_SHARED, or ../shared)")
    parser.add_argument(
        "--quick", action="store_true", help="within five minutes on two cores: fewer cases and methods"
    )
    parser.add_argument("--ablations", action="store_true", help="every idea switched off alone, in place of baselines")
    parser.add_argument("--only", metavar="TEXT", default="", help="cases whose name contains TEXT")
    parser.add_argument("--methods", metavar="A,B", help=f"of {', '.join(METHODS)}")
    parser.add_argument("--seeds", type=int, metavar="N", help="average N runs in place of the experiment's own number")
    parser.add_argument("--steps", type=int, metavar="N", help="of retraining, in place of the experiment's own number")
    parser.add_argument(
        "--shares",
        type=_fractions,
        default=(),
        metavar="S,S",
        help="largest-share: try these fractions in place of halving",
    )
    parser.add_argument("--device", default="cpu", metavar="NAME", help="cpu (default) or cuda")
    parser.add_argument("--csv", metavar="FILE", help="write the rows there, after each")
    parser.add_argument("--images", type=int, metavar="N", help="vgg-16-full-size: images a task (1,024)")
    parser.add_argument("--size", type=int, metavar="N", help="vgg-16-full-size: their height and width (224)")
    parser.add_argument("--memory", metavar="TEXT", help="vgg-16-full-size: memory= of the zip (12GB)")
    options = parser.parse_args(arguments)
    if options.seeds is not None and options.seeds < 1:
        parser.error(f"--seeds must be at least 1, got {options.seeds}")
    if options.steps is not None and options.steps < 0:
        parser.error(f"--steps must be at least 0, got {options.steps}")
    timer.check_device(parser, options)
    chosen = tuple(options.methods.split(",")) if options.methods else None
    for unknown in set(chosen or ()) - set(METHODS):
        parser.error(f"--methods must be of {', '.join(METHODS)}; got {unknown!r}")
    if options.data:
        os.environ["MTZ_SHARED"] = options.data
    name = platform.processor() or platform.machine()
    if timer.on_gpu(options):
        name = f"{torch.cuda.get_device_name()}, {name}"
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    if options.name == "vgg-16-full-size":
        return vgg_16_full_size.run(
            options.images, options.size, options.memory, options.quick, options.csv, options.device
        )
    found: list[Row] = []
    for row in _rows(options, chosen):
        found.append(row)
        print(", ".join(row.cells), flush=True)
        if options.csv:
            write_csv(found, options.csv)
    if not found:
        parser.error(f"--only must be part of the name of a case, got {options.only!r}")
    print(f"\n{table(found)}")
    return found


def _fractions(text: str) -> tuple[float, ...]:
    """``"0.5,0.9"`` as numbers, for argparse."""
    found = tuple(map(float, text.split(",")))
    if not all(0 < fraction <= 1 for fraction in found):
        raise ValueError
    return found


def _rows(options: argparse.Namespace, chosen: tuple[str, ...] | None) -> Iterator[Row]:
    """The rows of an experiment with what the command line changes of it."""
    if options.name.startswith("largest-share"):
        source = vgg_16 if options.name == "largest-share" else vgg_16_full_width
        cases = source.cases(options.quick, False)
        yield from largest_share.search(cases, options.quick, options.steps, options.device, options.shares)
        return
    experiment = importlib.import_module(f"bench.paper.{options.name.replace('-', '_')}")
    for case in experiment.cases(options.quick, options.ablations):
        if options.only not in case.name:
            continue
        changes: dict[str, Any] = {"methods": chosen} if chosen else {}
        if options.seeds:
            changes["seeds"] = tuple(range(options.seeds))
        if options.steps is not None:
            changes["steps"] = options.steps
        yield from rows(dataclasses.replace(case, **changes).on(options.device))


if __name__ == "__main__":
    main()
