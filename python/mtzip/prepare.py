"""From networks and calibration inputs to what every later stage works on: graphs, axes, batches."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .inputs import Batch, calibration_batches, device_of
from .memory import Need, need, sized
from .trace.analysis import Analysis
from .trace.correspond import Correspondence, correspond
from .trace.export import export
from .trace.given import Given
from .trace.permute import verify_axes
from .trace.select import Select


@dataclass
class Prepared:
    """Traced networks.

    Args:
        tasks: their names.
        analyses: their graphs and axes.
        correspondence: which layer and axis of one answers to which of another.
        chunks: calibration batches of every task.
        need: memory that zipping them takes.
        limit: bytes of activations to keep in memory, None for all.
        seconds: what tracing took.
        sensitivities: of every task's neurons, once they are known.
        originals: frozen copies of the networks as the caller gave them.
    """

    tasks: Sequence[str]
    analyses: Sequence[Analysis]
    correspondence: Correspondence
    chunks: Sequence[list[Batch]]
    need: Need
    limit: int | None = None
    seconds: float = 0.0
    sensitivities: list[dict[str, torch.Tensor]] = field(default_factory=list)
    originals: Sequence[nn.Module] = ()


def prepare(
    networks: Mapping[str, nn.Module],
    inputs: Mapping[str, Any],
    samples: int | None,
    correspondence: Sequence[Given] | None = None,
    outputs: Mapping[str, Select] | None = None,
) -> Prepared:
    """Traces every network, finds the axes they have in common and proves that they may be reordered.

    Args:
        networks: task to network.
        inputs: task to calibration inputs.
        samples: most of them to take.
        correspondence: layers that answer to each other, task to path, where the walk over the graphs is not to say.
        outputs: task to what of its output counts; None, and a task not named, chooses by itself.
    """
    clock = time.perf_counter()
    tasks = list(networks)
    batches = [calibration_batches(t, inputs[t], samples, device_of(networks[t])) for t in tasks]
    select = dict(outputs or {})
    analyses = [
        Analysis(export(t, networks[t], chunks[0], select.get(t))) for t, chunks in zip(tasks, batches, strict=True)
    ]
    found = correspond(analyses, correspondence)
    for task, analysis in enumerate(analyses):
        verify_axes(analysis, task, found)
    chunks = [chunks_of(analysis, batch) for analysis, batch in zip(analyses, batches, strict=True)]
    seconds, originals = time.perf_counter() - clock, [analysis.exported.network for analysis in analyses]
    return Prepared(tasks, analyses, found, chunks, need(analyses, chunks), None, seconds, originals=originals)


def chunks_of(analysis: Analysis, batches):
    """Calibration chunks of a size that memory has room for; of the traced size where the graph insists on one."""
    fixed = analysis.exported.fixed_batch
    if fixed is None:
        return sized(analysis, batches)
    pieces = [batch.narrow(at, fixed) for batch in batches for at in range(0, batch.size - fixed + 1, fixed)]
    if not pieces:
        raise ValueError(
            f"task {analysis.exported.task!r} only runs on batches of {fixed} samples, as its forward fixes the batch "
            "size, and no calibration batch is that long; write x.size(0) or -1 instead of a number"
        )
    return pieces
