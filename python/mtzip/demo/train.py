"""Trains a network on a task and measures its test error."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from .tasks import Task


@dataclass(frozen=True)
class Recipe:
    """How to train: SGD with Nesterov momentum under a one-cycle learning rate.

    Args:
        epochs: passes over the training images.
        rate: highest learning rate.
        decay: weight decay.
        batch: images a step.
    """

    epochs: int
    rate: float
    decay: float = 5e-4
    batch: int = 64

    def steps(self, task: Task) -> int:
        """Number of gradient steps on this task."""
        return self.epochs * (len(task.train_labels) // self.batch)


def train(network: nn.Module, task: Task, recipe: Recipe, seed: int) -> nn.Module:
    """``network`` trained in place on ``task`` and returned in eval mode; the same seed gives the same order."""
    generator = torch.Generator().manual_seed(seed)
    steps = recipe.steps(task)
    optimizer = torch.optim.SGD(
        network.parameters(), lr=recipe.rate, momentum=0.9, weight_decay=recipe.decay, nesterov=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.rate, total_steps=steps, pct_start=0.2)
    network.train()
    with tqdm(total=steps, desc=f"training {type(network).__name__} on {task.name}", leave=False, disable=None) as bar:
        for _ in range(recipe.epochs):
            order = torch.randperm(len(task.train_labels), generator=generator)
            for chosen in order[: steps // recipe.epochs * recipe.batch].split(recipe.batch):
                loss = F.cross_entropy(network(task.train_images[chosen]), task.train_labels[chosen])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
    return network.eval()


@torch.no_grad()
def test_error(network: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, batch: int = 1000) -> float:
    """Share of ``images`` that ``network`` puts in the wrong class, in per cent; a module is measured in eval mode."""
    with evaluating(network):
        wrong = sum(
            int((network(x).argmax(1) != y).sum())
            for x, y in zip(images.split(batch), labels.split(batch), strict=True)
        )
    return 100 * wrong / len(labels)


test_error.__test__ = False  # a measurement, not a test for pytest to collect


@contextlib.contextmanager
def evaluating(network: object) -> Iterator[None]:
    """``network`` in eval mode for a while; every module gets back the mode it had."""
    modes = {module: module.training for module in network.modules()} if isinstance(network, nn.Module) else {}
    for module in modes:
        module.training = False
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
