"""From networks and calibration inputs to what every later stage works on: graphs, axes, batches."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .inputs import Batch, calibration_batches, device_of
from .permute import verify_axes
from .trace.analysis import Analysis
from .trace.correspond import Correspondence, correspond
from .trace.export import export


@dataclass
class Prepared:
    """Traced networks.

    Args:
        tasks: their names.
        analyses: their graphs and axes.
        correspondence: which layer and axis of one answers to which of another.
        chunks: calibration batches of every task.
        seconds: what tracing took.
    """

    tasks: Sequence[str]
    analyses: Sequence[Analysis]
    correspondence: Correspondence
    chunks: Sequence[list[Batch]]
    seconds: float = 0.0
    sensitivities: list[dict[str, torch.Tensor]] = field(default_factory=list)


def prepare(networks: Mapping[str, nn.Module], inputs: Mapping[str, Any], samples: int | None) -> Prepared:
    """Traces every network, finds the axes they have in common and proves that they may be reordered.

    Args:
        networks: task to network.
        inputs: task to calibration inputs.
        samples: most of them to take.
    """
    clock = time.perf_counter()
    tasks = list(networks)
    batches = [calibration_batches(t, inputs[t], samples, device_of(networks[t])) for t in tasks]
    analyses = [Analysis(export(t, networks[t], chunks[0])) for t, chunks in zip(tasks, batches, strict=True)]
    correspondence = correspond(analyses)
    for task, analysis in enumerate(analyses):
        verify_axes(analysis, task, correspondence)
    chunks = [chunks_of(analysis, batch) for analysis, batch in zip(analyses, batches, strict=True)]
    return Prepared(tasks, analyses, correspondence, chunks, time.perf_counter() - clock)


def chunks_of(analysis: Analysis, batches):
    """Calibration chunks; of the traced size where the graph insists on one."""
    fixed = analysis.exported.fixed_batch
    if fixed is None:
        return batches
    pieces = [batch.narrow(at, fixed) for batch in batches for at in range(0, batch.size - fixed + 1, fixed)]
    if not pieces:
        raise ValueError(
            f"task {analysis.exported.task!r} only runs on batches of {fixed} samples, as its forward fixes the batch "
            "size, and no calibration batch is that long; write x.size(0) or -1 instead of a number"
        )
    return pieces
