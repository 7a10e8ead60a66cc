"""Checks of data that comes out of a file: every field there, nothing else, each of its kind.

A check takes a value and the place it is at, returns the value as it is to be used, and raises ValueError otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

Check = Callable[[Any, str], Any]


def text(value: Any, where: str) -> str:
    """A string."""
    if not isinstance(value, str):
        raise _wrong(where, "a string", value)
    return value


def count(value: Any, where: str) -> int:
    """An integer >= 0 that a tensor's dimension may be."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
        raise _wrong(where, "an integer >= 0", value)
    return value


def name_or_index(value: Any, where: str) -> str | int:
    """A string or an integer."""
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise _wrong(where, "a name or an index", value)
    return value


def flag(value: Any, where: str) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise _wrong(where, "true or false", value)
    return value


def number(value: Any, where: str) -> float:
    """A number; None stands for one that is not finite, which JSON does not have."""
    if value is None:
        return math.nan
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) < 1e300:
        raise _wrong(where, "a number", value)
    return float(value)


def optional(check: Check) -> Check:
    """None, or what ``check`` takes."""
    return lambda value, where: None if value is None else check(value, where)


def listing(check: Check) -> Check:
    """A list of what ``check`` takes, as a tuple."""

    def checked(value: Any, where: str) -> tuple[Any, ...]:
        if not isinstance(value, (list, tuple)):
            raise _wrong(where, "a list", value)
        return tuple(check(item, f"{where}[{index}]") for index, item in enumerate(value))

    return checked


def mapping(check: Check) -> Check:
    """A mapping from strings to what ``check`` takes."""

    def checked(value: Any, where: str) -> dict[str, Any]:
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise _wrong(where, "a mapping", value)
        return {key: check(item, f"{where}[{key!r}]") for key, item in value.items()}

    return checked


def fields(checks: Mapping[str, Check], defaults: Mapping[str, Any] | None = None) -> Check:
    """A mapping with exactly the keys of ``checks``; those of ``defaults``, which earlier files have not, may miss."""

    def checked(value: Any, where: str) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            raise _wrong(where, "a mapping", value)
        value = {**(defaults or {}), **value}
        if value.keys() != checks.keys():
            odd = [f"no {key!r}" for key in checks if key not in value]
            odd += [f"an unknown {key!r}" for key in value if key not in checks]
            raise ValueError(f"{where} must have the fields {', '.join(checks)}, got {', '.join(odd)}")
        return {key: check(value[key], f"{where}.{key}") for key, check in checks.items()}

    return checked


def _wrong(where: str, expected: str, value: Any) -> ValueError:
    shown = repr(value)
    return ValueError(f"{where} must be {expected}, got {shown if len(shown) < 60 else type(value).__name__}")
