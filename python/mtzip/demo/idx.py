"""Reads image classification sets in the idx format of MNIST, Fashion-MNIST, KMNIST and notMNIST, gzipped or not.

A file is a big-endian header (two zero bytes, the element type, the number of dimensions, then each size as uint32)
followed by the elements. Only unsigned bytes occur in these sets, so only they are read.
"""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

UNSIGNED_BYTE = 0x08
FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


def read_idx(path: str | Path, dimensions: int | None = None) -> np.ndarray:
    """The array of an idx file.

    Args:
        path: the file; one that starts with gzip's magic number is decompressed.
        dimensions: number of dimensions it must have, any if None.

    Returns:
        uint8 array of the sizes in the header, writable.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not an idx file of unsigned bytes, is damaged, or has another number of dimensions.
    """
    data = Path(path).read_bytes()
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path} must be a whole gzip file, got a damaged one: {error}") from error
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] != UNSIGNED_BYTE:
        raise ValueError(f"{path} must start with the idx magic 00 00 08, got {data[:3].hex(' ') or 'an empty file'}")
    rank = data[3]
    if dimensions is not None and rank != dimensions:
        raise ValueError(f"{path} must have {dimensions} dimensions, got {rank}")
    start = 4 + 4 * rank
    if len(data) < start:
        raise ValueError(f"{path} must have a header of {start} bytes, got a file of {len(data)}")
    shape = tuple(int(size) for size in np.frombuffer(data, ">u4", rank, 4))
    if len(data) - start != math.prod(shape):
        raise ValueError(f"{path} must hold {math.prod(shape)} bytes for its shape {shape}, got {len(data) - start}")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape).copy()


def find_idx(folder: str | Path, name: str) -> Path:
    """``folder/name``, gzipped or not.

    Raises:
        FileNotFoundError: neither is there.
    """
    for candidate in (Path(folder) / f"{name}.gz", Path(folder) / name):
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(f"{folder} must hold {name}.gz or {name}, got neither; put the original files there")


def load_idx(folder: str | Path, part: str) -> tuple[Tensor, Tensor]:
    """Images and labels of one part of a set.

    Args:
        folder: holds the files under their original names.
        part: "train" or "test".

    Returns:
        float32 images [n, 1, height, width] in 0 ... 1 and int64 labels [n].

    Raises:
        OSError: a file is missing or cannot be read.
        ValueError: a file is damaged, or images and labels do not belong together.
    """
    if part not in FILES:
        raise ValueError(f"part must be one of {', '.join(map(repr, FILES))}, got {part!r}")
    image_file, label_file = (find_idx(folder, name) for name in FILES[part])
    images, labels = read_idx(image_file, 3), read_idx(label_file, 1)
    if len(images) != len(labels):
        raise ValueError(f"{label_file} must hold a label for each of {len(images)} images, got {len(labels)}")
    return torch.from_numpy(images).float().div_(255).unsqueeze(1), torch.from_numpy(labels).long()
