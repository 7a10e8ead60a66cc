"""Different tasks at the full CIFAR width: two VGG-16 with BatchNorm that the bench trains itself.

Minutes on a GPU, an hour on a CPU with tile registers (AMX), most of a day on others.
"""

from __future__ import annotations

from collections.abc import Iterator

from mtzip.demo.recipes import trained

from .. import bfloat16, data
from ..networks import Vgg16
from .augmented import Augmented, train_augmented
from .case import Case
from .methods import BASELINES
from .vgg_16 import GENTLE, PAPER


STEPS = 100  # of batch 128 a task
RECIPES = {
    "cifar10": Augmented(epochs=12, rate=0.1, batch=128, flip=True),
    "gtsrb": Augmented(epochs=30, rate=0.1, batch=128),
}
QUICK = {name: Augmented(1, recipe.rate / 4, batch=recipe.batch, flip=recipe.flip) for name, recipe in RECIPES.items()}


def cases(quick: bool, ablations: bool) -> Iterator[Case]:
    """The pair with every hidden neuron shared, and with 90 %."""
    tasks = {
        "cifar10": data.task("cifar10", data.cifar10_jpeg, data.IMAGENET),
        "gtsrb": data.task("gtsrb", data.gtsrb, data.GTSRB),
    }
    recipes = QUICK if quick else RECIPES
    networks = {name: trained(Vgg16, task, 0, recipes[name], train_augmented) for name, task in tasks.items()}
    methods = ("originals", "mtzip", "average", "permuted") if quick else BASELINES
    recipe = {"calibration": 1000 if quick else 4000, "shift": 3, "flips": ("cifar10",), **GENTLE}
    recipe["recipe"] = {**GENTLE["recipe"], "lr": 5e-4, "autocast": bfloat16.pays()}
    for share in (1.0, 0.9):
        steps = 10 if quick else STEPS
        yield Case(
            f"VGG-16, CIFAR-10 + GTSRB, {share:.0%} shared", networks, tasks, PAPER, methods, share, steps, **recipe
        )
