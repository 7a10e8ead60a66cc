"""Which layers answer to each other as far as the user says so: checked, and put in place of what the walk found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from .analysis import Analysis, Layer

#: Task name to the path of its layer, or None for "none of this task's".
Given = Mapping[str, str | None]


def given_groups(correspondence: Sequence[Given] | None, analyses: Sequence[Analysis]) -> list[dict[int, Layer]]:
    """The groups of ``correspondence=`` as task index to layer, in the order given.

    Args:
        correspondence: mappings from task name to layer path; None for nothing given.
        analyses: of all tasks.

    Raises:
        TypeError: not a list of mappings.
        KeyError: no such task.
        ValueError: no such layer, a layer in two groups, or layers of different kinds.
    """
    if correspondence is None:
        return []
    if isinstance(correspondence, (str, Mapping)) or not isinstance(correspondence, Sequence):
        raise TypeError(
            "correspondence must be a list of mappings from task name to layer path, one for every group of layers, "
            f"got {type(correspondence).__name__}; write [{{'a': 'fc1', 'b': 'dense1'}}]"
        )
    tasks = {analysis.exported.task: at for at, analysis in enumerate(analyses)}
    taken: dict[tuple[int, str], int] = {}
    groups = []
    for at, given in enumerate(correspondence):
        if not isinstance(given, Mapping):
            raise TypeError(
                f"correspondence[{at}] must be a mapping from task name to layer path, got {type(given).__name__}"
            )
        group: dict[int, Layer] = {}
        for name in given:
            if name not in tasks:
                raise KeyError(f"correspondence[{at}] must name tasks among {list(tasks)}, got {name!r}")
        for name in (name for name in tasks if given.get(name) is not None):  # in the order of the tasks
            task = tasks[name]
            layer = group[task] = _layer(f"correspondence[{at}][{name!r}]", given[name], analyses[task])
            first = taken.setdefault((task, layer.path), at)
            if first != at:
                raise ValueError(
                    f"correspondence must name a layer once, got {layer.path!r} of task {name!r} in groups {first} "
                    f"and {at}; put all that answers to it into one mapping"
                )
        if not group:
            raise ValueError(f"correspondence[{at}] must name at least one layer, got {dict(given)}; leave it out")
        _check_form(at, group, analyses)
        groups.append(group)
    return groups


def regrouped(
    walked: Sequence[dict[int, Layer]], given: Sequence[dict[int, Layer]]
) -> list[tuple[dict[int, Layer], bool]]:
    """All groups, and for each whether it was given: the layers named there leave the groups the walk put them in."""
    named = {(task, layer.path) for group in given for task, layer in group.items()}
    left = [{task: layer for task, layer in m.items() if (task, layer.path) not in named} for m in walked]
    return [(members, False) for members in left if members] + [(members, True) for members in given]


def _layer(name: str, path: Any, analysis: Analysis) -> Layer:
    known = {layer.name: layer for layer in analysis.layers.values()}
    if path in known:
        return known[path]
    near = get_close_matches(str(path), known, 3) or list(known)[:8]
    raise ValueError(
        f"{name} must be the path of a linear layer or convolution that the network calls, got {path!r}; "
        f"there is {', '.join(map(repr, near)) or 'none'}"
    )


def _check_form(at: int, group: Mapping[int, Layer], analyses: Sequence[Analysis]) -> None:
    """Rows of layers of different kinds or kernels have columns that cannot be compared."""
    forms = {
        analyses[task].exported.task: (layer, (layer.kind, layer.kernel, layer.transposed, layer.groups > 1))
        for task, layer in group.items()
    }
    if len({form for _, form in forms.values()}) > 1:
        found = ", ".join(f"{task!r} {layer.name}: {_described(layer)}" for task, (layer, _) in forms.items())
        raise ValueError(
            f"correspondence[{at}] must pair layers of one kind and kernel, got {found}; "
            "pair others, or leave this group out"
        )


def _described(layer: Layer) -> str:
    kernel = " " + "x".join(map(str, layer.kernel)) if layer.kernel else ""
    groups = f" in {layer.groups} groups" if layer.groups > 1 else ""
    return f"{layer.kind}{kernel}{groups}"
