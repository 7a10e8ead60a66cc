"""How the demonstration's networks are trained, and the cache that lets each be trained once."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from .networks import DigitNet, LeNet5, LeNet300100
from .tasks import Task
from .train import Recipe, train

RECIPES: dict[Callable[[int], nn.Module], Recipe] = {
    DigitNet: Recipe(epochs=40, rate=0.05, batch=32),
    LeNet300100: Recipe(epochs=12, rate=0.05, decay=2e-4),
    LeNet5: Recipe(epochs=8, rate=0.05),
}


def cache_folder() -> Path:
    """Where trained networks are kept: ``$MTZIP_CACHE``, else ``mtzip`` under ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    if chosen := os.environ.get("MTZIP_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mtzip"


def trained(
    make: Callable[[int], nn.Module],
    task: Task,
    seed: int,
    recipe: Recipe | None = None,
    train: Callable[[nn.Module, Task, Recipe, int], nn.Module] = train,
) -> nn.Module:
    """A network trained on ``task``, in eval mode, from the cache if it was trained before in the same way.

    Args:
        make: the network's class, called with the number of classes.
        task: what to train on.
        seed: of the initial weights and of the order of the images.
        recipe: how to train; ``RECIPES[make]`` if None.
        train: what trains by the recipe.
    """
    recipe = recipe or RECIPES[make]
    # fork_rng, because layers draw their initial weights from the global generator.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = make(task.classes)
    file = cache_folder() / f"{make.__name__.lower()}-{task.name}-{_fingerprint(network, task, recipe, seed)}.pt"
    if not _load(network, file):
        _store(train(network, task, recipe, seed), file)
    return network.eval()


def _load(network: nn.Module, file: Path) -> bool:
    """Loads the weights in place; False where the file is missing or does not hold them."""
    # Whatever a damaged file makes torch.load raise, the answer is the same: train again.
    with contextlib.suppress(Exception):
        network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
        return True
    return False


def _store(network: nn.Module, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    # Under another name first, so that neither an interrupt nor a second process leaves half a file.
    with tempfile.NamedTemporaryFile(dir=file.parent, suffix=".part", delete=False) as part:
        torch.save(network.state_dict(), part)
    os.replace(part.name, file)


def _fingerprint(network: nn.Module, task: Task, recipe: Recipe, seed: int) -> str:
    """Twelve hex digits that change with the initial weights, the recipe, the data and the seed."""
    digest = hashlib.sha256(repr((sorted(asdict(recipe).items()), seed)).encode())
    for tensor in (*network.state_dict().values(), *_sample(task)):
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def _sample(task: Task) -> Iterable[Tensor]:
    """Enough of the data to tell one set from another."""
    yield torch.tensor(task.train_images.shape)
    yield task.train_images[:: max(1, len(task.train_images) // 64)]
    yield task.train_labels
