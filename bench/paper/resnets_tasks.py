"""Residual networks of three to six different tasks, zipped jointly and one after another."""

from __future__ import annotations

from collections.abc import Iterator

from mtzip.demo.recipes import trained
from mtzip.demo.train import Recipe

from .. import data
from ..convolutions import CpuConvolutions
from ..networks import CifarResNet, pretrained
from .case import Case
from .methods import CHAIN
from .resnets import at_both_shares

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
    """CIFAR-10 and GTSRB with one more task, two, three and four; a network is trained when its turn comes."""
    networks = {"cifar10": pretrained("resnet20-cifar10/a"), "gtsrb": pretrained("resnet20-gtsrb/a")}
    tasks = {
        "cifar10": data.task("cifar10", data.cifar10, data.IMAGENET),
        "gtsrb": data.task("gtsrb", data.gtsrb, data.GTSRB),
    }
    for seed, (name, (load, statistics, training)) in enumerate(OTHERS.items(), start=1):
        tasks[name] = data.task(name, load, statistics)
        with CpuConvolutions():
            networks[name] = trained(resnet20, tasks[name], seed, training)
        yield from at_both_shares(dict(networks), tasks, ("mtzip", CHAIN), quick)
        if quick:
            return  # with the one that is trained fastest
