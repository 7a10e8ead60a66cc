"""Residual networks: two ResNet-20 of the same task, of different tasks, and three at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn

from .. import bfloat16, data
from ..networks import pretrained
from .case import Case, fewer_tests
from .methods import BASELINES, MERGED, ablations_of

PAPER = "effective (no figure for this pair)"
STEPS = 300  # of batch 128 a task
#: Labels pull a zip away from what its originals have learnt from ten times as many images; chosen on training pictures
#: that were kept apart.
GENTLE = {
    "labels": False,
    "recipe": {
        **{"lr": 4e-3, "optimizer": "soap", "batchnorm": "train", "distill": "both"},
        "autocast": bfloat16.pays(),  # 2.4 times the images a second with tile registers
    },
}
#: Several networks: features in the first half of the steps, which is as good after 200 of them and takes a tenth less
#: time; zipped without the substitution, which with features imitated gives +0.50 of three networks in place of +0.98.
SEVERAL = {**GENTLE, "recipe": {**GENTLE["recipe"], "features_until": 0.5}, "reconstructions": 0}


def cases(quick: bool, ablations: bool) -> Iterator[Case]:
    """Two CIFAR-10 networks at 90 %; CIFAR-10 and GTSRB with the whole trunk shared, without a step; then several."""
    cifar = data.task("cifar10", data.cifar10, data.IMAGENET)
    methods = ("originals", "mtzip", MERGED, "average", "permuted") if quick else (*BASELINES, MERGED)
    methods = ("mtzip", *ablations_of(GENTLE["recipe"])) if ablations else methods
    # The training set of CIFAR-10 has 4,000 pictures: all of them calibrate.
    recipe = {"calibration": 1000 if quick else 4000, "shift": 3, **GENTLE}
    pair = {letter: pretrained(f"resnet20-cifar10/{letter}") for letter in "ab"}
    same = {"steps": 10 if quick else STEPS, "flips": ("a", "b"), **recipe}
    yield Case("ResNet-20 CIFAR-10 a+b", pair, dict.fromkeys("ab", cifar), PAPER, methods, 0.9, **same)
    signs = data.task("gtsrb", data.gtsrb, data.GTSRB)
    networks = {"cifar10": pretrained("resnet20-cifar10/a"), "gtsrb": pretrained("resnet20-gtsrb/a")}
    tasks = {"cifar10": cifar, "gtsrb": signs}
    at_once = tuple(name for name in methods if name not in ("from scratch", "pruned"))
    yield Case("ResNet-20 CIFAR-10 + GTSRB", networks, tasks, PAPER, at_once, 1.0, **recipe)
    if not ablations:
        yield from _several(quick, cifar, signs)


def _several(quick: bool, cifar: data.Task, signs: data.Task) -> Iterator[Case]:
    """Two and three networks zipped jointly; two of the three have the same task."""
    networks = {
        "cifar10": pretrained("resnet20-cifar10/a"),
        "gtsrb": pretrained("resnet20-gtsrb/a"),
        "cifar10 b": pretrained("resnet20-cifar10/b"),
    }
    tasks = {"cifar10": cifar, "gtsrb": fewer_tests(signs) if quick else signs, "cifar10 b": cifar}
    for count in (2, 3):
        few = dict(list(networks.items())[:count])
        yield from at_both_shares(few, tasks, ("mtzip",), quick)


def at_both_shares(
    networks: Mapping[str, nn.Module], tasks: Mapping[str, data.Task], methods: tuple[str, ...], quick: bool
) -> Iterator[Case]:
    """Networks zipped at 90 % and 100 %; ``tasks`` may have others too."""
    title = f"{len(networks)} ResNet-20: {', '.join(networks)}"
    recipe = {
        "calibration": 500 if quick else 4000,
        "shift": 3,
        "flips": ("cifar10", "cifar10 b", "fashion"),
        **SEVERAL,
    }
    chosen = {name: tasks[name] for name in networks}
    for share in (0.9, 1.0):
        yield Case(title, networks, chosen, PAPER, methods, share, 0 if quick else STEPS, **recipe)
