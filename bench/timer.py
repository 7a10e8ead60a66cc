"""One timer, one row and one table for all operators.

Ways to do the same thing are timed in blocks of their own, several rounds of blocks each, so that neither two thread
pools nor a noisy minute favours one; the median of all runs counts. On a GPU by events, with the second-level cache
overwritten before each run and the launches queued ahead: what the GPU takes, whatever the host does meanwhile
(``bench overhead`` has what a call costs the host). Ceilings (copy bandwidth, float32 product) are measured in the same
process.
"""

from __future__ import annotations

import argparse
import csv
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache

import torch

ROUNDS = 3
MOST_RUNS = 100  # of a way in a round
FLUSHED = 256 << 20  # bytes written before a run on a GPU: more than any second-level cache
AHEAD = 2_000_000  # cycles, about a millisecond, that a GPU waits before a run: by then all launches are queued


@dataclass(frozen=True)
class Timing:
    """Seconds of all runs of one way."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, relative to the median."""
        if len(self.seconds) < 4:
            return (max(self.seconds) - min(self.seconds)) / 2 / self.median
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / 2 / self.median


@dataclass(frozen=True)
class Row:
    """One way of doing one case.

    ratio is this way's time over that of mtz_ext: above 1 mtz_ext is faster. share is that of the nearer ceiling.
    """

    operator: str
    case: str
    way: str
    microseconds: float
    spread: float
    gflops: float | None
    gbytes: float | None
    share: float | None
    error: float | None
    ratio: float | None
    target: str = ""


@dataclass(frozen=True)
class Work:
    """What a case takes at least: floating point operations and bytes read and written.

    `reach` is the part of a float32 product's rate that the method allows.
    """

    flops: float = 0
    bytes: float = 0
    reach: float = 1


def on_gpu(options: argparse.Namespace) -> bool:
    """Whether a benchmark runs on a GPU."""
    return options.device.startswith("cuda")


