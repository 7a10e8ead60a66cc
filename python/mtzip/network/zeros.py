"""Zeros of pruned networks: how many there are, and keeping them while weights are trained."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def nonzero(tensors: Iterable[Tensor]) -> int:
    """How many numbers are not zero."""
    return sum(int(torch.count_nonzero(tensor)) for tensor in tensors)


class Zeros:
    """The zeros that the weights of a network have now, to give them back after every step of a training loop.

    Weights are parameters of two dimensions and more: biases, scales and norms may become anything.
    """

    def __init__(self, network: nn.Module):
        weights = [parameter.detach() for parameter in network.parameters() if parameter.dim() > 1]
        self._places = [(weight, weight == 0) for weight in weights]
        self._places = [(weight, zero) for weight, zero in self._places if bool(zero.any())]

    def restore_(self) -> None:
        """Sets in place to zero what was zero."""
        for weight, zero in self._places:
            weight.masked_fill_(zero, 0)
