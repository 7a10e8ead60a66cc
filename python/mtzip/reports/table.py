"""A :class:`~mtzip.reports.report.Report` as text."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

from ..memory import shown
from .report import Report

WIDTH = 110  # of the list of what stayed private


def table(report: Report) -> str:
    """Axes, layers and totals as aligned columns, then what stayed private and why."""
    parts = [_headline(report)]
    if report.follows:
        parts.append(_follows(report))
    if report.axes:
        parts.append(_axes(report))
    if report.layers:
        parts.append(_layers(report))
    if report.private:
        parts.append(_private(report))
    if report.planned:
        parts.append(_plan(report))
    if report.seconds:
        parts.append("time: " + ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in report.seconds.items()))
    if report.memory:
        parts.append("memory: " + ", ".join(f"{name} {shown(size)}" for name, size in report.memory.items()))
    return "\n\n".join(parts)


def _headline(report: Report) -> str:
    tasks = " + ".join(report.tasks) or "no tasks"
    stored = f"{report.parameters_after:,} parameters stored of {report.parameters_before:,} ({report.ratio:.1%})"
    if report.is_sparse:
        stored += f"; {_count(report.nonzero_after)} that are not zero of {_count(report.nonzero_before)}"
    return f"{tasks}, method {report.method}: {stored}"


def _follows(report: Report) -> str:
    """Which tasks have another's trunk."""
    lines = []
    for task, leader in report.follows.items():
        error = report.output_error.get(task)
        measured = "" if error is None else f" (output error {error:.3g})"
        lines.append(f"{task} follows {leader}: it has the trunk of {leader}, its head fitted to that{measured}")
    return "\n".join(lines)


def _plan(report: Report) -> str:
    """What a budget or plan foresaw, and what came out."""
    planned = (
        f"planned: {report.planned['parameters']:.1%} of the parameters, output error {report.planned['error']:.3g}"
    )
    measured = ", ".join(f"{task} {error:.3g}" for task, error in report.output_error.items())
    return planned + (f"; measured output error: {measured}" if measured else "")


def _axes(report: Report) -> str:
    by = partial_sets(report)
    named = [f"by {', '.join(tasks)}" for tasks in by]
    rows = [["axis", *(f"neurons {task}" for task in report.tasks), "shared", "%", *named, "difference"]]
    for axis in report.axes:
        width = min(axis.neurons.values(), default=0)
        neurons = [f"{axis.neurons[task]:,}" if task in axis.neurons else "" for task in report.tasks]
        share = f"{100 * axis.shared / width:.0f}" if width else ""
        sets = {shared.tasks: f"{shared.neurons:,}" for shared in axis.sets}
        sets = [sets.get(tasks, "") for tasks in by]
        rows.append([axis.name, *neurons, f"{axis.shared:,}", share, *sets, _number(axis.difference)])
    return columns(rows)


def partial_sets(report: Report) -> list[tuple[str, ...]]:
    """Sets of tasks that share neurons, largest first; none where all tasks of every axis share all of its slots."""
    found = {shared.tasks for axis in report.axes for shared in axis.sets}
    if all(set(shared.tasks) == set(axis.neurons) for axis in report.axes for shared in axis.sets):
        return []
    return sorted(found, key=lambda tasks: (-len(tasks), [report.tasks.index(task) for task in tasks]))


def _layers(report: Report) -> str:
    errors = [f"error {task}" for task in report.tasks]
    sparse = ["non-zero", "stored non-zero"] if report.is_sparse else []
    rows = [["layer", "parameters", "stored", "%", *sparse, *errors, "damping", "moments"]]
    for layer in report.layers:
        ratio = f"{100 * layer.after / layer.before:.1f}" if layer.before else ""
        found = [_number(layer.error.get(task)) for task in report.tasks]
        sizes = [f"{layer.before:,}", f"{layer.after:,}", ratio]
        if sparse:
            sizes += [_count(layer.nonzero_before), _count(layer.nonzero_after)]
        rows.append([layer.name, *sizes, *found, _number(layer.damping), layer.space])
    before, after = f"{report.parameters_before:,}", f"{report.parameters_after:,}"
    total = ["whole network", before, after, f"{100 * report.ratio:.1f}"]
    if sparse:
        total += [_count(report.nonzero_before), _count(report.nonzero_after)]
    rows.append(total + [""] * (len(rows[0]) - len(total)))
    return columns(rows, ruled=True)


def _private(report: Report) -> str:
    groups: dict[tuple[str, str], list[str]] = {}
    for item in report.private:
        groups.setdefault((item.task, item.reason), []).append(item.name)
    lines = ["left private:"]
    for (task, reason), names in groups.items():
        line = f"{task}: {', '.join(names)}: {reason}"
        lines.append(textwrap.fill(line, WIDTH, initial_indent="  ", subsequent_indent="    ", break_long_words=False))
    return "\n".join(lines)


def columns(rows: Sequence[Sequence[str]], ruled: bool = False) -> str:
    """Rows under a header, the first column to the left and the others to the right; a rule before the last row."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells]).rstrip())
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    lines.insert(1, rule)
    if ruled:
        lines.insert(-1, rule)
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.3g}"


def _count(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"
