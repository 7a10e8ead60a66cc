"""``torch.export`` of the calls of a zipped network."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from ..errors import ZipError, first_line
from .calls import Calls


def exported(module: nn.Module, calls: Calls, args: tuple[Any, ...], sizes: tuple[Any, ...]) -> ExportedProgram:
    """``torch.export.export`` with its errors as a :class:`ZipError`."""
    try:
        with quiet(), torch.no_grad():
            return torch.export.export(module, args, dynamic_shapes=sizes, strict=False)
    except ZipError:
        raise
    except Exception as error:
        raise ZipError(f"the networks of {', '.join(calls.tasks)} cannot be exported: {first_line(error)}") from error


def batch_sizes(calls: Calls) -> list[list[dict[int, Any] | None]]:
    """The dynamic sizes of every input: its batch."""
    sizes = []
    for inputs in calls.inputs:
        batch = next(x.shape[0] for x in inputs if x.dim())
        sizes.append([{0: Dim.AUTO} if x.dim() and x.shape[0] == batch else None for x in inputs])
    return sizes


@contextmanager
def quiet() -> Iterator[None]:
    """Without the exporter's log: what matters comes as an error."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
