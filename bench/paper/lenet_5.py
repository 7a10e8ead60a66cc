"""Convolutional: LeNet-5, MNIST twice (Caffe's network) and MNIST with Fashion-MNIST (the one with ReLU)."""

from __future__ import annotations

from collections.abc import Iterator

from mtzip.demo.networks import LeNet5

from . import lenets
from .case import Case


def cases(quick: bool, ablations: bool) -> Iterator[Case]:
    """Layer after layer, then error against shared neurons, then the whole network with every method."""
    yield from lenets.cases("LeNet-5", "lenet-5-mnist/{}", "ab", LeNet5, quick, ablations)
