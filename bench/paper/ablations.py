"""Every idea switched off alone: LeNet-5 on MNIST and Fashion-MNIST, and the quarter-width VGG pair."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from . import lenet_5, vgg_16
from .case import Case, fewer_tests
from .methods import PLANNING, ablations_of

PLANNED_SHARE = 0.8  # of every axis, against a budget of as many parameters


def cases(quick: bool, ablations: bool = True) -> Iterator[Case]:
    """For each pair everything shared with each ablation, then a part of it with and without planning."""
    for source, steps in ((lenet_5, 20), (vgg_16, 10)):
        case = [c for c in source.cases(quick, True) if c.share == 1.0][-1]
        if quick:
            tasks = {name: fewer_tests(task) for name, task in case.tasks.items()}
            case = dataclasses.replace(case, tasks=tasks, steps=steps, calibration=1000)
        yield dataclasses.replace(case, methods=("mtzip", *ablations_of(case.recipe)))
        yield dataclasses.replace(case, methods=PLANNING, share=PLANNED_SHARE)
