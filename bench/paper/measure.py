"""Test errors and how far they are from the originals', with a standard error.

The networks answer the same test images before and after, so the increase is a mean of paired differences: far more
certain than either error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from mtzip.demo.tasks import Task
from mtzip.demo.train import evaluating

#: Task to how often each test image [n] is put in the wrong class, 0 ... 1 (a mean over seeds).
Wrong = dict[str, Tensor]


@torch.no_grad()
def wrong(networks: Mapping[str, Callable[[Tensor], Tensor]], tasks: Mapping[str, Task]) -> Wrong:
    """1 for every test image that its task's network puts in the wrong class, else 0; float64."""
    found = {}
    for name, task in tasks.items():
        with evaluating(networks[name]):
            guesses = torch.cat([networks[name](x).argmax(1) for x in task.test_images.split(500)])
        found[name] = (guesses != task.test_labels).double().cpu()
    return found


def mean_of(runs: list[Wrong]) -> Wrong:
    """The mean over runs with different seeds, image by image."""
    return {name: torch.stack([run[name] for run in runs]).mean(0) for name in runs[0]}


def errors(found: Wrong) -> dict[str, float]:
    """Task to error in per cent."""
    return {name: 100 * values.mean().item() for name, values in found.items()}


def increase(before: Wrong, after: Wrong, tasks: Mapping[str, Task]) -> tuple[float, float]:
    """Mean over tasks of the increase of the error, and its standard error, in per cent.

    The standard error is that of drawing test images. Tasks that are tested on the same images (the same Task object)
    are added up image by image first, as their differences are not independent.
    """
    sums: dict[int, Tensor] = {}
    for name, task in tasks.items():
        difference = (after[name] - before[name]) / len(tasks)
        sums[id(task)] = sums.get(id(task), 0) + difference
    mean = sum(d.mean().item() for d in sums.values())
    variance = sum(d.var().item() / len(d) for d in sums.values())
    return 100 * mean, 100 * math.sqrt(variance)
