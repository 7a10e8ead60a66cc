"""The readers of image sets: right on good files, a clear error on every kind of bad one."""

import gzip
import struct

import numpy as np
import pytest
import torch

from mtzip.demo.idx import load_idx, read_idx
from mtzip.demo.tasks import digit_tasks, mnist_tasks


def idx_bytes(array: np.ndarray, kind: int = 8) -> bytes:
    sizes = struct.pack(f">{array.ndim}I", *array.shape)
    return bytes([0, 0, kind, array.ndim]) + sizes + array.astype(np.uint8).tobytes()


@pytest.fixture
def images():
    return np.arange(5 * 4 * 3, dtype=np.uint8).reshape(5, 4, 3)


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_reads_what_was_written(tmp_path, images, pack):
    file = tmp_path / "images"
    file.write_bytes(pack(idx_bytes(images)))
    read = read_idx(file, 3)
    assert read.dtype == np.uint8 and read.flags.writeable
    np.testing.assert_array_equal(read, images)


@pytest.mark.parametrize("shape", [(0,), (0, 4, 4), (1,), (19, 1, 7)])
def test_awkward_sizes(tmp_path, shape):
    file = tmp_path / "images"
    file.write_bytes(idx_bytes(np.zeros(shape)))
    assert read_idx(file).shape == shape


def test_every_truncation_is_a_value_error(tmp_path, images):
    file = tmp_path / "images"
    whole = idx_bytes(images)
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError):
            read_idx(file)


def test_every_truncation_of_a_gzip_file_is_a_value_error(tmp_path, images):
    file = tmp_path / "images.gz"
    whole = gzip.compress(idx_bytes(images))
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError):
            read_idx(file)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "magic 00 00 08, got an empty file"),
        (b"\x89PNG\r\n", "magic 00 00 08, got 89 50 4e"),
        (bytes([0, 0, 13, 1, 0, 0, 0, 1]), "got 00 00 0d"),
        (bytes([0, 0, 8, 3, 0, 0, 0, 1]), "header of 16 bytes, got a file of 8"),
        (bytes([0, 0, 8, 1, 0, 0, 0, 2, 7]), r"hold 2 bytes for its shape \(2,\), got 1"),
        (bytes([0, 0, 8, 1, 0, 0, 0, 1, 7, 7]), r"hold 1 bytes for its shape \(1,\), got 2"),
        (bytes([0, 0, 8, 4]) + b"\xff" * 16, "bytes for its shape"),
    ],
)
def test_foreign_and_damaged_files(tmp_path, data, message):
    file = tmp_path / "file"
    file.write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read_idx(file)


def test_another_number_of_dimensions(tmp_path, images):
    file = tmp_path / "images"
    file.write_bytes(idx_bytes(images))
    with pytest.raises(ValueError, match="must have 1 dimensions, got 3"):
        read_idx(file, 1)


def write_set(folder, images, labels):
    folder.mkdir(parents=True, exist_ok=True)
    for part, count in (("train", len(images)), ("t10k", 2)):
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(images[:count])))
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx_bytes(labels[:count])))


def test_a_set_becomes_a_task(tmp_path, images):
    labels = np.array([3, 0, 1, 2, 3])
    for name in ("mnist", "fashion-mnist"):
        write_set(tmp_path / name, images, labels)
    first, second = mnist_tasks(tmp_path)
    assert (first.name, second.name, first.classes) == ("mnist", "fashion-mnist", 4)
    assert first.train_images.shape == (5, 1, 4, 3) and first.test_images.shape == (2, 1, 4, 3)
    assert first.train_labels.tolist() == labels.tolist()
    torch.testing.assert_close(first.train_images[1, 0, 2, 1], torch.tensor(images[1, 2, 1] / 255, dtype=torch.float32))


def test_images_without_their_labels(tmp_path, images):
    write_set(tmp_path, images, np.zeros(4))
    with pytest.raises(ValueError, match="label for each of 5 images, got 4"):
        load_idx(tmp_path, "train")


def test_missing_files_and_unknown_parts(tmp_path):
    with pytest.raises(OSError, match=r"train-images-idx3-ubyte\.gz"):
        load_idx(tmp_path, "train")
    with pytest.raises(ValueError, match="part must be one of 'train', 'test', got 'validation'"):
        load_idx(tmp_path, "validation")
    with pytest.raises(OSError):
        read_idx(tmp_path / "nothing")


def test_digits_are_two_tasks_on_the_same_images():
    digit, odd = digit_tasks()
    assert len(digit.train_labels) + len(digit.test_labels) == 1797
    assert torch.equal(digit.train_images, odd.train_images)
    assert torch.equal(digit.test_labels % 2, odd.test_labels)
    assert 0 <= digit.train_images.min() and digit.train_images.max() == 1
    assert digit.test_labels.bincount().min() > 50


def test_calibration_is_drawn_once_and_for_all():
    digit, _ = digit_tasks()
    drawn = digit.calibration(100)
    assert drawn.shape == (100, 1, 8, 8)
    assert torch.equal(drawn, digit.calibration(100))
    assert not torch.equal(drawn, digit.calibration(100, seed=1))
    assert len(digit.calibration(10**6)) == len(digit.train_labels)
