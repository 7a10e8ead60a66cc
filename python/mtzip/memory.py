"""How much memory calibration may take: what is free, what a zip is going to need, and what to do where that is more.

Activations are the bulk: the values of original and zipped networks that are still to be read, for all calibration
samples. What does not fit is kept on disk meanwhile (:mod:`mtzip.merging.spill`). Counted are activations, moments and
factors; the networks themselves and the calibration inputs are the caller's.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from .errors import ZipError
from .inputs import Batch
from .trace.analysis import Analysis, Layer

#: Bytes of the largest value of a network over one chunk of samples. The same whatever memory there is, since how
#: samples are cut up changes sums in their last digits.
CHUNK_BYTES = 2**27

#: Positions to a column and samples that are enough for a layer's moments.
MOMENT_SAMPLES = (64, 256)

#: Positions beyond which fewer samples are enough, down to so many of them: the first layers of a network for images of
#: 224 x 224 have 50,000 in each, for a few hundred columns. Measured on a quarter-width VGG-16 pair, four draws, 64
#: images in place of 256 for the layers of 32 x 32: relative output errors of 6.3 and 2.4 %, against 6.6 and 2.6.
MANY_POSITIONS, FEW_SAMPLES = 2**21, 64

#: Copies of a layer's inputs, outputs and moments that are there at a time: in stored order, centred, weighted.
_COPIES = 3

#: Bytes of factors that are kept, and how many a layer has at most (solve.py, match.py).
_KEPT_FACTORS, _FACTORS = 2**30, 12

#: Samples at most that sensitivities are taken over at once (sensitivity.py).
_BACKWARD_SAMPLES = 512

_UNITS = {"": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass
class Need:
    """Bytes that a zip takes.

    Args:
        activations: the most that is still to be read at any time, of all tasks.
        working: the most that one layer takes beside: what is at hand of its inputs and outputs, moments, factors.
        backward: what the sensitivities take, before anything else is there: all values of one chunk and gradients.
        samples: calibration samples, of all tasks.
    """

    activations: int
    working: int
    backward: int
    samples: int

    @property
    def total(self) -> int:
        return max(self.activations + self.working, self.backward)

    @property
    def least(self) -> int:
        """What has to be in memory at a time whatever goes to disk."""
        return max(self.working, self.backward)


def bytes_of(memory: int | float | str | None) -> int | None:
    """``memory=`` in bytes; None for the default.

    Raises:
        TypeError, ValueError: no number, and no text such as "4GB".
    """
    if memory is None:
        return None
    found: float = 0
    if isinstance(memory, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", memory)
        if match and match[2].upper() in _UNITS:
            found = float(match[1]) * _UNITS[match[2].upper()]
    elif isinstance(memory, bool) or not isinstance(memory, (int, float)):
        raise TypeError(f"memory must be a number of bytes or a text such as '4GB', got {type(memory).__name__}")
    elif memory == memory and memory < float("inf"):
        found = memory
    if found < 1:
        raise ValueError(f"memory must be a positive number of bytes or a text such as '4GB', got {memory!r}")
    return int(found)


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device; of the host what the system and this process's control group leave."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = []
    try:
        found.append(1024 * int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1]))
    except (OSError, TypeError):
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    group = Path("/sys/fs/cgroup")
    try:
        found.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):  # no such group, or "max"
        pass
    return max(min(found), 0)


def samples_for(columns: int, positions: float, per_column: int, samples: int) -> int:
    """Samples that are enough for a layer's moments: ``samples``, or more for ``per_column`` positions to a column.

    Args:
        columns: of the layer.
        positions: of one sample.
        per_column, samples: as in :data:`MOMENT_SAMPLES`.
    """
    positions = max(positions, 1)
    few = max(FEW_SAMPLES, int(MANY_POSITIONS // positions))
    return max(min(samples, few), math.ceil(per_column * columns / positions))


def need(analyses: Sequence[Analysis], chunks: Sequence[list[Batch]]) -> Need:
    """What zipping takes, from the shapes in the graphs: an upper bound but for operators' own work space.

    Args:
        analyses: of all tasks.
        chunks: their calibration batches.
    """
    counts = [sum(batch.size for batch in batches) for batches in chunks]
    # Where nothing upstream has changed, the zipped network's values are the original's; here all are counted twice.
    live = sum(2 * _live(analysis, batches) for analysis, batches in zip(analyses, chunks, strict=True))
    backward, layers = 0, {}
    for analysis, count, batches in zip(analyses, counts, chunks, strict=True):
        largest = min(max(batch.size for batch in batches), _BACKWARD_SAMPLES)
        backward = max(backward, int(2 * largest * sum(_bytes(analysis, node) for node in _calls(analysis))))
        for at, layer in enumerate(analysis.layers.values()):
            values, moments, factors = _layer(analysis, layer, count, len(analyses))
            before = layers.get(at, (0, 0, 0))
            layers[at] = max(before[0], values), before[1] + moments, max(before[2], factors)
    return Need(live, max((sum(parts) for parts in layers.values()), default=0), backward, sum(counts))


def limit_of(memory: int | None, wanted: Need, device: torch.device) -> int:
    """Bytes that activations may take of ``memory`` (None: half of what is free), moments and factors left out.

    Raises:
        ZipError: a single layer takes more than the memory that was asked for.
    """
    allowed = free_bytes(device) // 2 if memory is None else memory
    if memory is not None and wanted.least > allowed:
        raise ZipError(
            f"memory must be at least {shown(wanted.least)} for {wanted.samples} calibration samples, as one layer "
            f"takes so much for its inputs, moments and factors, got {shown(allowed)}; give fewer samples (samples=) "
            "or more memory"
        )
    return max(allowed - wanted.working, 0)


def sized(analysis: Analysis, batches: list[Batch]) -> list[Batch]:
    """Calibration chunks cut so that no value of the network takes more than :data:`CHUNK_BYTES` over one of them."""
    largest = max((_bytes(analysis, node) for node in _calls(analysis)), default=0)
    most = max(int(CHUNK_BYTES // max(largest, 1)), 1)
    return [
        batch if batch.size <= most else batch.narrow(at, min(most, batch.size - at))
        for batch in batches
        for at in range(0, batch.size, most)
    ]


def shown(size: float) -> str:
    """Bytes as people read them."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            return f"{size:.3g} {unit}" if unit != "bytes" else f"{size:.0f} bytes"
        size /= 1000
    raise AssertionError


