"""Parameters against error: a few budgets, zipped and measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from .network.zipped import ZippedNetwork
from .planning.budget import Budget
from .zip import zip_networks


@dataclass
class Point:
    """One zip of a trade-off.

    Args:
        budget: that it was zipped to.
        parameters: stored, as a fraction of all networks' together.
        error: task to relative output error on the calibration inputs.
        score: what the user's ``evaluate`` returned, None without.
    """

    budget: Budget
    parameters: float
    error: dict[str, float]
    score: Any = None


def tradeoff(
    networks: Mapping[str, nn.Module],
    inputs: Mapping[str, Any],
    budgets: Sequence[float] = (0.55, 0.6, 0.7, 0.8, 0.9),
    *,
    evaluate: Callable[[ZippedNetwork], Any] | None = None,
    path=None,
    **options: Any,
) -> list[Point]:
    """Zips to several budgets of parameters, and draws parameters against error.

    Args:
        networks, inputs: as in :func:`mtzip.zip_networks`.
        budgets: stored parameters as fractions of the sum.
        evaluate: called with every zipped network; what it returns is kept (a test error, say).
        path: file for the picture, None for none.
        options: further arguments of :func:`mtzip.zip_networks`.

    Returns:
        A point for every budget, in their order.
    """
    if not budgets:
        raise ValueError("budgets must hold at least one fraction, got none")
    wanted = [Budget(parameters=fraction) for fraction in budgets]
    points = []
    for budget in wanted:
        zipped = zip_networks(networks, inputs, budget, **options)
        score = None if evaluate is None else evaluate(zipped)
        points.append(Point(budget, zipped.report.ratio, zipped.report.output_error, score))
    if path is not None:
        _draw(points, path)
    return points


def _draw(points: Sequence[Point], path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)  # not pyplot's: nothing to close, no display needed
    axes = figure.add_subplot()
    ordered = sorted(points, key=lambda point: point.parameters)
    for task in ordered[0].error:
        x, y = [100 * point.parameters for point in ordered], [100 * point.error[task] for point in ordered]
        axes.plot(x, y, "o-", label=task)
    axes.set_xlabel("parameters stored, % of all networks together")
    axes.set_ylabel("relative output error, %")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)
