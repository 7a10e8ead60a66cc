"""A zip as one HTML page that needs nothing else: no script, no network, light and dark."""

from __future__ import annotations

import contextlib
import math
import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from .page_parts import bar, curves, logarithmic, name, neuron_boxes, number, stacked, task_class, text
from .page_style import STYLE
from .report import LayerReport, Report


class Losses(Protocol):
    """What :func:`mtzip.retrain` returns, as far as the page needs it."""

    tasks: tuple[str, ...]

    def losses(self, task: str) -> list[float]:
        """Loss of ``task`` at every step."""
        ...


@dataclass(frozen=True)
class Stored:
    """What a file holds.

    Args:
        file: its name.
        bytes: its size.
        rows: (what, class of the network or "", tensors, values, bytes): what tasks share, then each task's own.
        versions: of the software that wrote it.
    """

    file: str
    bytes: int
    rows: tuple[tuple[str, str, int, int, int], ...]
    versions: Mapping[str, str]


def write_page(path: str | os.PathLike, content: str) -> None:
    """Writes a page beside ``path`` and renames it.

    Raises:
        OSError: the file cannot be written.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        part.write_text(content, encoding="utf-8", errors="backslashreplace")
        os.replace(part, path)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(part)


def page(
    report: Report,
    *,
    history: Losses | None = None,
    errors: Mapping[str, Mapping[str, float]] | None = None,
    stored: Stored | None = None,
) -> str:
    """The page as HTML.

    Args:
        report: what the zip did.
        history: of retraining, for its curves; None for those of the report.
        errors: stage ("originals", "zipped", ...) to task to test error, for a comparison; any unit. None for those of
            the report.
        stored: what the file holds, for its sizes.

    Raises:
        TypeError: ``errors`` is no mapping of mappings.
    """
    parts = [
        _head(report, stored),
        _tiles(report, stored),
        _errors(report, errors if errors is not None else report.errors or None),
        _retraining(report, history),
        _side_by_side(report),
        _layers(report),
        _stored(stored),
        _private(report),
        _foot(stored),
    ]
    title = text(" + ".join(report.tasks) or "mtzip")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8"/>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>\n'
        f"<title>{title} · zipped</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def _head(report: Report, stored: Stored | None) -> str:
    tasks = " + ".join(text(task) for task in report.tasks) or "no tasks"
    where = f" · {text(os.path.basename(stored.file))}" if stored else ""
    follows = "; ".join(f"{text(task)} has the trunk of {text(leader)}" for task, leader in report.follows.items())
    how = f"zipped with method {text(report.method)}" + (f", {follows}" if follows else "")
    return f'<header><h1>{tasks}</h1><p class="soft">{how}{where}</p></header>'


def _tiles(report: Report, stored: Stored | None) -> str:
    neurons = sum(axis.used(task) for axis in report.axes for task in axis.neurons)
    total = sum(sum(axis.neurons.values()) for axis in report.axes)
    tiles = [
        (f"{report.ratio:.1%}", "of the originals' parameters stored"),
        (_short(report.parameters_after), f"parameters, of {_short(report.parameters_before)} in the originals"),
    ]
    if total:
        tiles.append((f"{neurons / total:.0%}", f"of the neurons on {len(report.axes)} axes shared"))
    if report.is_sparse and report.nonzero_after is not None:
        before = _short(report.nonzero_before)
        tiles.append((_short(report.nonzero_after), f"parameters that are not zero, of {before} in the originals"))
    if stored:
        tiles.append((_size(stored.bytes), f"in the file, {stored.bytes:,} bytes"))
    if report.seconds:
        stages = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in report.seconds.items())
        tiles.append((f"{sum(report.seconds.values()):.1f} s", stages))
    shown = "".join(f'<div class="tile"><b>{text(value)}</b><span>{text(what)}</span></div>' for value, what in tiles)
    return f'<div class="tiles">{shown}</div>'


def _side_by_side(report: Report) -> str:
    if not report.axes:
        return _section("The networks side by side", "<p>No layer of these networks can be shared.</p>")
    widest = max((max(axis.neurons.values(), default=0) for axis in report.axes), default=1)
    most = max((axis.difference or 0 for axis in report.axes), default=0) or 1
    two = len(report.tasks) == 2
    rows = []
    for axis in report.axes:
        width = min(axis.neurons.values(), default=0)
        share = f"{axis.shared / width:.0%}" if width else "–"
        counts = " / ".join(f"{axis.neurons[task]:,}" if task in axis.neurons else "–" for task in report.tasks)
        gauge = bar(logarithmic(axis.difference, most / 1e4, most), "shared")
        rows.append(
            f'<tr><td>{name(axis.name)}</td><td class="picture">{neuron_boxes(axis, report.tasks, widest)}</td>'
            f"<td>{axis.shared:,}</td><td>{share}</td><td>{counts}</td>"
            f'<td>{number(axis.difference)}</td><td class="gauge">{gauge}</td></tr>'
        )
    if two:
        left, right = (text(task) for task in report.tasks)
        columns = f'<div class="ends"><span>{left}</span><span>shared</span><span>{right}</span></div>'
    else:
        columns = f'<div class="many">{"".join(f"<span>{text(task)}</span>" for task in report.tasks)}</div>'
    head = (
        f'<th>axis</th><th class="left">{columns}</th><th>shared</th><th>of the smaller</th><th>widths</th>'
        "<th>difference</th><th></th>"
    )
    legend = [("shared", "shared: stored once")] + [
        (task_class(at), f"private to {task}") for at, task in enumerate(report.tasks)
    ]
    note = (
        "A row is an axis: a channel dimension that its layers keep in one order. Its width grows with the logarithm "
        "of the neurons. The functional difference is what merging them costs, relative to the energy of their "
        "outputs: 0 is free, 1 as bad as leaving them out (bars on a logarithmic scale of four decades)."
    )
    return _section("The networks side by side", _legend(legend) + _table(head, rows), note)


def _layers(report: Report) -> str:
    if not report.layers:
        return ""
    rows = []
    for layer in report.layers:
        ratio = f"{layer.after / layer.before:.0%}" if layer.before else "–"
        sizes = bar(layer.after / max(layer.before, 1), "shared", 1.0)
        found = "".join(
            f'<td>{number(layer.error.get(task))}</td><td class="gauge">'
            f"{bar(logarithmic(layer.error.get(task)), task_class(at))}</td>"
            for at, task in enumerate(report.tasks)
        )
        rows.append(
            f"<tr><td>{name(layer.name)}</td><td>{layer.before:,}</td><td>{layer.after:,}</td><td>{ratio}</td>"
            f'<td class="gauge">{sizes}</td>{_nonzero(report, layer)}{found}<td>{number(layer.damping)}</td></tr>'
        )
    sparse = "<th>not zero</th><th>stored, not zero</th>" if report.is_sparse else ""
    head = f"<th>layer</th><th>parameters</th><th>stored</th><th></th><th></th>{sparse}" + "".join(
        f'<th>error {text(task)}</th><th class="gauge"></th>' for task in report.tasks
    )
    note = (
        "The error of a layer is the mean square of what its output has moved by, relative to the output's variance in "
        "the original network (bars on a logarithmic scale from 10⁻⁵ to 1)."
    )
    legend = _legend([("before", "in the originals"), ("shared", "stored")])
    return _section("Layer by layer", legend + _table(head + "<th>damping</th>", rows), note)


def _nonzero(report: Report, layer: LayerReport) -> str:
    """Cells of a layer's parameters that are not zero, before and after; none where the networks were not pruned."""
    counts = (layer.nonzero_before, layer.nonzero_after) if report.is_sparse else ()
    return "".join(f"<td>{'–' if count is None else f'{count:,}'}</td>" for count in counts)


