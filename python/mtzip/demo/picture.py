"""Draws test error against the share of neurons stored once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .run import Outcome

ORIGINAL, ZIPPED, RETRAINED = "#6b7280", "#d97706", "#0f766e"


def draw(outcomes: Sequence[Outcome], file: Path) -> None:
    """Writes a picture with a row of panels a network and a panel a task."""
    import matplotlib

    matplotlib.use("Agg")  # there need not be a display
    from matplotlib import pyplot

    tasks = tuple(outcomes[0].training_steps)
    figure, axes = pyplot.subplots(
        len(outcomes), len(tasks), squeeze=False, figsize=(5 * len(tasks), 3.6 * len(outcomes)), layout="constrained"
    )
    for outcome, row in zip(outcomes, axes, strict=True):
        for task, panel in zip(tasks, row, strict=True):
            _panel(panel, outcome, task)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


def _panel(panel, outcome: Outcome, task: str) -> None:
    levels = [outcome.originals, *outcome.levels]
    shares = [100 * level.share for level in levels]
    panel.axhline(outcome.originals.zipped[task], color=ORIGINAL, linestyle="--", linewidth=1.2, label="original")
    panel.plot(shares, [level.zipped[task] for level in levels], "o-", color=ZIPPED, label="zipped, not retrained")
    steps = outcome.levels[-1].steps
    panel.plot(shares, [level.retrained[task] for level in levels], "s-", color=RETRAINED, label=f"after {steps} steps")
    panel.set_title(f"{outcome.network}, {task}", fontsize=11)
    ticks = [f"{100 * level.share:.0f} %\n{level.stored / level.total:.0%}" for level in levels]
    panel.set_xticks(shares, ticks)
    panel.set_xlabel("neurons shared, and parameters stored against the sum of the parts")
    panel.set_ylabel("test error, %")
    panel.set_ylim(bottom=0)
    panel.grid(axis="y", color="#e5e7eb")
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
