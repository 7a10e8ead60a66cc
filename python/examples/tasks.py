"""What every project has already: the data of two tasks, a network for images, and a way to measure errors.

Two questions about the 1,797 handwritten digits that scikit-learn ships: which digit, and is it odd? With ``--data
DIR`` MNIST and Fashion-MNIST, from ``DIR/mnist`` and ``DIR/fashion-mnist`` with their original ``.gz`` files.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

Split = dict[str, TensorDataset]


def arguments(description: str) -> argparse.Namespace:
    """The options all scripts have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", type=Path, help="folder of mnist/ and fashion-mnist/; scikit-learn's digits without")
    parser.add_argument("--epochs", type=int, default=15, help="of training (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("."), help="folder to write to (%(default)s)")
    return parser.parse_args()


def datasets(folder: Path | None) -> tuple[Split, Split]:
    """Task to images [n, 1, h, w] and labels [n], for training and for testing."""
    if folder is not None:
        from mtzip.demo.idx import load_idx

        names = {"mnist": folder / "mnist", "fashion": folder / "fashion-mnist"}
        parts = ("train", "test")
        return tuple({task: TensorDataset(*load_idx(path, part)) for task, path in names.items()} for part in parts)
    from sklearn.datasets import load_digits

    digits = load_digits()
    images, labels = (
        torch.from_numpy(digits.images).float().div(16).unsqueeze(1),
        torch.from_numpy(digits.target).long(),
    )
    held_back = torch.arange(len(labels)) % 3 == 0
    questions = {"digit": labels, "odd": labels % 2}
    return tuple(
        {task: TensorDataset(images[at], y[at]) for task, y in questions.items()} for at in (~held_back, held_back)
    )


class Network(nn.Module):
    """Two convolutions and two linear layers."""

    def __init__(self, images: Tensor, classes: int):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.hidden = nn.Linear(32 * (images.shape[-1] // 4) ** 2, 64)
        self.head = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm1(self.conv1(x))), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.head(F.relu(self.hidden(torch.flatten(x, 1))))


def networks(data: Split) -> dict[str, nn.Module]:
    """An untrained network a task; each begins with weights of its own."""
    torch.manual_seed(0)
    return {
        task: Network(x, int(y.max()) + 1) for task, (x, y) in ((task, set_.tensors) for task, set_ in data.items())
    }


@torch.no_grad()
def report(models, data: Split) -> dict[str, float]:
    """Prints the parameters stored and every task's test error in per cent, and returns the errors."""
    errors = {}
    for task, (x, y) in ((task, set_.tensors) for task, set_ in data.items()):
        model = models[task].eval()
        wrong = sum(int((model(a).argmax(1) != b).sum()) for a, b in zip(x.split(1000), y.split(1000), strict=True))
        errors[task] = 100 * wrong / len(y)
    stored = {id(parameter): parameter.numel() for task in data for parameter in models[task].parameters()}
    found = ", ".join(f"{task} {error:.2f} %" for task, error in errors.items())
    print(f"{sum(stored.values()):,} parameters; test error: {found}")
    return errors