def _errors(report: Report, errors: Mapping[str, Mapping[str, float]] | None) -> str:
    if errors is None:
        return ""
    if not isinstance(errors, Mapping) or not all(isinstance(stage, Mapping) for stage in errors.values()):
        raise TypeError(f"errors must map a stage to a mapping from task to error, got {type(errors).__name__}")
    values = [value for stage in errors.values() for value in stage.values() if math.isfinite(value)]
    most = max(values, default=0) or 1
    styles = {task: task_class(at) for at, task in enumerate(report.tasks)}
    rows = []
    for task in dict.fromkeys([*report.tasks, *(task for stage in errors.values() for task in stage)]):
        for at, (stage, found) in enumerate(errors.items()):
            value = found.get(task)
            style = "before" if at == 0 else styles.get(task, "shared")
            rows.append(
                f'<tr><td>{name(task) if at == 0 else ""}</td><td class="left">{text(stage)}</td>'
                f'<td>{number(value, ".4g")}</td><td class="picture">'
                f"{bar((value or 0) / most if value is not None and math.isfinite(value) else 0, style)}</td></tr>"
            )
    head = '<th>task</th><th class="left">stage</th><th>error</th><th></th>'
    return _section("Error before and after", _table(head, rows))


def _retraining(report: Report, history: Losses | None) -> str:
    losses = report.retraining if history is None else {task: history.losses(task) for task in history.tasks}
    if not losses:
        return ""
    order = {task: at for at, task in enumerate(report.tasks)}
    styles = {task: task_class(order.get(task, at)) for at, task in enumerate(losses)}
    if not any(losses.values()):
        return _section("Retraining", "<p>No steps.</p>")
    legend = _legend([(styles[task], f"{task}: {_from_to(values)}") for task, values in losses.items()])
    note, steps = "Loss of every task, step by step.", None
    if history is None:
        note, steps = "Loss of every task from the first step to the last.", report.retraining_steps
    return _section("Retraining", legend + curves(losses, styles, steps), note)


