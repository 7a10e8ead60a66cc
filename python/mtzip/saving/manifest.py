"""What a file of :func:`mtzip.save` says about its tensors: tasks, layouts of the leaves, what is shared."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..inputs import Batch
from ..network import example
from ..network.layout import Layout, totals
from ..network.leaf import SharedLayer, leaves
from ..network.leaf import leaf_class as class_of_leaf
from ..network.zipped import ZippedNetwork
from ..reports import schema
from ..reports.report import Report

FORMAT, VERSION = "mtzip", 1


@dataclass(frozen=True)
class Manifest:
    """Everything but the tensors.

    Args:
        tasks: names, in their order: layouts speak of tasks by number.
        networks: task to the name of its network's class, for readers; it is never imported.
        layers: task to path to (name of the plain class, layout) of every leaf.
        shared: key of a shared tensor to the ``networks.*`` keys it stands for.
        aliases: key of a tensor that one network has at several places to the key it is stored under.
        report: what the zip did, None for a network put together otherwise.
        examples: task to shapes and types of an example input, as tensors on the meta device.
        outputs: task to the name or index of what of its output counts.
        versions: of mtzip and torch that wrote the file.
        orders: task to path of a module to the original's neuron that each channel of its output is; files from
            before they were kept have none.
        keep_zeros: whether retraining keeps the zeros of the weights.
    """

    tasks: tuple[str, ...]
    networks: dict[str, str]
    layers: dict[str, dict[str, tuple[str, Layout]]]
    shared: dict[str, tuple[str, ...]]
    aliases: dict[str, str]
    report: Report | None
    examples: dict[str, Batch]
    outputs: dict[str, str | int]
    versions: dict[str, str]
    orders: dict[str, dict[str, tuple[int, ...]]]
    keep_zeros: bool

    @classmethod
    def of(cls, zipped: ZippedNetwork) -> Manifest:
        """The manifest of a zipped network."""
        layers = {
            task: {path: (leaf.plain.__name__, leaf.layout) for path, leaf in leaves(zipped[task])} for task in zipped
        }
        return cls(
            zipped.tasks,
            {task: f"{type(zipped[task]).__module__}.{type(zipped[task]).__qualname__}" for task in zipped},
            layers,
            {key: tuple(places) for key, places in zipped.shared_keys().items()},
            _aliases(zipped),
            zipped.report,
            {task: batch for task, batch in zipped.example_inputs.items() if task in zipped},
            {task: select for task, select in zipped.outputs.items() if not callable(select)},
            {"mtzip": _version(), "torch": torch.__version__},
            {task: {at: tuple(o.tolist()) for at, o in zipped.orders.get(task, {}).items()} for task in zipped},
            zipped.keep_zeros,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers."""
        layers = {
            task: {path: {"class": name, "layout": layout.to_dict()} for path, (name, layout) in paths.items()}
            for task, paths in self.layers.items()
        }
        return {
            "format": FORMAT,
            "version": VERSION,
            "versions": self.versions,
            "tasks": list(self.tasks),
            "networks": self.networks,
            "layers": layers,
            "shared": {key: list(places) for key, places in self.shared.items()},
            "aliases": self.aliases,
            "report": None if self.report is None else self.report.to_dict(),
            "examples": {task: form for task, batch in self.examples.items() if (form := example.to_dict(batch))},
            "outputs": self.outputs,
            "orders": {task: {at: list(order) for at, order in paths.items()} for task, paths in self.orders.items()},
            "keep_zeros": self.keep_zeros,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Manifest:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: another format or version; a field missing, unknown, of the wrong kind, or against another.
        """
        if data.get("format") != FORMAT:
            raise ValueError(f"the manifest's format must be {FORMAT!r}, got {str(data.get('format'))[:60]!r}")
        if data.get("version") != VERSION:
            got = str(data.get("version"))[:60]
            raise ValueError(f"the manifest's version must be {VERSION}, got {got}; it was written by another mtzip")
        # files from before there were these have none
        values = _MANIFEST({"outputs": {}, "orders": {}, "keep_zeros": False, **data}, "manifest")
        del values["format"], values["version"]
        tasks = values["tasks"]
        for name in ("networks", "layers"):
            if set(values[name]) != set(tasks) or len(set(tasks)) < len(tasks):
                raise ValueError(f"manifest.{name} must have the tasks {list(tasks)}, got {list(values[name])}")
        for number, task in enumerate(tasks):
            for path, leaf in values["layers"][task].items():
                where = f"the layout of layer {path!r} of task {task!r}"
                layout = Layout.from_dict(leaf["layout"])
                check_layout(layout, number, len(tasks), where)
                values["layers"][task][path] = (leaf["class"], layout)
        if values["report"] is not None:
            values["report"] = Report.from_dict(values["report"])
        for name in ("examples", "outputs", "orders"):
            if spare := [task for task in values[name] if task not in tasks]:
                raise ValueError(f"manifest.{name} must be for the tasks {list(tasks)}, got {spare[0]!r}")
        values["examples"] = {
            task: example.from_dict(form, f"manifest.examples[{task!r}]") for task, form in values["examples"].items()
        }
        return cls(**values)


def check_layout(layout: Layout, task: int, tasks: int, where: str) -> None:
    """ValueError for a layout that no layer of task number ``task`` of ``tasks`` can have."""
    if layout.task != task:
        raise ValueError(f"{where} must be of task {task}, got {layout.task}")
    for name, runs in (("rows", layout.rows), ("columns", layout.columns), ("bias", layout.bias)):
        for run in runs or ():
            ordered = list(run.tasks) == sorted(set(run.tasks))
            if not ordered or task not in run.tasks or run.tasks[-1] >= tasks or run.size < 1:
                raise ValueError(
                    f"{where}: runs of {name} must have at least one neuron and the tasks that share it in ascending "
                    f"order, {task} among them, got {run.size} neurons of {list(run.tasks)}"
                )
        if runs is not None and not runs:
            raise ValueError(f"{where} must have at least one run of {name}, got none")
        if any(run.tasks == following.tasks for run, following in zip(runs or (), (runs or ())[1:], strict=False)):
            raise ValueError(f"{where} must have neighbouring runs of {name} of different tasks, got two alike")
    rows = sum(run.size for run in layout.rows)
    if layout.bias is not None and sum(run.size for run in layout.bias) != rows:
        raise ValueError(f"{where} must have a bias for each of its {rows} rows, got another number")
    shared = sum(size for tasks, size in totals(layout.rows).items() if len(tasks) > 1)
    if layout.scaled not in (0, shared):
        raise ValueError(f"{where} must scale none or all of its {shared} shared rows, got {layout.scaled}")


def leaf_class(layer: nn.Module | None, name: str, layout: Layout, where: str) -> type[SharedLayer]:
    """The leaf class that can take the place of ``layer``.

    Raises:
        ValueError: the layer is missing, of another class, or of another size than the file has; says which.
    """
    if type(layer).__name__ != name or layer is None:
        got = "none" if layer is None else type(layer).__name__
        raise ValueError(f"{where} must be an nn.{name} as in the file, got {got}; pass a network of the class saved")
    weight = layer._parameters.get(layout.weight)
    if weight is None or weight.dim() < 2 or layout.bias_name not in layer._parameters:
        raise ValueError(
            f"{where} must have the parameters {layout.names} as in the file, got {list(layer._parameters)}"
        )
    if layout.transposed:
        weight = weight.transpose(0, 1)
    expected = sum(run.size for run in layout.rows), sum(run.size for run in layout.columns)
    if expected != tuple(weight.shape[:2]):
        wanted, got = (f"{outputs} outputs and {inputs} inputs" for outputs, inputs in (expected, weight.shape[:2]))
        raise ValueError(
            f"{where} must have {wanted} as in the file, got {got}; pass a network made with the arguments of the one "
            "saved"
        )
    return class_of_leaf(type(layer), layout.names)


def _aliases(zipped: ZippedNetwork) -> dict[str, str]:
    """Tensors that one network has at several places: every further key to the first."""
    first: dict[int, str] = {}
    found: dict[str, str] = {}
    for key, tensor in zipped.state_dict(keep_vars=True).items():
        if first.setdefault(id(tensor), key) != key:
            found[key] = first[id(tensor)]
    return found


def _version() -> str:
    try:
        return importlib.metadata.version("mtzip")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _run(value: Any, where: str) -> tuple[tuple[int, ...], int]:
    pair = value if isinstance(value, (list, tuple)) else ()
    if len(pair) != 2:
        raise ValueError(f"{where} must be a pair of tasks and a size, got {str(value)[:60]}")
    tasks = schema.listing(schema.count)(pair[0], f"{where}[0]")
    if not tasks:
        raise ValueError(f"{where}[0] must name at least one task, got none")
    return tasks, schema.count(pair[1], f"{where}[1]")


def _order(value: Any, where: str) -> tuple[int, ...]:
    order = schema.listing(schema.count)(value, where)
    if sorted(order) != list(range(len(order))):
        raise ValueError(f"{where} must have every channel from 0 to {len(order) - 1} once, got something else")
    return order


_RUNS = schema.listing(_run)
_LAYOUT = schema.fields(
    {
        "task": schema.count,
        "rows": _RUNS,
        "columns": _RUNS,
        "bias": schema.optional(_RUNS),
        "scaled": schema.count,
        "weight": schema.text,
        "bias_name": schema.text,
        "transposed": schema.flag,
    }
)
_TEXTS = schema.mapping(schema.text)
_MANIFEST = schema.fields(
    {
        "format": schema.text,
        "version": schema.count,
        "versions": _TEXTS,
        "tasks": schema.listing(schema.text),
        "networks": _TEXTS,
        "layers": schema.mapping(schema.mapping(schema.fields({"class": schema.text, "layout": _LAYOUT}))),
        "shared": schema.mapping(schema.listing(schema.text)),
        "aliases": _TEXTS,
        "report": lambda value, where: value,  # Report.from_dict looks at it
        "examples": schema.mapping(lambda value, where: value),  # example.from_dict looks at them
        "outputs": schema.mapping(schema.name_or_index),
        "orders": schema.mapping(schema.mapping(_order)),
        "keep_zeros": schema.flag,
    }
)
