"""Pieces of the page that shows a zip: escaped text; boxes of shared and private neurons, bars and curves as SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from .page_style import TASKS
from .report import AxisReport

_LONGEST = 44  # of a name on the page; the whole one is in its title


def text(value: object) -> str:
    """Text that is safe between tags and inside quotes, control characters made visible."""
    shown = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in str(value))
    return escape(shown, quote=True)


def name(value: str) -> str:
    """A name; of a long one the end, the whole one as a title."""
    short = value if len(value) <= _LONGEST else f"…{value[1 - _LONGEST :]}"
    return f'<span class="name" title="{text(value)}">{text(short)}</span>'


def number(value: float | None, form: str = ".3g") -> str:
    """A number, or a dash for one that is not known."""
    return "–" if value is None or not math.isfinite(value) else format(value, form)


def task_class(position: int) -> str:
    """Style of a task's private parts."""
    return f"t{position % TASKS}"


def neuron_boxes(axis: AxisReport, tasks: Sequence[str], widest: int) -> str:
    """The neurons of one axis in every task, side by side: shared in one colour, private in the task's.

    Two tasks meet in the middle, their shared neurons one box; more stand beside one another. The width of a network
    grows with the logarithm of its neurons, so that narrow layers stay visible beside wide ones.

    Args:
        axis: what to draw.
        tasks: all tasks, in their order.
        widest: neurons of the widest axis.
    """
    if len(tasks) == 2 and all(task in axis.neurons for task in tasks):
        return _zipped_boxes(axis, tasks, widest)
    cells = []
    for at, task in enumerate(tasks):
        neurons = axis.neurons.get(task)
        if neurons is None:
            cells.append('<span class="absent" title="not in this task">–</span>')
            continue
        full = 100 * _extent(neurons, widest)
        shared = axis.used(task)
        part = full * shared / max(neurons, 1)
        title = f"{task}: {shared:,} of {neurons:,} neurons shared"
        cells.append(
            f'<svg class="boxes" viewBox="0 0 100 14" preserveAspectRatio="none" role="img">'
            f"<title>{text(title)}</title>"
            f"{_box(0, part, 'shared')}{_box(part, full - part, task_class(at))}</svg>"
        )
    return f'<div class="many">{"".join(cells)}</div>'


def _zipped_boxes(axis: AxisReport, tasks: Sequence[str], widest: int) -> str:
    shared = min([axis.shared, *axis.neurons.values()])
    private = [axis.neurons[task] - shared for task in tasks]
    largest = max(axis.neurons.values())
    unit = 100 * _extent(largest, widest) / max(largest, 1)  # per neuron; the middle is at 100
    half = unit * shared / 2
    title = ", ".join(f"{task}: {shared:,} of {axis.neurons[task]:,} neurons shared" for task in tasks)
    return (
        f'<svg class="boxes" viewBox="0 0 200 14" preserveAspectRatio="none" role="img"><title>{text(title)}</title>'
        f"{_box(100 - half - unit * private[0], unit * private[0], task_class(0))}"
        f"{_box(100 - half, 2 * half, 'shared')}"
        f"{_box(100 + half, unit * private[1], task_class(1))}</svg>"
    )


def _extent(neurons: int, widest: int) -> float:
    return math.log1p(neurons) / max(math.log1p(widest), 1e-9)


def _box(start: float, width: float, style: str) -> str:
    return f'<rect x="{start:.2f}" y="1" width="{width:.2f}" height="12" class="{style}"/>' if width > 0.005 else ""


def bar(fraction: float, style: str = "shared", behind: float | None = None) -> str:
    """A horizontal bar of this fraction of its cell, before another one if given."""
    back = f'<rect width="{100 * behind:.2f}" height="10" class="before"/>' if behind is not None else ""
    front = f'<rect width="{100 * min(max(fraction, 0), 1):.2f}" y="0" height="10" class="{style}"/>'
    return f'<svg class="bar" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">{back}{front}</svg>'


