"""The real weights and data of ../shared: every loaded network has the test error that its description states."""

import functools

import pytest
import torch

from bench import data
from bench.networks import pretrained
from mtzip.demo.train import test_error as error_of

pytestmark = pytest.mark.shared

HALVES = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

# network, set, normalisation, parameters and test error in % as ../shared/weights/README.md states them
STATED = [
    ("lenet-300-100-mnist/a", data.mnist, None, 266610, 2.28),
    ("lenet-300-100-mnist/b", data.mnist, None, 266610, 1.61),
    ("lenet-5-mnist/a", data.mnist, None, 431080, 0.91),
    ("lenet-5-mnist/b", data.mnist, None, 431080, 0.94),
    ("lenet-5-mnist/c", data.mnist, None, 431080, 0.86),
    ("resnet20-cifar10/a", data.cifar10, data.IMAGENET, 269722, 8.5),
    ("resnet20-cifar10/b", data.cifar10, data.IMAGENET, 269722, 9.0),
    ("resnet20-projection-cifar10/a", data.cifar10, HALVES, 272474, 9.3),
    ("resnet32-cifar10/a", data.cifar10, data.IMAGENET, 464154, 7.2),
    ("resnet56-cifar10/a", data.cifar10, data.IMAGENET, 853018, 7.4),
    ("resnet56-cifar10/b", data.cifar10, data.IMAGENET, 853018, 6.8),
    ("resnet20-gtsrb/a", data.gtsrb, data.GTSRB, None, 2.42),
    ("vgg16-quarter-bn/gtsrb", data.gtsrb, data.GTSRB, None, 2.38),
    ("vgg16-quarter-bn/cifar10-jpeg", data.cifar10_jpeg, data.IMAGENET, None, 15.40),
]


@functools.cache
def test_set(load, statistics):
    images, labels = load("test")
    return (images if statistics is None else data.normalised(images, statistics)), labels


test_set.__test__ = False


@pytest.mark.parametrize(("name", "load", "statistics", "parameters", "stated"), STATED, ids=[row[0] for row in STATED])
def test_error_is_as_stated(name, load, statistics, parameters, stated):
    network = pretrained(name)
    if parameters is not None:
        assert sum(parameter.numel() for parameter in network.parameters()) == parameters
    images, labels = test_set(load, statistics)
    # The statement is rounded to two places; one image more or less may round the other way on another machine.
    assert error_of(network, images, labels) == pytest.approx(stated, abs=0.006 + 100 / len(labels))


# set, images [height, width, channels] and counts of training and test part, label histogram of the test part
COUNTS = [
    (data.mnist, (1, 28, 28), 60000, [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]),
    (data.fashion_mnist, (1, 28, 28), 60000, [1000] * 10),
    (data.usps, (1, 16, 16), 7291, [359, 264, 198, 166, 200, 160, 170, 147, 166, 177]),
    (data.cifar10, (3, 32, 32), 4000, [103, 89, 100, 103, 90, 86, 112, 102, 106, 109]),
    (data.gtsrb, (3, 32, 32), 10455, None),
]


@pytest.mark.parametrize(("load", "shape", "count", "histogram"), COUNTS, ids=[row[0].__name__ for row in COUNTS])
def test_sets_are_whole(load, shape, count, histogram):
    images, labels = load("train")
    assert images.shape == (count, *shape) and labels.shape == (count,)
    assert images.dtype == torch.float32 and labels.dtype == torch.int64
    assert images.min() == 0 and images.max() == 1
    if histogram is not None:
        assert load("test")[1].bincount().tolist() == histogram


@pytest.mark.parametrize("load", [data.kmnist, data.notmnist], ids=lambda load: load.__name__)
def test_sets_without_training_images_are_split(load):
    assert [len(load(part)[1]) for part in ("train", "test")] == [8000, 2000]


def test_omniglot_is_whole():
    images, labels = data.omniglot("test")
    assert images.shape == (8115, 1, 28, 28) and images.min() == 0 and images.max() == 1
    counts = labels.bincount()  # five drawings of every character; alphabets have 14 to 55 characters
    assert len(counts) == 50 and (counts % 5 == 0).all() and counts.sum() == 5 * 1623


def test_unknown_part_and_missing_files(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="part must be 'train' or 'test'"):
        data.cifar10("validation")
    monkeypatch.setenv("MTZ_SHARED", str(tmp_path))
    assert not data.has_shared()
    with pytest.raises(OSError, match="set MTZ_SHARED"):
        data.mnist("test")
    with pytest.raises(OSError, match="set MTZ_SHARED"):
        pretrained("lenet-5-mnist/a")
