"""A task to demonstrate on: images, labels and a name; and where the tasks come from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .idx import load_idx

TEST_FRACTION = 3  # every third digit is held back for testing


@dataclass(frozen=True)
class Task:
    """Labelled images of one task.

    Args:
        name: names the task in tables and in the zipped network.
        train_images: [n, channels, height, width], as the network sees them.
        train_labels: [n], int64.
        test_images: [m, channels, height, width].
        test_labels: [m], int64.
        classes: number of classes.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: int

    def calibration(self, count: int, seed: int = 0) -> Tensor:
        """``count`` training images without labels, drawn without replacement; all of them if there are fewer."""
        order = torch.randperm(len(self.train_images), generator=torch.Generator().manual_seed(seed))
        return self.train_images[order[:count]]


def digit_tasks() -> tuple[Task, Task]:
    """Two correlated tasks on the 1,797 handwritten digits that scikit-learn ships: which digit, and is it odd.

    Every third image is for testing. Both tasks see the same images and ask different questions about them, as the
    attribute and identity tasks of a face do: what tells a 3 from an 8 also tells odd from even, so neurons can be
    shared, but the heads differ.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images).float().div_(16).unsqueeze(1)
    labels = torch.from_numpy(digits.target).long()
    held_back = torch.arange(len(labels)) % TEST_FRACTION == 0

    def task(name: str, labels: Tensor, classes: int) -> Task:
        return Task(name, images[~held_back], labels[~held_back], images[held_back], labels[held_back], classes)

    return task("digit", labels, 10), task("odd", labels % 2, 2)


def idx_task(name: str, folder: str | Path) -> Task:
    """The task of a folder with the four idx files of a set.

    Raises:
        OSError: a file is missing or cannot be read.
        ValueError: a file is damaged.
    """
    train_images, train_labels = load_idx(folder, "train")
    test_images, test_labels = load_idx(folder, "test")
    return Task(name, train_images, train_labels, test_images, test_labels, int(train_labels.max()) + 1)


def mnist_tasks(data: str | Path) -> tuple[Task, Task]:
    """MNIST and Fashion-MNIST from ``data/mnist`` and ``data/fashion-mnist``.

    Raises:
        OSError: a folder or file is missing or cannot be read.
        ValueError: a file is damaged.
    """
    return idx_task("mnist", Path(data) / "mnist"), idx_task("fashion-mnist", Path(data) / "fashion-mnist")
