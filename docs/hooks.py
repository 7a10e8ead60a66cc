"""What MkDocs does beyond Markdown here: tables of measured results and of files, and formulas as MathML.

``<!-- table: FOLDER/NAME -->`` in a page becomes the table of ``bench/results/FOLDER/NAME.csv``: no figure is typed.
``<!-- files: FOLDER -->`` becomes the list of its Python files, each with the first sentence of its docstring.
"""

from __future__ import annotations

import ast
import csv
import html
import re
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
MARKER = re.compile(r"<!-- (table|files): ([\w./-]+) -->")
FORMULA = re.compile(r'<(span|div) class="arithmatex">(.*?)</\1>', re.DOTALL)

Row = dict[str, str]


def on_page_markdown(markdown: str, **_: object) -> str:
    """Puts every table in the place of its marker."""
    return MARKER.sub(lambda found: {"table": table_of, "files": files_of}[found[1]](found[2]), markdown)


def on_page_content(content: str, **_: object) -> str:
    """Formulas as MathML, which browsers show without a script."""
    return FORMULA.sub(lambda found: formula(found[2], found[1] == "div"), content)


def formula(text: str, block: bool) -> str:
    """MathML of one formula in the delimiters of arithmatex."""
    from latex2mathml.converter import convert

    source = html.unescape(text).strip()[2:-2].strip()
    found = convert(source, display="block" if block else "inline")
    return f'<div class="arithmatex">{found}</div>' if block else found


def table_of(name: str) -> str:
    """The Markdown table of one result file.

    Raises:
        ValueError: there is no such file, or its columns are not known.
    """
    path = ROOT / f"bench/results/{name}.csv"
    if not path.is_file():
        raise ValueError(f"table: {name} must name a file of bench/results without .csv, found none at {path}")
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for columns, draw in DRAWN.items():
        if rows and columns <= rows[0].keys():
            return draw(rows)
    raise ValueError(f"table: {name} must have the columns of {', '.join(f.__name__ for f in DRAWN.values())}")


def files_of(folder: str) -> str:
    """The Markdown table of the Python files of a folder.

    Raises:
        ValueError: there is no such folder, or a file in it without a docstring.
    """
    lines = []
    for path in sorted((ROOT / folder).glob("*.py")):
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        if not text:
            raise ValueError(f"files: {path.relative_to(ROOT)} must begin with a docstring that says what it is")
        sentence = re.split(r"(?<=[.])\s|::|\n\n", text, maxsplit=1)[0].rstrip(".")
        # Code in two backticks, and references as Sphinx writes them, as Markdown has them.
        sentence = re.sub(r":\w+:`~?([\w.]+)`", r"`\1`", " ".join(sentence.split())).replace("``", "`")
        lines.append([f"`{path.name}`", sentence])
    if not lines:
        raise ValueError(f"files: {folder} must be a folder with Python files, found none")
    return _table(["file", ""], lines)


def operators(rows: Sequence[Row]) -> str:
    """Times of an operator and of the other ways to the same result."""
    lines = []
    case = None
    for row in rows:
        figures = [f"{float(row['microseconds']):,.0f}", f"{float(row['spread']):.0%}", _number(row["gflops"], ",.0f")]
        ratio = "" if row["way"] == "mtz_ext" else _number(row["ratio"], ".2f")
        lines.append(
            [row["case"] if row["case"] != case else "", row["way"], *figures, _number(row["error"], ".0e"), ratio]
        )
        case = row["case"]
    head = ["case", "way", "µs", "±", "GFLOP/s", "largest error", "time over ours"]
    return _table(head, lines, numbers=5)


def architectures(rows: Sequence[Row]) -> str:
    """What can be shared of networks."""
    lines = []
    for row in rows:
        shares = [f"{float(row[name]):.1%}" for name in ("sharable", "heads", "other")]
        errors = [_number(row[name], ".1g") for name in ("nothing_shared", "copy_shared")]
        lines.append(
            [row["architecture"], f"{int(row['parameters']):,}", *shares, *errors, row["private"] or "nothing"]
        )
    shares, errors = ["can be shared", "heads", "norms, tables"], ["share=0", "with its copy"]
    head = ["architecture", "parameters", *shares, *errors, "what else stays private, and why"]
    return _table(head, lines, right=range(1, 7))


def targets(rows: Sequence[Row]) -> str:
    """Measured values."""
    lines = [[row["work"], row["measure"], f"{float(row['value']):.2f}", row["detail"]] for row in rows]
    return _table(["network", "measure", "value", "from"], lines, right=[2])


def experiments(rows: Sequence[Row]) -> str:
    """The paper's experiments; of pruned networks, and where somebody looked when they had recovered, that too."""
    more = {"nonzero": "not zero", "recovered": "steps to +0.1"} if any(row.get("recovered") for row in rows) else {}
    lines = []
    for row in rows:
        rise = f"{float(row['increase']):+.2f} ± {float(row['standard_error']):.2f}"
        size = f"{float(row['fraction']):.1%}"
        errors = [row["original"], row["errors"], rise]
        others = [f"{int(row['nonzero']):,}", row["recovered"]] if more else []
        lines.append([row["case"], row["method"], row["share"], row["steps"], size, *errors, *others])
    head = ["networks", "method", "shared", "steps", "stored", "originals, error %", "error %", "mean increase"]
    return _table([*head, *more.values()], lines, numbers=5 + len(more))


def resources(rows: Sequence[Row]) -> str:
    """Registers of CUDA kernels, an architecture a column."""
    architectures = [name for name in rows[0] if name.startswith("sm_")]
    lines = [[f"`{row['kernel']}`", *(row[name] for name in architectures)] for row in rows]
    return _table(["kernel", *architectures], lines, numbers=len(architectures))


def shared_slots(rows: Sequence[Row]) -> str:
    """Zips of three networks, with slots of all and of some of the tasks."""
    lines = []
    for row in rows:
        share, stored = (f"{float(row[name]):.0%}" for name in ("share", "stored"))
        difference, rise = f"{float(row['difference']):.4f}", f"{float(row['increase']):+.2f}"
        lines.append([row["networks"], share, row["slots"], stored, difference, row["originals"], row["errors"], rise])
    head = ["networks", "shared", "slots", "stored", "functional difference", "originals, error %", "error %"]
    return _table([*head, "mean increase"], lines, numbers=5)


#: The columns that tell a kind of file, and what draws it.
DRAWN: dict[frozenset[str], Callable[[Sequence[Row]], str]] = {
    frozenset({"case", "way", "microseconds"}): operators,
    frozenset({"architecture", "sharable"}): architectures,
    frozenset({"work", "measure", "value"}): targets,
    frozenset({"case", "method", "increase"}): experiments,
    frozenset({"file", "kernel"}): resources,
    frozenset({"networks", "slots", "difference"}): shared_slots,
}


def _number(text: str, form: str) -> str:
    return format(float(text), form) if text else ""


def _table(head: Sequence[str], lines: Sequence[Sequence[str]], numbers: int = 0, right: Sequence[int] = ()) -> str:
    """A Markdown table; the last ``numbers`` columns, and those of ``right``, are aligned to the right."""
    aligned = {*right, *range(len(head) - numbers, len(head))}
    rule = ["---:" if at in aligned else "---" for at in range(len(head))]
    cells = [[cell.replace("|", "\\|") for cell in line] for line in (head, rule, *lines)]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)
