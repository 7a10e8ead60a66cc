"""What retraining refuses, and how it says so."""

from __future__ import annotations

import copy

import pytest
import torch
from handmade import images, share_layer, small, zipped_pair
from retraining import assert_same, inputs, labelled, weights_of
from torch import nn
from torch.nn import functional as F

from mtzip.network.zipped import ZippedNetwork
from mtzip.retraining.loaders import ShuffledBatches, loader_of
from mtzip.retraining.retrain import retrain


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps must be a positive integer, got 0"),
        ({"steps": 1.5}, ValueError, "steps must be a positive integer, got 1.5"),
        ({"batch_size": 0}, ValueError, "batch_size must be"),
        ({"loaders": [1]}, TypeError, "must map every task to its batches, got list"),
        ({"loaders": {"a": images()}}, ValueError, "takes one batch of each; missing 'b'"),
        ({"loaders": {"a": images(), "b": images(), "c": images()}}, KeyError, "a key of loaders.*got 'c'"),
        ({"loaders": {"a": images(), "b": 3}}, TypeError, r"loaders\['b'\] must be a DataLoader.*got int"),
        ({"loaders": {"a": images(), "b": []}}, ValueError, r"loaders\['b'\] must give at least one batch"),
        ({"loaders": {"a": images(), "b": images()[:0]}}, ValueError, r"loaders\['b'\] must give at least one batch"),
        ({"loaders": {"a": images(), "b": [object()]}}, TypeError, r"loaders\['b'\]: a batch must be"),
        ({"loaders": {"a": images(), "b": torch.tensor(1.0)}}, ValueError, r"loaders\['b'\]: a batch must hold"),
        ({"loaders": {"a": images(), "b": (images(), torch.zeros(3))}}, ValueError, "got 8 inputs and 3 targets"),
        ({"teachers": {"x": small()}}, KeyError, "a key of teachers must be one of 'a', 'b', got 'x'"),
        ({"teachers": {}}, ValueError, "task 'a' has neither labels nor a teacher.*as teachers="),
        ({"weights": {"x": 1.0}}, KeyError, "a key of weights"),
        ({"weights": {"a": -1.0}}, ValueError, r"weights\['a'\] must be a finite number >= 0, got -1.0"),
        ({"loss": {"x": F.mse_loss}}, KeyError, "a key of loss"),
        ({"loss": F.mse_loss}, ValueError, "loss= of task 'a' needs targets"),
        ({"distillation": "features"}, ValueError, "must be 'mse' or 'kl', got 'features'"),
        ({"temperature": 0.0}, ValueError, "temperature must be > 0"),
        ({"batchnorm": "eval"}, ValueError, "must be 'frozen' or 'train', got 'eval'"),
    ],
)
def test_errors_say_what_was_wrong(arguments, error, message):
    zipped = zipped_pair()
    before = weights_of(zipped)
    with pytest.raises(error, match=message):
        retrain(zipped, **({"loaders": inputs(8), "steps": 1} | arguments))
    assert_same(weights_of(zipped), before)


def test_other_errors():
    with pytest.raises(TypeError, match=r"must be a ZippedNetwork, got Small; make one with mtzip.*out of its wrapper"):
        retrain(small(), inputs(), 1)
    with pytest.raises(ValueError, match=r"loss= of task 'a' must return a scalar tensor, got \[8\]"):
        retrain(zipped_pair(), labelled(8), 1, loss=lambda o, t: F.cross_entropy(o, t, reduction="none"), teachers={})
    generator = (batch for batch in images(0, 12).split(4))
    with pytest.raises(ValueError, match="a generator that ended after 3 batches"):
        retrain(zipped_pair(), {"a": images(), "b": generator}, 5)


def test_a_network_without_sharing_can_be_retrained():
    networks = {"a": nn.Sequential(nn.Linear(3, 2)), "b": nn.Sequential(nn.Linear(3, 2))}
    data = {task: torch.randn(8, 3) for task in networks}
    teachers = copy.deepcopy(networks)
    assert len(retrain(ZippedNetwork(networks, None), data, 1, teachers=teachers)) == 1
    share_layer(networks, "0", [((0, 1), 2)], [((0, 1), 3)], bias="shared")
    assert len(retrain(ZippedNetwork(networks, None), data, 1, teachers=teachers)) == 1


def test_shuffled_batches_of_nothing_are_none():
    assert list(ShuffledBatches("a", loader_of("a", images(), 4).data.narrow(0, 0), 4)) == []
