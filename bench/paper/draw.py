"""python -m bench.paper.draw NAME FILE.csv PICTURE: the picture of an experiment's rows as the command wrote them.

``ablations`` draws the mean increase of every method, before and after retraining; ``several`` the increase of the mean
and of the worst task against the number of networks, or of the mean for every method; ``layers`` the mean increase
where every layer is zipped in turn.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

BEFORE, AFTER, GIVEN = "#c9ccd1", "#2f6f9f", "#8c4a86"

Rows = Sequence[dict[str, str]]


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.paper.draw", description=__doc__)
    parser.add_argument("name", choices=sorted(DRAWN), help="what to draw")
    parser.add_argument("file", help="written by python -m bench.paper NAME --csv")
    parser.add_argument("picture", help="file to write, PNG or SVG")
    options = parser.parse_args(arguments)
    with open(options.file, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        parser.error(f"{options.file} must have rows, got none")
    figure = DRAWN[options.name](rows)
    figure.savefig(options.picture)


def ablations(rows: Rows) -> Figure:
    """A panel a pair: a line an ablation, its mean increase with no step and after them."""
    cases = list(dict.fromkeys(row["case"] for row in rows))
    figure = _figure(6.2 * len(cases), 0.9 + 0.36 * max(len(_methods(rows, case)) for case in cases))
    for panel, case in zip(figure.subplots(1, len(cases), squeeze=False)[0], cases, strict=True):
        methods = _methods(rows, case)
        last = max(int(row["steps"]) for row in rows if row["case"] == case)
        for steps, shift, color in ((0, -0.19, BEFORE), (last, 0.19, AFTER))[: 1 + bool(last)]:
            found = {_label(row): row for row in rows if row["case"] == case and int(row["steps"]) == steps}
            places = [at + shift for at, method in enumerate(methods) if method in found]
            chosen = [found[method] for method in methods if method in found]
            panel.barh(
                places,
                [float(row["increase"]) for row in chosen],
                0.36,
                xerr=[float(row["standard_error"]) for row in chosen],
                color=color,
                label=f"{steps} steps",
            )
        panel.set_yticks(range(len(methods)), methods)
        panel.invert_yaxis()
        panel.set_xscale("symlog", linthresh=1)
        most = panel.get_xlim()[1]
        ticks = [at for at in (0, 0.5, 1, 2, 5, 10, 20, 50) if at <= most]
        panel.set_xticks(ticks, [f"{at:g}" for at in ticks])
        panel.axvline(0, color="black", linewidth=0.8)
        panel.set_title(f"{case}, all shared unless named", fontsize=10)
        panel.set_xlabel("mean increase of the test error, percentage points")
        panel.legend(loc="lower right", fontsize=8)
    return figure


def several(rows: Rows) -> Figure:
    """Mean increase against the number of networks, a line a share and method; of one method the worst task's, too."""
    figure = _figure(6.2, 3.6)
    panel = figure.subplots()
    last: dict[tuple[str, str], dict[int, dict[str, str]]] = {}
    for row in rows:
        count = row["original"].count("/") + 1
        if count > 1:  # the row after most steps comes last
            last.setdefault((row["share"], row["method"]), {})[count] = row
    last = {key: found for key, found in last.items() if len(found) > 1}  # a line has two ends
    shares, methods = (list(dict.fromkeys(key[at] for key in last)) for at in (0, 1))
    for (share, method), found in last.items():
        color = (AFTER, GIVEN)[shares.index(share) % 2]
        counts = sorted(found)
        how = "" if len(methods) == 1 else ", jointly" if method == "mtzip" else f", {method}"
        for field in ("increase", "worst") if len(methods) == 1 else ("increase",):
            values = [float(found[count][field]) for count in counts]
            style = "o:" if field == "worst" else ("o-", "s--", "^-.")[methods.index(method) % 3]
            what = "worst" if field == "worst" else "mean"
            panel.plot(counts, values, style, color=color, label=f"{share}{how}, {what} of the tasks")
    panel.set_xlabel("networks zipped")
    panel.set_ylabel("increase of the test error, points")
    panel.set_xticks(sorted({count for found in last.values() for count in found}))
    panel.set_ylim(bottom=0)
    panel.legend(fontsize=8)
    return figure


def layers(rows: Rows) -> Figure:
    """A panel a case: mean increase against what is shared, layer after layer, before retraining and after it."""
    rows = [row for row in rows if row["method"] == "mtzip"]
    cases = list(dict.fromkeys(row["case"] for row in rows))
    figure = _figure(5.2 * min(len(cases), 2), 2.9 * -(-len(cases) // 2))
    panels = figure.subplots(-(-len(cases) // 2), min(len(cases), 2), squeeze=False, sharex=True, sharey=True).flatten()
    for panel, case in zip(panels, cases, strict=False):
        found = [row for row in rows if row["case"] == case]
        shares = list(dict.fromkeys(row["share"] for row in found))
        last = max(int(row["steps"]) for row in found)
        for steps, style, color in ((0, "o--", GIVEN), (last, "o-", AFTER)):
            chosen = {row["share"]: row for row in found if int(row["steps"]) == steps}
            values, spread = ([float(chosen[share][key]) for share in shares] for key in ("increase", "standard_error"))
            panel.errorbar(
                range(len(shares)), values, spread, fmt=style, color=color, markersize=4, label=f"{steps} steps"
            )
        panel.axhline(0, color="black", linewidth=0.8)
        panel.axhline(0.1, color=BEFORE, linewidth=0.8)
        ticks = [share.split(", ")[-1] for share in shares]  # those before are shared as a whole
        panel.set_xticks(range(len(shares)), ticks, rotation=45, ha="right", fontsize=8)
        panel.set_title(case, fontsize=10)
        panel.set_ylabel("mean increase, points", fontsize=9)
        panel.legend(fontsize=8)
    return figure


DRAWN = {"ablations": ablations, "several": several, "layers": layers}


def _methods(rows: Rows, case: str) -> list[str]:
    return list(dict.fromkeys(_label(row) for row in rows if row["case"] == case))


def _label(row: dict[str, str]) -> str:
    return row["method"] if row["share"] == "100%" else f"{row['method']}, {row['share']} shared"


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)  # not pyplot's: nothing to close, no display needed
    return figure


if __name__ == "__main__":
    main()
