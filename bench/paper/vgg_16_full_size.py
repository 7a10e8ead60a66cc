"""The zip itself at true size: two VGG-16 for 224 x 224, 138 million parameters each, everything hidden shared.

Weights are random (their values change neither time nor memory); images are CIFAR-10 and GTSRB, enlarged. What is
measured is time, against two plain forward passes over the same images in the same run, and memory.
"""

from __future__ import annotations

import csv
import logging
import os
import resource
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mtzip
from mtzip.memory import shown

from .. import data
from ..networks import ImageNetVgg16

#: Images a task, their size, and those of a quick run.
IMAGES, SIZE, QUICK = 1024, 224, (32, 112)

#: What activations, moments and factors may take (``memory=``), in a machine of 24 GB.
MEMORY = "12GB"

FORWARD_BATCH = 16  # images of a plain forward pass


@dataclass(frozen=True)
class Row:
    """One measured value.

    Args:
        work: what was zipped.
        measure: what the value is.
        value: measured.
        detail: what it was computed from.
    """

    work: str
    measure: str
    value: float
    detail: str = ""


def run(
    images: int | None, size: int | None, memory: str | None, quick: bool, file: str | None, device: str = "cpu"
) -> list[Row]:
    """Measures, prints every row, and writes them to ``file`` if one is given.

    Args:
        images: a task; None for the experiment's own number.
        size: of the images, height and width.
        memory: as :func:`mtzip.zip_networks` takes it.
        quick: fewer and smaller images.
        file: a CSV file, or None.
        device: where the networks and their inputs are.
    """
    usual = QUICK if quick else (IMAGES, SIZE)
    rows = []
    memory = memory or (MEMORY if device == "cpu" else None)  # a GPU is one's own: half of what is free
    for row in _measured(images or usual[0], size or usual[1], memory, torch.device(device)):
        rows.append(row)
        print(f"{row.measure}: {row.value:,.2f}" + (f" ({row.detail})" if row.detail else ""), flush=True)
        if file:
            write_csv(rows, file)
    return rows


def write_csv(rows: list[Row], file: str | Path) -> None:
    """The rows as a CSV file."""
    with open(file, "w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, [field.name for field in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def _measured(images: int, size: int, memory: str | None, device: torch.device) -> Iterator[Row]:
    work = f"two VGG-16, {images:,} images of {size} x {size} a task"
    inputs = {"cifar10": _enlarged(data.cifar10, images, size), "gtsrb": _enlarged(data.gtsrb, images, size)}
    networks = {"cifar10": ImageNetVgg16(10, 1).eval().to(device), "gtsrb": ImageNetVgg16(43, 2).eval().to(device)}
    inputs = {task: x.to(device) for task, x in inputs.items()}
    threads = f"{torch.get_num_threads()} threads"
    if device.type == "cuda":
        _forward(networks, {task: x[:FORWARD_BATCH] for task, x in inputs.items()})  # libraries are loaded once
        threads += f", {torch.cuda.get_device_name(device)}"
        torch.cuda.reset_peak_memory_stats(device)
    with _Clock() as forward:
        _forward(networks, inputs)
    passes = f"one of each network, {forward.cpu:.0f} s of processor, {threads}"
    yield Row(work, "forward passes, s", forward.wall, passes)
    before = _resident()
    with _Stages() as stages, _Clock() as clock:
        # Networks that were never trained would always do to follow, and were then zipped twice.
        zipped = mtzip.zip_networks(networks, inputs, share=1.0, memory=memory, follow=False)
    report = zipped.report
    for name, seconds in {"trace": report.seconds["trace"], **stages.seconds}.items():
        yield Row(work, f"{name}, s", seconds)
    yield Row(work, "zip, s", clock.wall, f"{clock.cpu:.0f} s of processor, {threads}")
    # Other work on the machine stretches the time by the clock, not that of the processor.
    for name, own, pass_ in (("", clock.wall, forward.wall), (", processor", clock.cpu, forward.cpu)):
        yield Row(work, f"zip / two forward passes{name}", own / (2 * pass_), f"{own:.0f} s / {2 * pass_:.0f} s")
    peak, known = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, report.memory
    held = f"{shown(before)} before it began: the networks and their inputs"
    yield Row(work, "memory of the process at most, GB", peak / 1e9, held)
    beside = f"memory={memory or 'half of what is free'}, and copies of the networks"
    yield Row(work, "above what it was before, GB", (peak - before) / 1e9, beside)
    if device.type == "cuda":
        peak, total = torch.cuda.max_memory_allocated(device), torch.cuda.get_device_properties(device).total_memory
        yield Row(work, "memory of the GPU at most, GB", peak / 1e9, f"of {total / 1e9:.0f}, networks and inputs too")
    yield Row(work, "estimated, GB", known["estimate"] / 1e9, f"at least {shown(known['least'])}")
    yield Row(work, "written to disk, GB", known["spilled"] / 1e9, f"{shown(known['kept'])} kept in memory at most")
    yield Row(work, "parameters stored, %", 100 * report.parameters_after / report.parameters_before)


def _enlarged(load, images: int, size: int) -> Tensor:
    """Pictures [n, 3, size, size], some of them more than once where there are not as many."""
    found = data.normalised(load("train")[0][:images], data.IMAGENET)
    found = found[torch.arange(images) % len(found)]
    return F.interpolate(found, (size, size), mode="bicubic", align_corners=False)


@torch.no_grad()
def _forward(networks: Mapping[str, nn.Module], inputs: Mapping[str, Tensor]) -> None:
    for task, network in networks.items():
        for chunk in inputs[task].split(FORWARD_BATCH):
            network(chunk)


class _Clock:
    """Seconds that a block takes, by the clock and of the processor (all threads)."""

    def __enter__(self) -> _Clock:
        _synchronize()
        self.wall, self.cpu = -time.perf_counter(), -time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        _synchronize()
        self.wall += time.perf_counter()
        self.cpu += time.process_time()


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _resident() -> int:
    """Bytes of this process that are in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class _Stages(logging.Handler):
    """Layer to the seconds that merging it took, from what the library logs."""

    def __init__(self):
        super().__init__(logging.DEBUG)
        self.seconds: dict[str, float] = {}
        self._log = logging.getLogger("mtzip")

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno == logging.DEBUG and len(record.args) == 2:
            name, self.seconds[name] = record.args
        print(f"  {record.getMessage()}", flush=True)

    def __enter__(self) -> _Stages:
        self._level = self._log.level
        self._log.setLevel(logging.DEBUG)
        self._log.addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._log.removeHandler(self)
        self._log.setLevel(self._level)
