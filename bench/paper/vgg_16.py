"""Different tasks: two VGG-16 with BatchNorm, CIFAR-10 and GTSRB, at a quarter of the width."""

from __future__ import annotations

from collections.abc import Iterator

from .. import data
from ..networks import pretrained
from .case import Case
from .methods import BASELINES, ablations_of

PAPER = "+3.18 (ImageNet, CelebA, full width)"
STEPS = 400  # of batch 128 a task
#: As with the residual networks, but SOAP is 0.3 better than Adam, and imitating features too another 0.15.
GENTLE = {"labels": False, "recipe": {"lr": 1e-3, "optimizer": "soap", "batchnorm": "train", "distill": "both"}}


def cases(quick: bool, ablations: bool) -> Iterator[Case]:
    """The quarter-width pair, every hidden neuron shared; and 90 %."""
    tasks = {
        "cifar10": data.task("cifar10", data.cifar10_jpeg, data.IMAGENET),
        "gtsrb": data.task("gtsrb", data.gtsrb, data.GTSRB),
    }
    networks = {"cifar10": pretrained("vgg16-quarter-bn/cifar10-jpeg"), "gtsrb": pretrained("vgg16-quarter-bn/gtsrb")}
    methods = ("originals", "mtzip", "average", "permuted") if quick else BASELINES
    methods = ("mtzip", *ablations_of(GENTLE["recipe"])) if ablations else methods
    recipe = {
        "steps": 50 if quick else STEPS,
        "calibration": 1000 if quick else 4000,
        "shift": 3,
        "flips": ("cifar10",),
        **GENTLE,
    }
    for share in (1.0,) if quick or ablations else (1.0, 0.9):
        yield Case("quarter VGG-16, CIFAR-10 + GTSRB", networks, tasks, PAPER, methods, share, **recipe)
