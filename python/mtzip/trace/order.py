"""Groups of layers in an order that is a graph order for every task: merging visits them once."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise

from .analysis import Analysis, Layer, Note


class _Group:
    """Layers that answer to each other, and whether the user said so."""

    def __init__(self, layers: dict[int, Layer], given: bool, at: int):
        self.layers, self.given, self.at = layers, given, at


def ordered(
    groups: Sequence[tuple[dict[int, Layer], bool]], analyses: Sequence[Analysis], notes: list
) -> list[dict[int, Layer]]:
    """The groups in graph order of every task; where two cross, one that the walk found loses a member.

    Args:
        groups: task index to layer, and whether the user gave it.
        analyses: of all tasks.
        notes: takes what stays private, and why.

    Raises:
        ValueError: groups that the user gave cross each other.
    """
    position = [{layer.path: at for at, layer in enumerate(analysis.layers.values())} for analysis in analyses]
    found = [_Group(layers, given, at) for at, (layers, given) in enumerate(groups)]

    def late(group: _Group) -> tuple[int, int]:
        return max(position[task][layer.path] for task, layer in group.layers.items()), group.at

    while True:
        before = _before(found, analyses)
        try:
            TopologicalSorter(before).prepare()
            break
        except CycleError as error:
            cycle = [found[at] for at in dict.fromkeys(error.args[1])]
        loose = [group for group in cycle if len(group.layers) > 1 and not group.given]
        if not loose:
            crossed = " and ".join(_shown(group, analyses) for group in cycle if len(group.layers) > 1)
            raise ValueError(
                "correspondence must keep to the order in which every network calls its layers, got groups that "
                f"cross: {crossed}; leave one of them out"
            )
        group = max(loose, key=late)
        task = min(group.layers, key=lambda task: (position[task][group.layers[task].path], -task))
        layer = group.layers.pop(task)
        notes.append((task, Note(layer.name, "its network calls the layers in another order")))
        found.append(_Group({task: layer}, group.given, len(found)))

    after: dict[int, list[int]] = {}
    waiting = {at: len(sources) for at, sources in before.items()}
    for at, sources in before.items():
        for source in sources:
            after.setdefault(source, []).append(at)
    ready = [late(found[at]) for at, count in waiting.items() if not count]
    heapq.heapify(ready)
    result = []
    while ready:
        at = heapq.heappop(ready)[1]
        result.append(found[at].layers)
        for other in after.get(at, ()):
            waiting[other] -= 1
            if not waiting[other]:
                heapq.heappush(ready, late(found[other]))
    return result


def _before(found: Sequence[_Group], analyses: Sequence[Analysis]) -> dict[int, set[int]]:
    """Number of a group to those that hold the layer right before one of its own."""
    owner = {(task, layer.path): group.at for group in found for task, layer in group.layers.items()}
    before: dict[int, set[int]] = {group.at: set() for group in found}
    for task, analysis in enumerate(analyses):
        order = [owner[task, path] for path in analysis.layers if (task, path) in owner]
        for first, second in pairwise(order):
            before[second].add(first)
    return before


def _shown(group: _Group, analyses: Sequence[Analysis]) -> str:
    return str({analyses[task].exported.task: layer.name for task, layer in group.layers.items()})