def _calls(analysis: Analysis) -> list[fx.Node]:
    return [node for node in analysis.exported.graph.nodes if node.op == "call_function"]


def _bytes(analysis: Analysis, node: fx.Node) -> float:
    """Bytes of a node's value for one sample; a view of another value takes none."""
    value = node.meta.get("val")
    if isinstance(value, Tensor):
        schema = getattr(node.target, "_schema", None)
        if schema is not None and any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns):
            return 0
        shape = analysis.shape(node) or []
        return _product(shape) * value.element_size() / analysis.exported.example.size
    return 0


def _live(analysis: Analysis, batches: Sequence[Batch]) -> int:
    """Most bytes of values that are still to be read, of one network, all chunks together.

    A chunk is run when a layer asks for it and stays where it is while later layers take fewer samples.
    """
    each = _live_bytes(analysis)
    asked = [(each[norm.node.name], math.inf) for norm in analysis.norms]
    asked += [(each[layer.node.name], _taken(analysis, layer)) for layer in analysis.layers.values()]
    found, start = 0.0, 0
    for batch in batches:
        found += batch.size * max((live for live, samples in asked if samples > start), default=0.0)
        start += batch.size
    return int(found)


def _live_bytes(analysis: Analysis) -> dict[str, float]:
    """Bytes of a sample's values that are still to be read where each node is computed, of one network."""
    last: dict[fx.Node, fx.Node] = {}
    nodes = _calls(analysis)
    for node in nodes:
        last.setdefault(node, node)
        for arg in node.all_input_nodes:
            last[arg] = node
    current, found = 0.0, {}
    dying: dict[fx.Node, list[fx.Node]] = {}
    for node, end in last.items():
        dying.setdefault(end, []).append(node)
    for node in nodes:
        current += _bytes(analysis, node)
        found[node.name] = current
        current -= sum(_bytes(analysis, gone) for gone in dying.get(node, ()) if gone.op == "call_function")
    return found


def _shape(analysis: Analysis, layer: Layer) -> tuple[int, int, float] | None:
    """Rows and columns of a layer's weight, and positions of a sample."""
    writes = analysis.shape(layer.node)
    if not analysis.shape(layer.input) or not writes:
        return None
    weight = analysis.exported.tensor(layer.weight)
    rows = weight.shape[1] * layer.groups if layer.transposed else weight.shape[0]
    channel = len(writes) - 1 if layer.kind == "linear" else 1
    positions = _product(writes) / max(writes[channel], 1) / analysis.exported.example.size
    return rows, weight.numel() // max(rows, 1), positions


def _taken(analysis: Analysis, layer: Layer) -> float:
    """Samples that a layer's moments are taken over, where there are as many."""
    shape = _shape(analysis, layer)
    return math.inf if shape is None else samples_for(*shape[1:], *MOMENT_SAMPLES)


def _layer(analysis: Analysis, layer: Layer, samples: int, tasks: int) -> tuple[int, int, int]:
    """Bytes of inputs and outputs at hand while a layer is merged, of its moments, and of factors of all tasks."""
    shape = _shape(analysis, layer)
    if shape is None:
        return 0, 0, 0
    reads, writes, size = analysis.shape(layer.input), analysis.shape(layer.node), analysis.exported.example.size
    rows, columns, positions = shape
    taken = min(samples, _taken(analysis, layer))
    element = layer.node.meta["val"].element_size()
    values = _COPIES * taken * element * (_product(reads) + _product(writes)) / size
    rank = columns
    if tasks * positions * taken < columns:  # samples instead of columns where those of all tasks are fewer
        rank = tasks * positions * taken
    square = rank * rank * layer.groups
    moments = 8 * (_COPIES * square + 3 * rank * columns + 3 * rows * columns)
    # One is being made, in float64 at most, of a sum as large; those of many columns are kept in float32.
    factors = 2 * 8 * square + min(_KEPT_FACTORS, _FACTORS * 4 * square)
    return int(values), int(moments), int(factors)


def _product(shape: Sequence[Any]) -> int:
    found = 1
    for size in shape:
        found *= size
    return found
