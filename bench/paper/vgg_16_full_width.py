"""Different tasks at the full CIFAR width: two VGG-16 with BatchNorm that the bench trains itself.

Minutes on a GPU, an hour on a CPU with tile registers (AMX), most of a day on others.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from mtzip.demo.recipes import trained
from mtzip.demo.tasks import Task
from mtzip.demo.train import Recipe

from .. import bfloat16, data
from ..convolutions import CpuConvolutions
from ..networks import Vgg16
from .case import Batches, Case
from .methods import BASELINES
from .vgg_16 import GENTLE, PAPER


@dataclass(frozen=True)
class Augmented(Recipe):
    """A recipe whose images are moved and mirrored.

    Args:
        shift: pixels that images are moved by, at most.
        flip: half of the images are mirrored.
    """

    shift: int = 3
    flip: bool = False


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


def train_augmented(network: nn.Module, task: Task, recipe: Augmented, seed: int) -> nn.Module:
    """``network`` trained on ``task``, on a GPU if there is one, and returned on the CPU in eval mode."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network.to(device, memory_format=torch.channels_last).train()
    images = {"train_images": task.train_images.to(device), "train_labels": task.train_labels.to(device)}
    there = Task(task.name, **images, test_images=task.test_images, test_labels=task.test_labels, classes=task.classes)
    batches, steps = Batches(there, recipe.shift, recipe.flip, recipe.batch), recipe.steps(task)
    optimizer = torch.optim.SGD(
        network.parameters(), lr=recipe.rate, momentum=0.9, weight_decay=recipe.decay, nesterov=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.rate, total_steps=steps, pct_start=0.2)
    with (
        torch.random.fork_rng(devices=[]),
        CpuConvolutions(),
        tqdm(total=steps, desc=f"training on {task.name}", disable=None) as bar,
    ):
        torch.manual_seed(seed)
        for _ in range(recipe.epochs):
            for x, y in batches:
                with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16.pays() is not None):
                    loss = F.cross_entropy(network(x.contiguous(memory_format=torch.channels_last)), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
    return network.to("cpu", memory_format=torch.contiguous_format).eval()
