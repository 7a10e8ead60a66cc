"""A zipped network's file in words, or as a page: its tasks, what they share, sizes, and the report of the zip."""

from __future__ import annotations

import os
from collections.abc import Iterable

from torch import Tensor

from .reports.page import Stored, page
from .reports.report import Report
from .reports.table import columns, table
from .saving import safefile
from .saving.manifest import Manifest


def describe(path: str | os.PathLike) -> str:
    """What is in a file of :func:`mtzip.save`.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is another file, damaged or altered.
    """
    manifest, stored = _read(path)
    versions = ", ".join(f"{name} {version}" for name, version in stored.versions.items())
    tensors = sum(row[2] for row in stored.rows)
    parts = [f"{stored.file}: {stored.bytes:,} bytes, {tensors:,} tensors, written by {versions}", _sizes(stored)]
    if manifest.report is not None:
        parts.append(table(manifest.report))
    return "\n\n".join(parts)


def describe_html(path: str | os.PathLike) -> str:
    """The same as a page for a browser.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is another file, damaged or altered.
    """
    manifest, stored = _read(path)
    return page(manifest.report or Report(manifest.tasks, "unknown"), stored=stored)


def _read(path: str | os.PathLike) -> tuple[Manifest, Stored]:
    tensors, document = safefile.read(path)
    try:
        manifest = Manifest.from_dict(document)
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)}: {error}") from error
    rows = [("shared", "", *_counts(tensor for key, tensor in tensors.items() if key in manifest.shared))]
    for task in manifest.tasks:
        own = _counts(tensor for key, tensor in tensors.items() if key.startswith(f"networks.{task}."))
        rows.append((task, manifest.networks[task], *own))
    return manifest, Stored(os.fspath(path), os.path.getsize(path), tuple(rows), manifest.versions)


def _sizes(stored: Stored) -> str:
    totals = [sum(row[at] for row in stored.rows) for at in (2, 3, 4)]
    rows = [("stored", "network", "tensors", "values", "bytes")]
    rows += [(what, kind, *(f"{x:,}" for x in counts)) for what, kind, *counts in stored.rows]
    return columns([*rows, ("in all", "", *(f"{x:,}" for x in totals))], ruled=True)


def _counts(tensors: Iterable[Tensor]) -> tuple[int, int, int]:
    """Tensors, values and bytes."""
    kept = list(tensors)
    return len(kept), sum(tensor.numel() for tensor in kept), sum(tensor.nbytes for tensor in kept)