def logarithmic(value: float | None, least: float = 1e-5, most: float = 1.0) -> float:
    """Place of a value between ``least`` (0) and ``most`` (1) on a logarithmic scale."""
    if value is None or not math.isfinite(value) or value <= least:
        return 0.0
    return min(1.0, math.log(value / least) / math.log(most / least))


def stacked(parts: Sequence[tuple[str, int, str]]) -> str:
    """One bar of several parts: (label, size, style)."""
    total = sum(size for _, size, _ in parts) or 1
    pieces, start = [], 0.0
    for label, size, style in parts:
        width = 100 * size / total
        title = f"<title>{text(label)}: {size:,} ({size / total:.1%})</title>"
        pieces.append(f'<g>{title}<rect x="{start:.3f}" width="{width:.3f}" height="10" class="{style}"/></g>')
        start += width
    return f'<svg class="stacked" viewBox="0 0 100 10" preserveAspectRatio="none" role="img">{"".join(pieces)}</svg>'


def curves(losses: Mapping[str, Sequence[float]], styles: Mapping[str, str], steps: int | None = None) -> str:
    """Losses over steps, a line a task, on a logarithmic scale where they span more than a decade.

    Args:
        losses: task to loss at every step; values that are not finite leave a gap.
        styles: task to style.
        steps: how many steps the values stand for; None for one each.
    """
    width, height, left, bottom = 1040, 270, 56, 28
    smooth = {task: _averaged(values) for task, values in losses.items()}
    known = [y for points in smooth.values() for _, y in points if math.isfinite(y)]
    if not known:
        return "<p>No finite losses.</p>"
    shown = max(len(values) for values in losses.values())
    steps = steps or shown
    low, high = min(known), max(known)
    by_log = low > 0 and high > 10 * low
    scale = math.log10 if by_log else float
    bottom_value, top_value = scale(low), scale(high)
    span = (top_value - bottom_value) or 1.0
    bottom_value, span = bottom_value - 0.05 * span, 1.1 * span

    def place(step: float, value: float) -> tuple[float, float]:
        x = left + (width - left - 12) * step / max(shown - 1, 1)
        return x, 8 + (height - bottom - 8) * (1 - (scale(value) - bottom_value) / span)

    parts = []
    for value in _ticks(low, high, by_log):
        y = place(0, value)[1]
        parts.append(
            f'<line class="grid" x1="{left}" x2="{width - 12}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text class="tick" x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>'
        )
    for step in sorted({0, (steps - 1) // 2, steps - 1}):
        x = place(step * (shown - 1) / max(steps - 1, 1), high)[0]
        anchor = "start" if step == 0 else "end" if step == steps - 1 else "middle"
        parts.append(
            f'<text class="tick" x="{x:.1f}" y="{height - 8}" text-anchor="{anchor}">'
            f"{'step ' if step == 0 else ''}{step:,}</text>"
        )
    for task, points in smooth.items():
        for run in _unbroken(points):
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in run))
            parts.append(
                f'<polyline class="line {styles[task]}" points="{path}"><title>{text(task)}</title></polyline>'
            )
    return f'<svg class="curves" viewBox="0 0 {width} {height}" role="img">{"".join(parts)}</svg>'


def _averaged(values: Sequence[float], most: int = 300) -> list[tuple[float, float]]:
    """(step, loss), at most so many: means over neighbouring steps."""
    size = max(1, math.ceil(len(values) / most))
    pieces = [(at, values[at : at + size]) for at in range(0, len(values), size)]
    return [(at + (len(piece) - 1) / 2, sum(piece) / len(piece)) for at, piece in pieces]


def _unbroken(points: Sequence[tuple[float, float]]) -> list[list[tuple[float, float]]]:
    runs: list[list[tuple[float, float]]] = [[]]
    for point in points:
        if math.isfinite(point[1]):
            runs[-1].append(point)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _ticks(low: float, high: float, by_log: bool) -> list[float]:
    if by_log:
        decades = range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)
        found = [10.0**decade for decade in decades]
        return found if len(found) > 1 else [low, *found, high]
    if high <= low:
        return [low]
    step = 10.0 ** math.floor(math.log10((high - low) / 3))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 5)
    return [step * at for at in range(math.ceil(low / step), math.floor(high / step) + 1)]
