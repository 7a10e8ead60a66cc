"""Real image sets for benchmarks and tests, read from the folder of shared files.

That folder is ``$MTZ_SHARED``, or ``../shared`` beside the repository. Every loader returns float32 images
[n, channels, height, width] in 0 ... 1 (:func:`normalised` does the rest) and int64 labels [n]. Raised by all of them:
OSError for a file that is missing or cannot be read, ValueError for one that is damaged.
"""

from __future__ import annotations

import io
import lzma
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mtzip.demo.idx import load_idx
from mtzip.demo.tasks import Task

Loader = Callable[[str], tuple[Tensor, Tensor]]  #: "train" or "test" to images and labels

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
FASHION = ((0.22,) * 3, (0.33,) * 3)  # these four with the border of coloured
OMNIGLOT = ((0.06,) * 3, (0.21,) * 3)
KMNIST = ((0.14,) * 3, (0.31,) * 3)
NOTMNIST = ((0.33,) * 3, (0.44,) * 3)
GTSRB = ((0.34, 0.31, 0.32), (0.28, 0.27, 0.28))
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def shared_folder() -> Path:
    """The folder of shared data and weights, whether or not it is there."""
    if chosen := os.environ.get("MTZ_SHARED"):
        return Path(chosen)
    return Path(__file__).resolve().parents[2] / "shared"


def has_shared() -> bool:
    """Whether the shared data and weights are there."""
    return (shared_folder() / "data").is_dir() and (shared_folder() / "weights").is_dir()


def data_folder(name: str) -> Path:
    """The folder of one data set.

    Raises:
        FileNotFoundError: it is not there.
    """
    folder = shared_folder() / "data" / name
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} must be a folder, got nothing there; set MTZ_SHARED to the shared files")
    return folder


def normalised(images: Tensor, statistics: tuple[Sequence[float], Sequence[float]]) -> Tensor:
    """``(images - mean) / std`` a channel, with statistics (means, stds)."""
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in statistics)
    return (images - mean) / std


def mnist(part: str) -> tuple[Tensor, Tensor]:
    """60,000 and 10,000 digits of 28 x 28."""
    return load_idx(data_folder("mnist"), part)


def fashion_mnist(part: str) -> tuple[Tensor, Tensor]:
    """60,000 and 10,000 pictures of clothes of 28 x 28."""
    return load_idx(data_folder("fashion-mnist"), part)


def notmnist(part: str) -> tuple[Tensor, Tensor]:
    """Letters A to J of 28 x 28: the set's 10,000 test images, the first 8,000 of them for training."""
    return _split(*load_idx(data_folder("notmnist"), "test"), part)


def kmnist(part: str) -> tuple[Tensor, Tensor]:
    """Kuzushiji characters of 28 x 28: the set's 10,000 test images, the first 8,000 of them for training."""
    folder = data_folder("kmnist")
    images, labels = (_npz(folder / f"kmnist-test-{kind}.npz") for kind in ("imgs", "labels"))
    return _split(_pixels(images).unsqueeze(1), torch.from_numpy(labels).long(), part)


def usps(part: str) -> tuple[Tensor, Tensor]:
    """7,291 and 2,007 digits of 16 x 16; -1 ... 1 in the file becomes 0 ... 1."""
    _check_part(part)
    rows = torch.from_numpy(np.loadtxt(data_folder("usps") / f"zip.{part}.gz", dtype=np.float32))
    return rows[:, 1:].reshape(-1, 1, 16, 16).add_(1).div_(2), rows[:, 0].long()


def cifar10(part: str) -> tuple[Tensor, Tensor]:
    """The first 4,000 training and 1,000 test pictures of CIFAR-10, lossless, 3 x 32 x 32."""
    _check_part(part)
    name = {"train": "data_batch_1.first4000.bin.xz", "test": "test_batch.first1000.bin.xz"}[part]
    records = np.frombuffer(_unpacked(data_folder("cifar10") / name), np.uint8)
    if records.size % 3073:
        raise ValueError(f"{name} must be whole records of 3073 bytes, got {records.size} bytes")
    records = records.reshape(-1, 3073)
    return _pixels(records[:, 1:].reshape(-1, 3, 32, 32)), torch.from_numpy(records[:, 0].astype(np.int64))


