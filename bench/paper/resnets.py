"""Residual networks: two ResNet-20 of the same task, and of different tasks."""

from __future__ import annotations

from collections.abc import Iterator

from .. import data
from ..networks import pretrained
from .case import Case
from .methods import ABLATIONS, BASELINES

PAPER = "effective (no figure for this pair)"
STEPS = 300  # of batch 128 a task


def cases(quick: bool, ablations: bool) -> Iterator[Case]:
    """Two CIFAR-10 networks at 90 %; CIFAR-10 and GTSRB with the whole trunk shared, without a step."""
    cifar = data.task("cifar10", data.cifar10, data.IMAGENET)
    methods = ("originals", "mtzip", "average", "permuted") if quick else BASELINES
    methods = ("mtzip", *ABLATIONS) if ablations else methods
    # The training set of CIFAR-10 has 4,000 pictures: all of them calibrate.
    recipe = {"calibration": 1000 if quick else 4000, "shift": 3}
    pair = {letter: pretrained(f"resnet20-cifar10/{letter}") for letter in "ab"}
    same = {"steps": 10 if quick else STEPS, "flips": ("a", "b"), **recipe}
    yield Case("ResNet-20 CIFAR-10 a+b", pair, dict.fromkeys("ab", cifar), PAPER, methods, 0.9, **same)
    signs = data.task("gtsrb", data.gtsrb, data.GTSRB)
    networks = {"cifar10": pretrained("resnet20-cifar10/a"), "gtsrb": pretrained("resnet20-gtsrb/a")}
    tasks = {"cifar10": cifar, "gtsrb": signs}
    at_once = tuple(
        name for name in methods if name not in ("from scratch", "pruned", "no distillation", "features too")
    )
    yield Case("ResNet-20 CIFAR-10 + GTSRB", networks, tasks, PAPER, at_once, 1.0, **recipe)
