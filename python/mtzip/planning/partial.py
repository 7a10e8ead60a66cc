"""Which axes of three and more tasks may have slots that some of the tasks share only: no two that one layer connects.

A weight is stored once for the tasks that its row's slot and its column's have in common. Where all tasks share each
slot of one of the two axes, nothing is asked of the other one: as many neurons stored are as many weights stored,
whichever tasks share them. With partial slots on both, rows of tasks a and b over columns of b and c save nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..trace.analysis import Analysis
from ..trace.correspond import AxisGroup, Correspondence


def partial_axes(analyses: Sequence[Analysis], correspondence: Correspondence) -> frozenset[str]:
    """Names of axes of three and more tasks of which no layer writes one and reads another, or the same.

    Those with the fewest neighbours are chosen first (the inner axes of residual blocks rather than the stream), then
    the widest.
    """
    neighbours: dict[str, set[str]] = {axis.name: set() for axis in correspondence.axes}
    for group in correspondence.layers:
        if any(layer.groups > 1 for layer in group.layers.values()):
            continue  # its rows read the columns of their own group only, stored with them
        written, read = (_axes(group.layers, side, analyses, correspondence) for side in ("rows", "columns"))
        for row in written:
            for column in read:
                neighbours[row].add(column)
                neighbours[column].add(row)
    chosen: set[str] = set()
    axes = [axis for axis in correspondence.axes if len(axis.atoms) > 2 and axis.name not in neighbours[axis.name]]
    for axis in sorted(axes, key=lambda axis: (len(neighbours[axis.name]), -_width(axis))):
        if not neighbours[axis.name] & chosen:
            chosen.add(axis.name)
    return frozenset(chosen)


def _axes(layers, side: str, analyses: Sequence[Analysis], correspondence: Correspondence) -> set[str]:
    found = set()
    for task, layer in layers.items():
        for segment in analyses[task].axes.resolve(getattr(layer, side)) or ():
            axis = correspondence.axis_of(task, segment.atom)
            if axis is not None:
                found.add(axis.name)
    return found


def _width(axis: AxisGroup) -> int:
    return min(axis.sizes.values())