def cifar10_jpeg(part: str) -> tuple[Tensor, Tensor]:
    """All 50,000 training and 10,000 test pictures of CIFAR-10 as JPEG of quality 75, 3 x 32 x 32, class by class."""
    _check_part(part)
    images, labels = [], []
    for found, picture in _pictures(data_folder("cifar10-jpeg") / f"{part}.tar.xz", r"([a-z]+)/\d+\.jpg$"):
        images.append(np.asarray(picture))
        labels.append(CIFAR10_CLASSES.index(found[1]))
    return _pixels(np.stack(images).transpose(0, 3, 1, 2)), torch.tensor(labels)


def omniglot(part: str) -> tuple[Tensor, Tensor]:
    """Which of 50 alphabets a character is of: ink 1 on 0, 28 x 28; of its 20 drawings the first 15 for training.

    24,345 and 8,115 drawings, alphabets in the order of their names.
    """
    _check_part(part)
    images, labels = [], []
    for archive in ("images_background", "images_evaluation"):
        pattern = r"([^/]+)/character\d+/\d+_(\d+)\.png$"
        for found, picture in _pictures(data_folder("omniglot") / f"{archive}.tar.xz", pattern):
            if (int(found[2]) <= 15) == (part == "train"):
                images.append(1 - F.adaptive_avg_pool2d(_pixels(np.asarray(picture.convert("L"))[None]), 28))
                labels.append(found[1])
    names = {name: at for at, name in enumerate(sorted(set(labels)))}
    return torch.stack(images), torch.tensor([names[label] for label in labels])


def gtsrb(part: str) -> tuple[Tensor, Tensor]:
    """10,455 training and 6,315 test pictures of 43 traffic signs, 3 x 32 x 32."""
    _check_part(part)
    folder = data_folder("gtsrb32")
    images = np.load(io.BytesIO(_unpacked(folder / f"{part}-images.npy.xz")), allow_pickle=False)
    labels = np.load(folder / f"{part}-labels.npy", allow_pickle=False)
    return _pixels(images.transpose(0, 3, 1, 2)), torch.from_numpy(labels.astype(np.int64))


def fashion_colour(part: str) -> tuple[Tensor, Tensor]:
    """Fashion-MNIST as 3 x 32 x 32; of its training pictures the first 12,000."""
    images, labels = coloured(fashion_mnist)(part)
    return (images[:12_000], labels[:12_000]) if part == "train" else (images, labels)


def coloured(load: Loader) -> Loader:
    """A set of grey 28 x 28 as 3 x 32 x 32, black around it."""

    def loaded(part: str) -> tuple[Tensor, Tensor]:
        images, labels = load(part)
        return F.pad(images, (2, 2, 2, 2)).repeat(1, 3, 1, 1), labels

    return loaded


def task(name: str, load: Loader, statistics: tuple[Sequence[float], Sequence[float]] | None = None) -> Task:
    """Both parts of a set as a :class:`~mtzip.demo.tasks.Task`, normalised if statistics are given."""
    (train_images, train_labels), (test_images, test_labels) = load("train"), load("test")
    if statistics is not None:
        train_images, test_images = normalised(train_images, statistics), normalised(test_images, statistics)
    return Task(name, train_images, train_labels, test_images, test_labels, int(train_labels.max()) + 1)


def _check_part(part: str) -> None:
    if part not in ("train", "test"):
        raise ValueError(f"part must be 'train' or 'test', got {part!r}")


def _split(images: Tensor, labels: Tensor, part: str) -> tuple[Tensor, Tensor]:
    _check_part(part)
    chosen = slice(None, 8000) if part == "train" else slice(8000, None)
    return images[chosen], labels[chosen]


def _pixels(values: np.ndarray) -> Tensor:
    if values.dtype != np.uint8:
        raise ValueError(f"pixels must be uint8, got {values.dtype}")
    return torch.from_numpy(np.array(values)).float().div_(255)  # np.array: a writable copy


def _pictures(archive: Path, pattern: str) -> Iterator[tuple[re.Match[str], Any]]:
    """What matched, and the PIL image, for every file of a tar.xz whose name ends as the pattern says."""
    from PIL import Image

    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                if found := re.search(pattern, member.name):
                    yield found, Image.open(io.BytesIO(tar.extractfile(member).read()))
    except (tarfile.TarError, lzma.LZMAError, EOFError) as error:
        raise ValueError(f"{archive} must be a whole tar.xz of pictures, got a damaged one: {error}") from error


def _npz(file: Path) -> np.ndarray:
    with np.load(file, allow_pickle=False) as arrays:
        return arrays["arr_0"]


def _unpacked(file: Path) -> bytes:
    try:
        return lzma.decompress(file.read_bytes())
    except lzma.LZMAError as error:
        raise ValueError(f"{file} must be a whole xz file, got a damaged one: {error}") from error