def check_device(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Ends the program where --device asks for a GPU that is not there."""
    if on_gpu(options) and not torch.cuda.is_available():
        parser.error(f"--device {options.device}: torch finds no CUDA device here; use --device cpu")


def measure(ways: Mapping[str, Callable[[], object]], device: str = "cpu", budget: float = 1.0) -> dict[str, Timing]:
    """Time all ways, `budget` seconds each: at least three runs, but a single one of what takes longer than that."""
    slow = {name for name, way in ways.items() if _seconds(way, device) > budget}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(ROUNDS):
        for name, way in ways.items():
            if name not in slow:
                seconds[name] += _block(way, device, budget / ROUNDS)
            elif turn == 0:
                seconds[name].append(_seconds(way, device))
    return {name: Timing(tuple(runs)) for name, runs in seconds.items()}


def _seconds(way: Callable[[], object], device: str) -> float:
    """Of one run, the first of all perhaps."""
    start = time.perf_counter()
    way()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _block(way: Callable[[], object], device: str, budget: float) -> list[float]:
    return _block_cuda(way, budget) if device.startswith("cuda") else _block_cpu(way, budget)


def _block_cpu(way: Callable[[], object], budget: float) -> list[float]:
    way()  # the other way's threads go to sleep, its memory out of the cache
    runs: list[float] = []
    end = time.perf_counter() + budget
    while not runs or (time.perf_counter() < end and len(runs) < MOST_RUNS):
        start = time.perf_counter()
        way()
        runs.append(time.perf_counter() - start)
    return runs


def _block_cuda(way: Callable[[], object], budget: float) -> list[float]:
    way()
    flush = torch.empty(FLUSHED, dtype=torch.uint8, device="cuda")
    runs: list[float] = []
    end = time.perf_counter() + budget
    while not runs or (time.perf_counter() < end and len(runs) < MOST_RUNS):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        flush.zero_()
        torch.cuda._sleep(AHEAD)
        start.record()
        way()
        stop.record()
        stop.synchronize()
        runs.append(start.elapsed_time(stop) * 1e-3)
    return runs


@dataclass(frozen=True)
class Ceiling:
    """Rates measured in this process: GB/s of a copy (read and written), GFLOP/s of a float32 product."""

    gbytes: float
    gflops: float


@lru_cache
def ceiling(device: str) -> Ceiling:
    """Of the device, with torch's threads."""
    on_gpu = device.startswith("cuda")
    source = torch.zeros((1 << 30 if on_gpu else 1 << 27) // 4, device=device)
    target = torch.empty_like(source)
    n = 8192 if on_gpu else 2048
    a, b = torch.randn(n, n, device=device), torch.randn(n, n, device=device)
    times = measure({"copy": lambda: target.copy_(source), "product": lambda: torch.mm(a, b)}, device)
    copied, product = min(times["copy"].seconds), min(times["product"].seconds)
    return Ceiling(2 * source.numel() * 4 / copied * 1e-9, 2 * n**3 / product * 1e-9)


def rows_of(
    operator: str,
    case: str,
    ways: Mapping[str, Callable[[], object]],
    work: Work,
    options: argparse.Namespace,
    errors: Mapping[str, float] | None = None,
    targets: Mapping[str, str] | None = None,
    host: bool = False,
) -> list[Row]:
    """Time the ways of a case; the first one is mtz_ext's. `targets` says what is asked of a way; with `host` the
    processor's time counts, whatever the device does."""
    times = measure(ways, "cpu" if host else options.device, 0.3 if options.quick else 1.0)
    top = ceiling(options.device)
    ours = times[next(iter(ways))].median
    rows = []
    for name, timing in times.items():
        gflops = work.flops / timing.median * 1e-9 if work.flops else None
        gbytes = work.bytes / timing.median * 1e-9 if work.bytes else None
        shares = [rate / most for rate, most in ((gflops, top.gflops * work.reach), (gbytes, top.gbytes)) if rate]
        error = (errors or {}).get(name)
        ratio = timing.median / ours
        row = Row(operator, case, name, timing.median * 1e6, timing.spread, gflops, gbytes, None, error, ratio)
        rows.append(replace(row, share=max(shares, default=None), target=(targets or {}).get(name, "")))
    return rows


def report(rows: Sequence[Row], options: argparse.Namespace) -> list[Row]:
    """Print the table; write CSV and picture if asked to."""
    top = ceiling(options.device)
    where = torch.cuda.get_device_name() if options.device.startswith("cuda") else _cpu()
    print(f"\n{where}; ceilings here: copy {top.gbytes:.0f} GB/s, float32 product {top.gflops:.0f} GFLOP/s")
    print(table(rows), flush=True)
    if options.csv:
        with open(options.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(Row)])
            writer.writeheader()
            writer.writerows(asdict(row) for row in rows)
    if getattr(options, "plot", None):
        plot(rows, options.plot)
    return list(rows)


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            name = next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


def table(rows: Sequence[Row]) -> str:
    """One aligned line a way; ratio: its time over that of mtz_ext."""
    head = ["case", "way", "us", "+-", "GFLOP/s", "GB/s", "share", "error", "ratio", "asked"]
    cells = [head]
    last = None
    for row in rows:
        case, last = ("" if row.case == last else row.case), row.case
        cells.append(
            [case, row.way, f"{row.microseconds:,.0f}", f"{row.spread:.0%}"]
            + [_number(row.gflops, ".0f"), _number(row.gbytes, ".1f"), _number(row.share, ".0%")]
            + [_number(row.error, ".1e"), _number(row.ratio, ".2f"), row.target]
        )
    widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
    text = (0, 1, 9)
    lines = []
    for line in cells:
        pairs = enumerate(zip(line, widths, strict=True))
        lines.append("  ".join(cell.ljust(w) if i in text else cell.rjust(w) for i, (cell, w) in pairs).rstrip())
    return "\n".join(lines)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def plot(rows: Sequence[Row], file: str) -> None:
    """Time of every other way over that of mtz_ext, one bar each."""
    import matplotlib.pyplot as plt

    bars = [row for row in rows if row.ratio is not None and row.ratio != 1]
    figure, axes = plt.subplots(figsize=(9, 0.35 * len(bars) + 1.2), layout="constrained")
    axes.barh([f"{row.case}: {row.way}" for row in bars], [row.ratio for row in bars])
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.set_xlabel("time over that of mtz_ext")
    axes.invert_yaxis()
    figure.savefig(file)
    plt.close(figure)
