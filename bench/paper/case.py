"""What an experiment is made of: networks, tasks, how much is shared, and the recipe of retraining."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtzip.demo.tasks import Task

BATCH = 128  # images a task in a retraining step, unless a case says otherwise
QUICK_TEST = 5  # a quick run measures on every so many test images where there are many


@dataclass(frozen=True)
class Case:
    """Networks to zip and how.

    Args:
        name: names the case in the table.
        networks: task to pretrained network, in eval mode.
        tasks: task to images; two tasks on the same images have the same object.
        paper: what the paper reports of this experiment.
        methods: names in :data:`bench.paper.methods.METHODS`, in the order of the table.
        share: as :func:`mtzip.zip_networks` takes it.
        steps: of retraining, one batch of every task each; 0 for none.
        batch: images of a task in a step.
        calibration: unlabelled training images a task.
        shift: pixels that training images are moved by, at most.
        flips: tasks whose training images are mirrored half of the time.
        labels: whether retraining sees the labels beside the originals' outputs.
        recipe: what :func:`mtzip.retrain` is told beside data, steps, teachers and seed.
        rate: peak learning rate where a network is trained from scratch.
        seeds: of calibration images, retraining, and initial weights.
        keep_zeros: as :func:`mtzip.zip_networks` takes it.
        reconstructions: likewise; 0 suits retraining that imitates features.
        every: steps of retraining between looks at the test error, until it has recovered; 0 for none.
    """

    name: str
    networks: Mapping[str, nn.Module]
    tasks: Mapping[str, Task]
    paper: str
    methods: tuple[str, ...]
    share: Any = 1.0
    steps: int = 0
    batch: int = BATCH
    calibration: int = 2000
    shift: int = 0
    flips: tuple[str, ...] = ()
    labels: bool = True
    recipe: Mapping[str, Any] = field(default_factory=dict)
    rate: float = 0.05
    seeds: tuple[int, ...] = field(default=(0,))
    keep_zeros: bool | str = False
    reconstructions: int = 1
    every: int = 0

    def images(self, seed: int) -> dict[str, Tensor]:
        """Task to its calibration images; tasks with the same data draw on their own."""
        return {
            name: task.calibration(self.calibration, 100 * seed + at)
            for at, (name, task) in enumerate(self.tasks.items())
        }

    def on(self, device: str) -> Case:
        """The case with its networks and images on ``device``; tasks on the same images stay one object."""
        kinds = ("train_images", "train_labels", "test_images", "test_labels")
        there = {
            id(task): replace(task, **{kind: getattr(task, kind).to(device) for kind in kinds})
            for task in self.tasks.values()
        }
        return replace(
            self,
            networks={name: copy.deepcopy(network).to(device) for name, network in self.networks.items()},
            tasks={name: there[id(task)] for name, task in self.tasks.items()},
        )

    def loaders(self, labels: bool) -> dict[str, Batches]:
        """Task to training batches without test images."""
        return {
            name: Batches(task, self.shift, name in self.flips, self.batch, labels) for name, task in self.tasks.items()
        }


class Batches:
    """Shuffled training batches, each image moved by up to ``shift`` pixels and, if ``flip``, mirrored at random.

    Drawn from torch's global generator, which :func:`mtzip.retrain` seeds.
    """

    def __init__(self, task: Task, shift: int = 0, flip: bool = False, size: int = BATCH, labels: bool = True):
        if shift < 0 or len(task.train_images) < size:
            raise ValueError(
                f"a task needs shift >= 0 and {size} training images, got {shift} and {len(task.train_images)}; "
                "ask for smaller batches"
            )
        self.task, self.shift, self.flip, self.size, self.labels = task, shift, flip, size, labels

    def __iter__(self) -> Iterator[Tensor | tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.task.train_labels))
        for chosen in order[: len(order) // self.size * self.size].split(self.size):
            images = self.task.train_images[chosen]
            if self.flip:
                mirrored = torch.rand(len(images), 1, 1, 1) < 0.5
                images = torch.where(mirrored.to(images.device), images.flip(3), images)
            images = moved(images, self.shift)
            yield (images, self.task.train_labels[chosen]) if self.labels else images


def moved(images: Tensor, most: int) -> Tensor:
    """Each image [C, H, W] of [n, C, H, W] moved by -most ... most pixels both ways, zeros (the mean) coming in."""
    if most == 0:
        return images
    n, channels, height, width = images.shape
    down, right = torch.randint(0, 2 * most + 1, (2, n, 1))
    rows, columns = down + torch.arange(height), right + torch.arange(width)
    padded = F.pad(images, (most,) * 4)
    every = torch.arange(n).view(n, 1, 1, 1), torch.arange(channels).view(1, channels, 1, 1)
    return padded[every[0], every[1], rows[:, None, :, None], columns[:, None, None, :]]


def fewer_tests(task: Task) -> Task:
    """The task with a part of its test images."""
    few = slice(None, None, QUICK_TEST)
    return replace(task, test_images=task.test_images[few], test_labels=task.test_labels[few])
