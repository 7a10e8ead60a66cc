"""Residual networks: two ResNet-20 of the same task, of different tasks, and up to six at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mtzip.demo.recipes import trained
from mtzip.demo.train import Recipe

from .. import data
from ..networks import CifarResNet, pretrained
from .case import Case, fewer_tests
from .methods import BASELINES, CHAIN, MERGED, ablations_of

PAPER = "effective (no figure for this pair)"
STEPS = 300  # of batch 128 a task
#: Labels pull a zip away from what its originals have learnt from ten times as many images; chosen on training pictures
#: that were kept apart.
GENTLE = {"labels": False, "recipe": {"lr": 1e-3, "batchnorm": "train"}}
#: Tasks that there are no weights of: how to load, normalise and train them, in minutes.
OTHERS = {
    "fashion": (data.fashion_colour, data.FASHION, Recipe(epochs=2, rate=0.1)),
    "omniglot": (data.coloured(data.omniglot), data.OMNIGLOT, Recipe(epochs=6, rate=0.1)),
    "kmnist": (data.coloured(data.kmnist), data.KMNIST, Recipe(epochs=8, rate=0.1)),
    "notmnist": (data.coloured(data.notmnist), data.NOTMNIST, Recipe(epochs=8, rate=0.1)),
}


def resnet20(classes: int) -> CifarResNet:
    """ResNet-20, under a name that the cache of trained networks can use."""
    return CifarResNet(3, classes)


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
    at_once = tuple(
        name for name in methods if name not in ("from scratch", "pruned", "no distillation", "features too")
    )
    yield Case("ResNet-20 CIFAR-10 + GTSRB", networks, tasks, PAPER, at_once, 1.0, **recipe)
    if not ablations:
        yield from _several(quick, cifar, signs)


def _several(quick: bool, cifar: data.Task, signs: data.Task) -> Iterator[Case]:
    """Two, three ... six tasks, jointly and one after another; and three networks of which two have the same task."""
    networks = {"cifar10": pretrained("resnet20-cifar10/a"), "gtsrb": pretrained("resnet20-gtsrb/a")}
    tasks = {"cifar10": cifar, "gtsrb": fewer_tests(signs) if quick else signs}
    flips = ("cifar10", "cifar10 b", "fashion")
    recipe = {"calibration": 500 if quick else 4000, "steps": 0 if quick else STEPS, "shift": 3, "flips": flips}

    def of(names: Sequence[str], methods: tuple[str, ...]) -> Iterator[Case]:
        for share in (0.9, 1.0):
            title = f"{len(names)} ResNet-20: {', '.join(names)}"
            chosen = {name: networks[name] for name in names}, {name: tasks[name] for name in names}
            yield Case(title, *chosen, PAPER, methods, share, **recipe, **GENTLE)

    yield from of(("cifar10", "gtsrb"), ("mtzip",))
    networks["cifar10 b"], tasks["cifar10 b"] = pretrained("resnet20-cifar10/b"), cifar
    yield from of(("cifar10", "gtsrb", "cifar10 b"), ("mtzip",))
    for seed, (name, (load, statistics, training)) in enumerate(() if quick else OTHERS.items(), start=1):
        tasks[name] = data.task(name, load, statistics)
        networks[name] = trained(resnet20, tasks[name], seed, training)
        different = ("cifar10", "gtsrb", *list(OTHERS)[:seed])
        yield from of(different, ("mtzip", CHAIN))
