"""What the two LeNet experiments have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from torch import nn

from mtzip.demo.recipes import trained
from mtzip.demo.tasks import Task

from .. import bfloat16, data
from ..networks import pretrained
from . import in_turn
from .case import Case
from .methods import BASELINES, ablations_of

PAPER = "recovers after some hundred steps"
STEPS = 100
CALIBRATION = 10_000
#: The originals know their training images by heart: their outputs say more than the labels. Where a step is cheap,
#: what limits so few of them is how much each sees.
GENTLE = {
    "LeNet-300-100": {"labels": False, "batch": 2048, "recipe": {"lr": 6e-3, "optimizer": "soap"}},
    "LeNet-5": {
        "labels": False,
        "batch": 512,
        "rate": 0.01,  # Caffe's own; at 0.05 its network diverges from scratch
        "recipe": {"lr": 2e-3, "optimizer": "soap", "autocast": bfloat16.pays()},
    },
}
PARTS = (0.25, 0.5, 0.75, 0.9)  # shares of the curve


def cases(
    name: str, file: str, letters: str, kind: Callable[[int], nn.Module], quick: bool, ablations: bool
) -> Iterator[Case]:
    """A pair with real weights of one task, and a pair the bench trains of two.

    Args:
        name: of the network.
        file: of weights, ``{}`` for the letter.
        letters: which weights.
        kind: the class trained for MNIST and Fashion-MNIST.
        quick: fewer methods and shares.
        ablations: ablations in place of baselines.
    """
    mnist, fashion = data.task("mnist", data.mnist), data.task("fashion-mnist", data.fashion_mnist)
    same = {letter: pretrained(file.format(letter)) for letter in letters}
    tasks = dict.fromkeys(letters, mnist)
    yield from _pair(name, f"{name} MNIST {'+'.join(letters)}", same, tasks, quick, ablations)
    apart = {task.name: trained(kind, task, seed) for seed, task in enumerate((mnist, fashion), start=1)}
    tasks = {task.name: task for task in (mnist, fashion)}
    yield from _pair(name, f"{name} MNIST + Fashion", apart, tasks, quick, ablations)


def _pair(
    name: str, title: str, networks: Mapping[str, nn.Module], tasks: Mapping[str, Task], quick: bool, ablations: bool
) -> Iterator[Case]:
    pair = (title, networks, tasks, PAPER)
    recipe = {"calibration": CALIBRATION, "seeds": (0,) if quick else (0, 1, 2)}
    if not quick and not ablations:
        layers = [path for path, _ in next(iter(networks.values())).named_children()][:-1]
        for count in range(1, len(layers)):
            yield Case(*pair, ("mtzip", "average"), dict.fromkeys(layers[:count], 1.0), **recipe)
        for share in PARTS:
            yield Case(*pair, ("mtzip", "average", "permuted"), share, **recipe)
    gentle = GENTLE[name]
    methods = ("mtzip", *ablations_of(gentle["recipe"])) if ablations else BASELINES
    yield Case(*pair, methods, 1.0, STEPS, **recipe, **gentle)
    same = len({id(task) for task in tasks.values()}) == 1
    if not ablations and (same or not quick):
        yield from in_turn.cases(name, *pair, quick)
