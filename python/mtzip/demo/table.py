"""Tables whose rows are printed as they become known."""

from __future__ import annotations

from collections.abc import Sequence

GAP = "  "


class Table:
    """Prints right-aligned columns: the headings at once, each row when it is given.

    Args:
        groups: heading of a group of columns to the headings of its columns; the first heading may be empty.
        narrowest: least width of a column.
    """

    def __init__(self, groups: Sequence[tuple[str, Sequence[str]]], narrowest: int = 9):
        self.widths = [max(len(column), narrowest) for _, columns in groups for column in columns]
        spans, at = [], 0
        for _, columns in groups:
            widths = self.widths[at : at + len(columns)]
            spans.append(sum(widths) + len(GAP) * (len(widths) - 1))
            at += len(columns)
        headings = zip((name for name, _ in groups), spans, strict=True)
        print(GAP.join(f" {name} ".center(span, "-") if name else " " * span for name, span in headings))
        self.row([column for _, columns in groups for column in columns])

    def row(self, cells: Sequence[str]) -> None:
        """Prints one row of as many cells as there are columns."""
        print(GAP.join(cell.rjust(width) for cell, width in zip(cells, self.widths, strict=True)), flush=True)
