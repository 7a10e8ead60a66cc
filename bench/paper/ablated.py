"""Ideas that have no switch of their own in the library, switched off for an ablation.

Each is a context: inside of it :func:`mtzip.zip_networks` does without the idea, everything else as it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
from torch import Tensor

from mtzip import within
from mtzip.merging import pairing, sweep
from mtzip.merging.moments import Moment, View


@contextlib.contextmanager
def euclidean_pairs() -> Iterator[None]:
    """Neurons are paired by the plain distance of their weights, not weighted by the Hessian (second moment)."""
    matched = pairing.match_axis

    def plain(groups, count, method, matching, extra=(), **settings):
        return matched(groups, count, "average", matching, extra, **settings)

    with mock.patch.object(pairing, "match_axis", plain):
        yield


@contextlib.contextmanager
def equal_rows() -> Iterator[None]:
    """All neurons of a layer count alike in a fit, however much a task's output depends on them."""
    with mock.patch.object(within, "sensitivities", lambda analysis, batches: {}):
        yield


@contextlib.contextmanager
def moment_of_pixels() -> Iterator[None]:
    """The second moment of a convolution is that of single pixels, as in the authors' code: no patches.

    Only for ``method="mtz"``: a fit needs moments that belong to the same samples as its target.
    """
    exact = sweep.collect

    def rough(view: View, *arguments, **settings):
        moment, target = exact(view, *arguments, **settings)
        if view.is_linear or moment.covariance is None:
            return moment, target
        return Moment(moment.count, moment.mean, covariance=of_pixels(moment.covariance, view.kernel)), target

    with mock.patch.object(sweep, "collect", rough):
        yield


def of_pixels(covariance: Tensor, kernel: tuple[int, ...]) -> Tensor:
    """A patch's covariance [C k, C k] without what links different places of the kernel, all places alike."""
    places = 1
    for size in kernel:
        places *= size
    channels = len(covariance) // places
    blocks = covariance.view(channels, places, channels, places).diagonal(dim1=1, dim2=3)  # [C, C, places]
    return torch.kron(blocks.mean(2), torch.eye(places, dtype=covariance.dtype, device=covariance.device))