def _from_to(values: Sequence[float]) -> str:
    return f"{number(values[0], '.4g')} to {number(values[-1], '.4g')}" if values else "no steps"


def _stored(stored: Stored | None) -> str:
    if stored is None:
        return ""
    styles = ["shared", *(task_class(at) for at in range(len(stored.rows)))]
    parts = [(what, size, style) for (what, _, _, _, size), style in zip(stored.rows, styles, strict=False)]
    rows = [
        f'<tr><td><i class="key {style}"></i>{name(what)}</td><td class="left">{text(kind)}</td><td>{tensors:,}</td>'
        f"<td>{values:,}</td><td>{size:,}</td></tr>"
        for (what, kind, tensors, values, size), style in zip(stored.rows, styles, strict=False)
    ]
    totals = [sum(row[at] for row in stored.rows) for at in (2, 3, 4)]
    cells = "".join(f'<td class="total">{total:,}</td>' for total in totals)
    rows.append(f'<tr><td class="total">in all</td><td></td>{cells}</tr>')
    head = '<th>stored</th><th class="left">network</th><th>tensors</th><th>values</th><th>bytes</th>'
    return _section("What the file holds", stacked(parts) + _table(head, rows))


def _private(report: Report) -> str:
    if not report.private:
        return ""
    groups: dict[str, dict[str, list[str]]] = {}
    for item in report.private:
        groups.setdefault(item.reason, {}).setdefault(item.task, []).append(item.name)
    items = []
    for reason, tasks in groups.items():
        items.append(f"<dt>{text(reason)}</dt>")
        for task, names in tasks.items():
            items.append(f'<dd><span class="soft">{text(task)}:</span> {" ".join(name(item) for item in names)}</dd>')
    return _section("What stayed private, and why", f"<dl>{''.join(items)}</dl>")


def _foot(stored: Stored | None) -> str:
    by = ", ".join(f"{what} {version}" for what, version in stored.versions.items()) if stored else "mtzip"
    return f"<footer>Written by {text(by)}.</footer>"


def _section(title: str, body: str, note: str = "") -> str:
    below = f'<p class="note">{text(note)}</p>' if note else ""
    return f"<section><h2>{text(title)}</h2>{below}{body}</section>"


def _legend(items: Sequence[tuple[str, str]]) -> str:
    shown = "".join(f'<span><i class="{style}"></i>{text(label)}</span>' for style, label in items)
    return f'<div class="legend">{shown}</div>'


def _table(head: str, rows: Sequence[str]) -> str:
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _short(value: float) -> str:
    for unit, letter in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= unit:
            return f"{value / unit:.3g}{letter}"
    return f"{value:g}"


def _size(size: int) -> str:
    for unit, letter in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size >= unit:
            return f"{size / unit:.3g} {letter}"
    return f"{size} B"
