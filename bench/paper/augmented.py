"""Training on images that are moved and mirrored, in bfloat16 where that is faster."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from mtzip.demo.tasks import Task
from mtzip.demo.train import Recipe

from .. import bfloat16
from .case import Batches


@dataclass(frozen=True)
class Augmented(Recipe):
    """A recipe whose images are moved and mirrored.

    Args:
        shift: pixels that images are moved by, at most.
        flip: half of the images are mirrored.
    """

    shift: int = 3
    flip: bool = False


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
        bfloat16.SmallConvolutions(),
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
