"""A zipped network's file in words: its tasks, what they share, sizes, and the report of the zip."""

from __future__ import annotations

import os
from collections.abc import Iterable

from torch import Tensor

from . import safefile
from .manifest import Manifest
from .report_table import columns, table


def describe(path: str | os.PathLike) -> str:
    """What is in a file of :func:`mtzip.save`.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is another file, damaged or altered.
    """
    tensors, document = safefile.read(path)
    try:
        manifest = Manifest.from_dict(document)
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)}: {error}") from error
    versions = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    parts = [
        f"{os.fspath(path)}: {os.path.getsize(path):,} bytes, {len(tensors):,} tensors, written by {versions}",
        _sizes(manifest, tensors),
    ]
    if manifest.report is not None:
        parts.append(table(manifest.report))
    return "\n\n".join(parts)


def _sizes(manifest: Manifest, tensors: dict[str, Tensor]) -> str:
    rows = [["stored", "network", "tensors", "values", "bytes"]]
    shared = [tensor for key, tensor in tensors.items() if key in manifest.shared]
    rows.append(["shared", "", *_counts(shared)])
    for task in manifest.tasks:
        own = [tensor for key, tensor in tensors.items() if key.startswith(f"networks.{task}.")]
        rows.append([task, manifest.networks[task], *_counts(own)])
    rows.append(["in all", "", *_counts(tensors.values())])
    return columns(rows, ruled=True)


def _counts(tensors: Iterable[Tensor]) -> list[str]:
    kept = list(tensors)
    values = sum(tensor.numel() for tensor in kept)
    return [f"{len(kept):,}", f"{values:,}", f"{sum(tensor.nbytes for tensor in kept):,}"]
