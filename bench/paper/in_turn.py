"""Every layer zipped in turn: error against shared neurons and steps to recover, of dense networks and pruned ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from mtzip.demo.tasks import Task

from .case import Case, fewer_tests
from .methods import ZEROS
from .sparse import pruned

#: Network to the shares of a layer whose turn has come; those before it are shared as a whole.
TURNS = {"LeNet-300-100": (0.25, 0.5, 0.75, 1.0), "LeNet-5": (0.5, 1.0)}
STEPS, QUICK_STEPS, EVERY = 100, 50, 10  # of retraining, and between looks at the error
CALIBRATION, QUICK_CALIBRATION = 10_000, 1000


def cases(
    name: str, title: str, networks: Mapping[str, nn.Module], tasks: Mapping[str, Task], paper: str, quick: bool
) -> Iterator[Case]:
    """The turns of one pair, dense and then pruned.

    Args:
        name: of the network, a key of ``TURNS``.
        title, networks, tasks, paper: of the pair, as :class:`Case` has them.
        quick: only whole layers, fewer images, steps and methods.
    """
    recipe: dict[str, Any] = {"steps": STEPS, "calibration": CALIBRATION, "seeds": (0, 1, 2), "every": EVERY}
    parts = TURNS[name]
    if quick:
        recipe |= {"steps": QUICK_STEPS, "calibration": QUICK_CALIBRATION, "seeds": (0,)}
        parts = parts[-1:]
        few = {id(task): fewer_tests(task) for task in tasks.values()}  # tasks on the same images stay so
        tasks = {key: few[id(task)] for key, task in tasks.items()}
    layers = [path for path, _ in next(iter(networks.values())).named_children()][:-1]
    shares = [{**dict.fromkeys(layers[:at], 1.0), layer: part} for at, layer in enumerate(layers) for part in parts]
    for share in shares:
        yield Case(f"{title}, dense", networks, tasks, paper, ("mtzip",), share, **recipe)
    sparse = {task: pruned(name, network, tasks[task], seed) for seed, (task, network) in enumerate(networks.items())}
    for share in shares:
        others = ZEROS if share is shares[-1] else () if quick else ZEROS[:1]  # in the end also without keeping any
        yield Case(f"{title}, sparse", sparse, tasks, paper, ("mtzip", *others), share, keep_zeros=True, **recipe)
