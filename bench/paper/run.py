"""Runs the methods of a case and gives the rows of its table."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import mtzip
from mtzip.network.zeros import nonzero

from ..convolutions import CpuConvolutions
from . import measure
from .case import Case
from .methods import METHODS, RETRAINING
from .recovery import Recovery, shown
from .table import Row


@dataclass
class _Stage:
    """What was measured after so many steps, a value a seed."""

    found: list[measure.Wrong] = field(default_factory=list)
    stored: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    nonzero: list[int] = field(default_factory=list)
    recovered: list[float] = field(default_factory=list)


def rows(case: Case) -> Iterator[Row]:
    """The rows of a case, each as soon as it is known: before retraining and after."""
    before = measure.wrong(case.networks, case.tasks)
    total = sum(p.numel() for network in case.networks.values() for p in network.parameters())
    idle = () if case.steps else RETRAINING
    for name in (name for name in case.methods if name not in idle):
        method, stages = METHODS[name], {}
        for seed in case.seeds:
            _say(f"{case.name}: {name}, seed {seed}")
            images, start = case.images(seed), time.perf_counter()
            zipped = method.make(case, images, seed)
            if method.before or not case.steps:
                _measure(stages.setdefault(0, _Stage()), zipped, case, time.perf_counter() - start)
            if case.steps and name != "originals":
                settings = {"teachers": case.networks, **case.recipe, **method.retrain(case)}
                loaders = case.loaders(case.labels or method.labels)
                recovery = Recovery(zipped, case, before)
                recovery(0)
                with CpuConvolutions():
                    mtzip.retrain(zipped, loaders, case.steps, seed=seed, log=recovery, **settings)
                stage = stages.setdefault(case.steps, _Stage())
                _measure(stage, zipped, case, time.perf_counter() - start)
                stage.recovered += [recovery.steps] if case.every else []
        for steps, stage in stages.items():
            after = measure.mean_of(stage.found)
            yield Row(
                case.name,
                name,
                _share(case.share),
                steps,
                round(statistics.mean(stage.stored)),
                statistics.mean(stage.stored) / total,
                _listed(measure.errors(before)),
                _listed(measure.errors(after)),
                *measure.increase(before, after, case.tasks),
                len(case.seeds),
                case.paper,
                statistics.mean(stage.seconds),
                max(100 * (after[task] - before[task]).mean().item() for task in case.tasks),
                round(statistics.mean(stage.nonzero)),
                shown(stage.recovered, steps) if stage.recovered else "",
            )


def _measure(stage: _Stage, zipped: mtzip.ZippedNetwork, case: Case, seconds: float) -> None:
    stage.found.append(measure.wrong({task: zipped[task] for task in zipped}, case.tasks))
    stage.stored.append(zipped.parameter_count())
    stage.seconds.append(seconds)
    stage.nonzero.append(nonzero(zipped.parameters()))


def _share(share: float | Mapping[str, float] | mtzip.Budget) -> str:
    if isinstance(share, mtzip.Budget):
        return f"budget {share.parameters:.1%}"
    if isinstance(share, float):
        return f"{share:.0%}"
    return ", ".join(axis if part == 1 else f"{axis} {part:.0%}" for axis, part in share.items())


def _listed(errors: dict[str, float]) -> str:
    return " / ".join(f"{error:.2f}" for error in errors.values())


def _say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)
