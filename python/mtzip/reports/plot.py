"""A :class:`~mtzip.reports.report.Report` as a picture."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from .report import Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHARED, BEFORE, DIFFERENCE = "#2f6f9f", "#c9ccd1", "#8c4a86"
PRIVATE = ("#e0a458", "#7fb069", "#c8655b", "#9a8fbf", "#5fa8a0", "#b08d6a")  # a task each, in turn


def plot(report: Report, path=None) -> Figure:
    """Three panels beside one another: neurons, functional differences, parameters; a line an axis or layer.

    Args:
        report: what to draw.
        path: file to write, or None.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("report.plot() needs matplotlib: pip install matplotlib") from error

    lines = max(len(report.axes) * (1 + 0.35 * (len(report.tasks) - 1)), len(report.layers) + 1, 3)
    figure = Figure(figsize=(15, 2.1 + 0.27 * lines), dpi=120, layout="constrained")
    figure.get_layout_engine().set(h_pad=0.1, w_pad=0.1)
    FigureCanvasAgg(figure)  # not pyplot's: nothing to close, no display needed
    neurons, difference, parameters = figure.subplots(1, 3, width_ratios=[1.25, 0.75, 1])
    _neurons(neurons, report)
    _difference(difference, report)
    _parameters(parameters, report)
    figure.suptitle(
        f"{' + '.join(report.tasks) or 'no tasks'}: {report.parameters_after:,} parameters stored of "
        f"{report.parameters_before:,} ({report.ratio:.1%}), method {report.method}"
    )
    if path is not None:
        figure.savefig(path)
    return figure


def _neurons(panel: Axes, report: Report) -> None:
    """A bar for every task of every axis: shared neurons, then private ones."""
    height = 0.8 / max(1, len(report.tasks))
    for number, task in enumerate(report.tasks):
        there = [(place, axis) for place, axis in enumerate(report.axes) if task in axis.neurons]
        places = [place - 0.4 + (number + 0.5) * height for place, _ in there]
        shared = [axis.used(task) for _, axis in there]
        private = [axis.neurons[task] - common for (_, axis), common in zip(there, shared, strict=True)]
        panel.barh(places, shared, 0.92 * height, color=SHARED, label="shared" if number == 0 else None)
        color = PRIVATE[number % len(PRIVATE)]
        label = f"private, {task}" if any(private) else None
        panel.barh(places, private, 0.92 * height, left=shared, color=color, label=label)
    _named(panel, [axis.name for axis in report.axes])
    _titled(panel, report, "neurons", "per task")


def _difference(panel: Axes, report: Report) -> None:
    """Functional difference of every axis, on a logarithmic scale where the values ask for one."""
    found = [axis.difference for axis in report.axes]
    known = [value for value in found if value is not None and value > 0]
    panel.barh(range(len(found)), [value or 0 for value in found], 0.6, color=DIFFERENCE)
    if known and max(known) > 50 * min(known):
        panel.set_xscale("log")
        panel.set_xlim(min(known) / 2, max(known) * 2)
    for place, value in enumerate(found):
        if value is None:
            panel.text(
                0.01, place, "not measured", va="center", fontsize="small", transform=panel.get_yaxis_transform()
            )
    _named(panel, [axis.name for axis in report.axes], names=False)
    _titled(panel, report, "functional difference", "relative to the energy of the outputs")


def _parameters(panel: Axes, report: Report) -> None:
    """Parameters of every layer before and after; the rest of the network is what no layer of the report has."""
    names = [layer.name for layer in report.layers]
    before = [layer.before for layer in report.layers]
    after = [layer.after for layer in report.layers]
    rest = report.parameters_before - sum(before), report.parameters_after - sum(after)
    if rest[0] > 0 and rest[1] > 0:
        names.append("everything else")
        before.append(rest[0])
        after.append(rest[1])
    places = range(len(names))
    panel.barh(places, before, 0.8, color=BEFORE, label="before")
    panel.barh(places, after, 0.45, color=SHARED, label="stored")
    _named(panel, names)
    panel.xaxis.set_major_formatter(lambda value, _: _short(value))
    _titled(panel, report, "parameters", "per layer, all tasks together")


def _titled(panel: Axes, report: Report, title: str, unit: str) -> None:
    """Title, at one height in all panels; legend in the lines under it, three entries a line; what the numbers are."""
    if panel.get_legend_handles_labels()[1]:
        place = {"loc": "lower left", "bbox_to_anchor": (-0.02, 1)}
        panel.legend(**place, ncols=3, frameon=False, fontsize="small", borderpad=0.1, columnspacing=1.5)
    panel.set_title(title, loc="left", fontweight="bold", pad=6 + 17 * math.ceil((len(report.tasks) + 1) / 3))
    panel.set_xlabel(unit, fontsize="small")


def _named(panel: Axes, labels: list[str], names: bool = True) -> None:
    """A name a line, from the top; long ones lose their beginning."""
    shown = [label if len(label) <= 40 else f"…{label[-39:]}" for label in labels]
    if not labels:
        panel.text(0.5, 0.5, "none", ha="center", va="center", transform=panel.transAxes)
        panel.set_xticks([])
    panel.set_yticks(range(len(labels)), shown if names else [""] * len(labels), fontsize="small")
    panel.set_ylim(max(len(labels), 1) - 0.5, -0.5)
    panel.spines[["top", "right"]].set_visible(False)
    panel.margins(x=0.02)
    panel.tick_params(axis="y", length=0)
    panel.xaxis.set_tick_params(labelsize="small")
    if labels and panel.get_xscale() == "linear":
        panel.locator_params(axis="x", nbins=5)


def _short(value: float) -> str:
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:g}{name}"
    return f"{value:g}"
