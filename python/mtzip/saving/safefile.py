"""A safetensors file whose every byte is accounted for: one JSON document in the header, and a checksum over all of it.

The layout is that of safetensors: length of the header (8 bytes, little endian), header in JSON, tensors. The header's
``__metadata__`` has one entry, ``mtzip``, a JSON document; its field ``sha256`` is the digest of the whole file with
these 64 characters set to zero. So no byte can change unnoticed, and any safetensors reader still gets the tensors.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

KEY = "mtzip"
_NO_DIGEST = "0" * 64
_MARK = rb"\"sha256\":\""  # in front of the digest: JSON inside a string of JSON
_LONGEST_HEADER = 100_000_000  # as safetensors has it

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def write(path: str | os.PathLike, tensors: Mapping[str, Tensor], document: Mapping[str, Any]) -> None:
    """Writes tensors and a JSON document; the file is there whole or not at all, and the same for the same input.

    Args:
        path: the file; what was there is replaced once the new one is complete.
        tensors: name to tensor, of any device.
        document: what JSON can hold; ``sha256`` is added.

    Raises:
        OSError: the file cannot be written.
        TypeError: a tensor of a type the format does not have.
    """
    path = Path(path)
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES.values():
            raise TypeError(f"{name} must be of a type safetensors files have, got {tensor.dtype}")
    text = json.dumps({**document, "sha256": _NO_DIGEST}, separators=(",", ":"), allow_nan=False)
    plain = dict(_separate(tensors))
    # A folder, for the library writes temporary files of its own, which a killed process would leave beside ours.
    folder = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    part = folder / path.name
    try:
        try:
            folder.mkdir()
            save_file(plain, part, {KEY: text})
        except (SafetensorError, OSError) as error:  # a folder that is not there, a full disk
            raise OSError(f"{path} cannot be written: {error}") from error
        with open(part, "r+b") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0)
            header = file.read(int.from_bytes(file.read(8), "little"))
            file.seek(8 + header.index(_MARK + _NO_DIGEST.encode()) + len(_MARK))
            file.write(digest.encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _separate(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The tensors on the CPU, contiguous, none of them a view of another."""
    seen: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        storage = plain.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != plain.nbytes:
            plain = plain.clone()
        seen.add(plain.untyped_storage().data_ptr())
        yield name, plain


def read(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and document of a file that :func:`write` wrote; executes nothing that is in it.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is another file, truncated or altered; nothing else, whatever its bytes are.
    """
    data, start = _bytes(path)
    try:
        entries = _json(bytes(data[8:start]).decode("utf-8"), "header")
        metadata = entries.pop("__metadata__", None)
        if not isinstance(metadata, dict) or not isinstance(metadata.get(KEY), str):
            raise ValueError("it must be a file of mtzip.save, got another safetensors file")
        document = _json(metadata[KEY], "document")
        _check_digest(data, start, document.pop("sha256", None))
        return dict(_tensors(entries, memoryview(data)[start:])), document
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{os.fspath(path)}: {error}") from error


def _bytes(path: str | os.PathLike) -> tuple[bytearray, int]:
    """The file, and where its tensors begin."""
    name = os.fspath(path)
    if not stat.S_ISREG(os.stat(path).st_mode) and not os.path.isdir(path):
        raise OSError(f"{name} must be a regular file, got a device, pipe or socket")
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 10 or not 2 <= length <= min(size - 8, _LONGEST_HEADER):
            raise ValueError(
                f"{name}: it must be a file of mtzip.save, got {size} bytes that begin with a header of {length}; it "
                "is of another kind or truncated"
            )
        file.seek(0)
        data = bytearray(size)
        if file.readinto(data) != size:
            raise ValueError(f"{name}: it must be whole, got fewer bytes than its size; it changed while being read")
    return data, 8 + length


def _json(text: str, what: str) -> dict[str, Any]:
    """A JSON object without duplicate keys, NaN or Infinity."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError(f"its {what} has a key twice")
        return found

    def constant(name: str) -> None:
        raise ValueError(f"its {what} has a {name}")

    try:
        value = json.loads(text, object_pairs_hook=unique, parse_constant=constant)
    except json.JSONDecodeError as error:
        raise ValueError(f"its {what} must be JSON, got {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"its {what} must be a JSON object, got {type(value).__name__}")
    return value


def _check_digest(data: bytearray, start: int, digest: Any) -> None:
    if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
        raise ValueError("its sha256 must be 64 hexadecimal digits; it is damaged")
    at = data.find(_MARK + digest.encode(), 0, start) + len(_MARK)
    if at < len(_MARK):
        raise ValueError("its sha256 must stand in the header as it is; it is damaged")
    hashed = hashlib.sha256(memoryview(data)[:at])
    hashed.update(_NO_DIGEST.encode())
    hashed.update(memoryview(data)[at + 64 :])
    if hashed.hexdigest() != digest:
        raise ValueError(f"its sha256 must be {digest}, got {hashed.hexdigest()}; it is damaged or was altered")


def _tensors(entries: Mapping[str, Any], data: memoryview) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of every entry; they must fill the data without gap or overlap."""
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: _offsets(*item)):
        if entry.keys() != {"dtype", "shape", "data_offsets"} or not isinstance(entry["dtype"], str):
            raise ValueError(f"tensor {name!r} must have dtype, shape and data_offsets, got {', '.join(entry)}")
        dtype, shape = _DTYPES.get(entry["dtype"]), entry["shape"]
        if dtype is None:
            raise ValueError(f"tensor {name!r} must be of a type among {', '.join(_DTYPES)}, got {entry['dtype']!r}")
        if not isinstance(shape, list) or not all(_is_size(size) for size in shape) or len(shape) > 64:
            raise ValueError(f"tensor {name!r} must have a list of sizes for its shape, got {str(shape)[:60]}")
        start, stop = _offsets(name, entry)
        if start != end or stop - start != math.prod(shape) * dtype.itemsize or stop > len(data):
            raise ValueError(
                f"tensor {name!r} of {entry['dtype']} {shape} must lie right behind the one before it, at byte {end} "
                f"of {len(data)}, got bytes {start} to {stop}"
            )
        end = stop
        yield name, _tensor(name, data[start:stop], dtype, shape)
    if end != len(data):
        raise ValueError(f"its tensors must fill the {len(data)} bytes behind the header, got {end}")


def _offsets(name: str, entry: Any) -> tuple[int, int]:
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(offset) for offset in offsets):
        raise ValueError(f"tensor {name!r} must have two data_offsets, got {str(offsets)[:60]}")
    return offsets[0], offsets[1]


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _tensor(name: str, data: memoryview, dtype: torch.dtype, shape: list[int]) -> Tensor:
    """A tensor with memory of its own."""
    if math.prod(shape) == 0:
        try:
            return torch.empty(shape, dtype=dtype)
        except RuntimeError as error:  # the product of the sizes that are not zero is too large
            raise ValueError(f"tensor {name!r} cannot have the shape {shape}") from error
    raw = torch.frombuffer(data, dtype=torch.uint8).clone()
    if dtype == torch.bool and raw.max() > 1:
        raise ValueError(f"tensor {name!r} must have bytes 0 and 1 for its type BOOL, got {int(raw.max())}")
    return raw.view(dtype).reshape(shape)
