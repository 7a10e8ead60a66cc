"""Fully connected: LeNet-300-100, MNIST twice and MNIST with Fashion-MNIST, both hidden layers."""

from __future__ import annotations

from collections.abc import Iterator

from mtzip.demo.networks import LeNet300100

from . import lenets
from .case import Case


def cases(quick: bool, ablations: bool) -> Iterator[Case]:
    """Layer after layer, then error against shared neurons, then the whole network with every method."""
    yield from lenets.cases("LeNet-300-100", "lenet-300-100-mnist/{}", "ab", LeNet300100, quick, ablations)
