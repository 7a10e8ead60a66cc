"""Tables whose rows are printed as they become known."""

from __future__ import annotations

from collections.abc import Sequence


class Table:
    """Prints right-aligned columns: the heading at once, each row when it is given.

    Args:
        columns: headings; a column is as wide as its heading, and at least ``narrowest``.
        narrowest: least width of a column.
    """

    def __init__(self, columns: Sequence[str], narrowest: int = 10):
        self.widths = [max(len(column), narrowest) for column in columns]
        self.row(columns)
        self.row(["-" * width for width in self.widths])

    def row(self, cells: Sequence[str]) -> None:
        """Prints one row of as many cells as there are columns."""
        print("  ".join(cell.rjust(width) for cell, width in zip(cells, self.widths, strict=True)), flush=True)
