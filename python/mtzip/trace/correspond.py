"""Which layer of one network answers to which of another: the graphs walked in parallel from the inputs.

Every layer gets a key made of its kind, its kernel and the keys of what it reads, so layers with equal keys sit at the
same place of their graphs. Operators with one input (activations, pooling, normalisation, reshaping) are looked
through: a class and a Sequential, or a ReLU and a GELU, are the same graph; another depth is not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import fx

from . import rules
from .analysis import Analysis, Layer, Note
from .axes import Dim, Segment
from .given import Given, given_groups, regrouped
from .order import ordered

#: Operators whose operands may change places: ``x + f(x)`` is ``f(x) + x``.
_SYMMETRIC = ("add", "mul", "maximum", "minimum")


@dataclass
class LayerGroup:
    """Layers of several tasks that answer to each other: task index to layer."""

    name: str
    layers: dict[int, Layer]


@dataclass
class AxisGroup:
    """Axes of several tasks whose neurons may be shared: task index to representative atom.

    Args:
        name: path of the first writer in the first task; with the rows of it, where its rows lie on several axes
            ("layer2.0.conv2[24:32]").
        atoms: task index to atom.
        sizes: task index to number of neurons.
        writers: groups of layers whose rows lie on it, in graph order.
    """

    name: str
    atoms: dict[int, int]
    sizes: dict[int, int]
    writers: list[LayerGroup]


@dataclass
class Correspondence:
    """Layer groups in graph order, the axes that can be shared, and what stays private, as (task index, note)."""

    layers: list[LayerGroup]
    axes: list[AxisGroup]
    notes: list[tuple[int, Note]] = field(default_factory=list)

    def axis_of(self, task: int, atom: int) -> AxisGroup | None:
        """The group that an atom of a task belongs to."""
        return next((group for group in self.axes if group.atoms.get(task) == atom), None)


def correspond(analyses: Sequence[Analysis], given: Sequence[Given] | None = None) -> Correspondence:
    """Finds the layers and axes of several networks that answer to each other.

    Args:
        analyses: of the networks.
        given: groups of layers that the user says answer to each other, task name to path; the walk finds the rest,
            going on behind them.

    Raises:
        TypeError, KeyError, ValueError: ``given`` is not as described, or its groups cross each other.
    """
    wanted = given_groups(given, analyses)
    shared: dict[tuple, int] = {}
    keyed: dict[int, dict[int, Layer]] = {}
    for task, analysis in enumerate(analyses):
        pairs = {group[task].path: at for at, group in enumerate(wanted) if task in group and len(group) > 1}
        for key, layer in _keys(analysis, shared, pairs).items():
            keyed.setdefault(key, {})[task] = layer
    notes: list[tuple[int, Note]] = []
    grouped = regrouped(list(keyed.values()), wanted)
    for members, is_given in grouped:
        if len(members) == 1 and len(analyses) > 1:
            task, layer = next(iter(members.items()))
            reason = "correspondence= leaves it alone" if is_given else "no layer of the other networks answers to it"
            notes.append((task, Note(layer.name, reason)))
    groups = [LayerGroup(_name(members), members) for members in ordered(grouped, analyses, notes)]
    axes = _axes(groups, analyses, notes)
    for task, analysis in enumerate(analyses):
        notes += [(task, note) for note in analysis.notes]
    return Correspondence(groups, axes, notes)


def _name(members: Mapping[int, Layer]) -> str:
    return members[min(members)].name


def _keys(analysis: Analysis, shared: dict[tuple, int], given: Mapping[str, int]) -> dict[int, Layer]:
    """Key of every layer of one network.

    Args:
        analysis: of the network.
        shared: numbers the keys for all networks.
        given: path of a layer to the group that the user put it in; the walk goes on from there.
    """
    layers = {layer.node.name: layer for layer in analysis.layers.values()}
    of_node: dict[str, int] = {}
    seen: dict[tuple, int] = {}
    result: dict[int, Layer] = {}

    def number(key: tuple) -> int:
        return shared.setdefault(key, len(shared))

    for node in analysis.exported.graph.nodes:
        if node.op == "placeholder" and node.name in analysis.exported.inputs:
            of_node[node.name] = number(("input", analysis.exported.inputs.index(node.name)))
            continue
        sources = _sources(node, analysis, of_node)
        if node.name in analysis.calls:
            key = (*analysis.calls[node.name], tuple(sources))
            seen[key] = seen.get(key, 0) + 1  # two layers on the same input are told apart by their order
            of_node[node.name] = number((*key, seen[key]))
            if node.name in layers:
                path = layers[node.name].path
                if path in given:
                    of_node[node.name] = number(("given", given[path]))
                result[of_node[node.name]] = layers[node.name]
        elif len(set(sources)) == 1:
            of_node[node.name] = sources[0]
        elif sources:
            name = rules.name_of(node).rstrip("_")
            ordered = sorted(sources) if name in _SYMMETRIC else sources
            of_node[node.name] = number((name, tuple(ordered)))
    return result


def _sources(node: fx.Node, analysis: Analysis, of_node: Mapping[str, int]) -> list[int]:
    """Keys of the tensors a node reads, one or several to an argument; sizes and parameters left out."""
    return [
        of_node[arg.name]
        for arg in node.all_input_nodes
        if arg.name in of_node and (analysis.shape(arg) is not None or isinstance(arg.meta.get("val"), (tuple, list)))
    ]


def _axes(groups: list[LayerGroup], analyses: Sequence[Analysis], notes) -> list[AxisGroup]:
    """Axes that writers of several tasks have in common; one that cannot be reordered is left out with its reason.

    The rows of a layer may lie on several axes, one segment behind the other: those correspond position by position.
    """
    found: list[AxisGroup] = []
    owner: dict[tuple[int, int], AxisGroup] = {}

    def note(task: int, layer: Layer, reason: str) -> None:
        notes.append((task, Note(layer.name, reason)))

    for group in groups:
        rows = _alike(group, analyses, note)
        if not rows:
            continue
        first = next(iter(rows))
        positions = range(len(rows[first]))
        shared: dict[int, int] = dict.fromkeys(rows, 0)  # number of segments of each task that lie on a shared axis
        reasons: dict[int, str] = {}
        for at in positions:
            usable = {}
            for task, segments in rows.items():
                atom = segments[at].atom
                pinned = analyses[task].axes[atom].pinned
                if pinned is None:
                    usable[task] = atom
                else:
                    reasons.setdefault(task, pinned)
            axis = next((owner[key] for key in usable.items() if key in owner), None)
            if axis is None:
                if len(usable) < 2:
                    for task in usable:
                        reasons.setdefault(task, "its counterpart cannot be shared")
                    continue
                name = group.name if len(positions) == 1 else _piece(group.name, analyses[first], rows[first], at)
                axis = AxisGroup(name, {}, {}, [])
                found.append(axis)
            for task, atom in usable.items():
                current = owner.get((task, atom))
                if current is axis or (current is None and task not in axis.atoms):
                    axis.atoms[task] = atom
                    axis.sizes[task] = analyses[task].axes[atom].size
                    owner[task, atom] = axis
                    shared[task] += 1
                else:
                    reasons.setdefault(task, "its axis is tied to another axis than in the other networks")
            members = {t: group.layers[t] for t in usable if axis.atoms.get(t) == usable[t]}
            if members and not any(writers.name == group.name for writers in axis.writers):
                axis.writers.append(LayerGroup(group.name, members))
        for task, reason in reasons.items():
            part = (
                ""
                if not shared[task]
                else f"{shared[task]} of {len(positions)} parts of its rows are shared; of the rest: "
            )
            note(task, group.layers[task], part + reason)
    return [axis for axis in found if len(axis.atoms) > 1]


def _alike(group: LayerGroup, analyses: Sequence[Analysis], note) -> dict[int, Dim]:
    """Task to the segments of its rows, for tasks whose rows can be shared and have the same structure."""
    if len(group.layers) < 2:
        return {}
    rows: dict[int, Dim] = {}
    for task, layer in group.layers.items():
        if layer.private is not None:
            note(task, layer, layer.private)
        else:
            rows[task] = analyses[task].axes.resolve(layer.rows)
    structures = {task: tuple((s.outer, s.inner) for s in dim) for task, dim in rows.items()}
    counts = Counter(structures.values())
    for task, structure in structures.items():
        if structure != max(counts, key=counts.__getitem__):
            note(task, group.layers[task], "its rows lie on axes of another structure than in the other networks")
            del rows[task]
    if len(rows) == 1:
        task = rows.popitem()[0]
        note(task, group.layers[task], "its counterpart cannot be shared")
    return rows


def _piece(name: str, analysis: Analysis, segments: Sequence[Segment], at: int) -> str:
    """Name of one of several axes that a layer's rows lie on: which rows those are in the first task."""
    start = sum(analysis.axes.length(segment) for segment in segments[:at])
    return f"{name}[{start}:{start + analysis.axes.length(segments[at])}]"
