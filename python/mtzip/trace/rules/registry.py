"""The table of rules, and how one is found for a node."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ..axes import Dim

if TYPE_CHECKING:
    from ..analysis import Analysis

Rule = Callable[["Analysis", fx.Node], list[Dim] | list[list[Dim]]]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers a rule for ATen operators by name, overloads together."""

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
        return function

    return register


def name_of(node: fx.Node) -> str:
    """``conv2d`` for aten.conv2d.default; the printed target for anything that is not an ATen operator."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[-1]
    return getattr(target, "__name__", str(target))


def where(node: fx.Node) -> str:
    """Operator and node, for reasons."""
    return f"{name_of(node)} ({node.name})"


def find(node: fx.Node) -> Rule | None:
    """The rule for a node: by name, or the element-wise one for every operator that torch tags as such."""
    from .elementwise import pointwise

    named = RULES.get(name_of(node))
    if named is None and isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags:
        return pointwise
    return named


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument given by position or by name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def several(argument: Any, count: int) -> list[int]:
    """Dimensions as a list of numbers from 0: one, several, or all where none are given."""
    if argument is None or argument == []:
        return list(range(count))
    return [at % count for at in ([argument] if isinstance(argument, int) else argument)]
