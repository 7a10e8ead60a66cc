"""Data for the zipped networks of handmade.py, and comparisons: what the tests of retraining share."""

from __future__ import annotations

import torch
from handmade import images, zipped_pair
from torch import nn
from torch.nn import functional as F

from mtzip.network.zipped import ZippedNetwork


def inputs(count: int = 64) -> dict[str, torch.Tensor]:
    return {task: images(seed, count) for seed, task in enumerate("ab")}


def labelled(count: int = 64) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Inputs with class indices (3 classes in either task)."""
    return {task: (x, x.flatten(1)[:, :3].argmax(1)) for task, x in inputs(count).items()}


def weights_of(zipped: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in zipped.state_dict().items()}


def assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    different = [key for key in got if not torch.equal(got[key], expected[key])]
    assert not different


def distance(zipped: ZippedNetwork, data: dict[str, torch.Tensor]) -> float:
    """Mean squared distance to the originals' outputs, summed over tasks."""
    with torch.no_grad():
        return sum(float(F.mse_loss(zipped[t](x), zipped.originals[t](x))) for t, x in data.items())


class Killed(BaseException):
    """Stands for SIGKILL: nothing may be done about it."""


def with_dropout() -> ZippedNetwork:
    """The zipped pair with dropout in it."""
    zipped = zipped_pair()
    for task in zipped:
        zipped[task].head = nn.Sequential(nn.Dropout(0.4), zipped[task].head)
    return zipped
