"""Draws test error against the share of neurons stored once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .run import Outcome

ORIGINAL, AVERAGED, ZIPPED, RETRAINED = "#6b7280", "#9ca3af", "#d97706", "#0f766e"


def draw(outcomes: Sequence[Outcome], file: Path) -> None:
    """Writes a picture with a row of panels a network and a panel a task."""
    import matplotlib

    matplotlib.use("Agg")  # there need not be a display
    from matplotlib import pyplot

    tasks = tuple(outcomes[0].originals)
    size = (4.8 * len(tasks), 0.5 + 3.4 * len(outcomes))
    figure, axes = pyplot.subplots(len(outcomes), len(tasks), squeeze=False, figsize=size, layout="constrained")
    for outcome, row in zip(outcomes, axes, strict=True):
        for task, panel in zip(tasks, row, strict=True):
            _panel(panel, outcome, task)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


def _panel(panel, outcome: Outcome, task: str) -> None:
    original = outcome.originals[task]
    shares = [0.0, *(100 * level.share for level in outcome.levels)]

    def line(errors: list[float], style: str, color: str, label: str, size: float = 4) -> None:
        panel.plot(shares, [original, *errors], style, color=color, label=label, markersize=size, markeredgewidth=1.5)

    panel.axhline(original, color=ORIGINAL, linestyle="--", linewidth=1.2, label="original")
    line([level.averaged[task] for level in outcome.levels], "^:", AVERAGED, "averaged")
    line([level.zipped[task] for level in outcome.levels], "o-", ZIPPED, "zipped", 8)
    retrained = f"zipped and retrained for {outcome.retraining_steps} steps"
    line([level.retrained[task] for level in outcome.levels], "s-", RETRAINED, retrained)

    stored = [1.0, *(level.stored / outcome.total for level in outcome.levels)]
    panel.set_xticks(
        shares, [f"{share:.0f}\n{part:.0%}" for share, part in zip(shares, stored, strict=True)], fontsize=9
    )
    panel.set_xlabel("neurons shared, % (below: parameters stored)")
    panel.set_ylabel("test error, %")
    # Averaging may be off by tens of per cent; the scale is for the lines that stay near the original.
    near = max(max(level.zipped[task], level.retrained[task]) for level in outcome.levels)
    far = max(level.averaged[task] for level in outcome.levels)
    panel.set_ylim(0, 1.15 * max(original, near, min(far, 3 * max(original, near))))
    panel.set_title(f"{outcome.network}, {task}", fontsize=11)
    panel.grid(axis="y", color="#e5e7eb")
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
