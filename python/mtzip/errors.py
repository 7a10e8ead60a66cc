"""Errors say name, expected, got and remedy; the sentences that several files need are made here."""

from __future__ import annotations

from collections.abc import Iterable


class ZipError(RuntimeError):
    """A network could not be zipped; the message says where and what to do."""


def unknown_task(name: str, got: object, tasks: Iterable[str]) -> KeyError:
    """KeyError for a task that is not one of ``tasks``."""
    return KeyError(f"{name} must be one of {', '.join(map(repr, tasks))}, got {got!r}")


def first_line(error: Exception) -> str:
    """An exception of a library in one line: its class, and the first line that says anything."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
