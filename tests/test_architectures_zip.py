"""Real architectures from end to end: nothing is written for any of them."""

from __future__ import annotations

import copy

import pytest
import torch

import mtzip
from bench.zoo import ARCHITECTURES
from bench.zoo_copies import calibration, outputs, shuffled
from mtzip.inputs import as_batch

#: Those that between them have every kind of layer; ``python -m bench architectures`` zips all.
CHOSEN = ("ResNet-50", "MobileNetV2", "ViT-B/16", "BERT-Base", "GPT-2", "Llama", "zero-padded", "U-Net", "GRU")


@pytest.mark.parametrize(
    "architecture", [a for a in ARCHITECTURES if any(name in a.name for name in CHOSEN)], ids=lambda a: a.name
)
def test_a_network_zips_with_a_shuffled_copy_of_itself(architecture):
    batch = calibration(as_batch(architecture.example(True)))
    network = architecture.build(True)
    networks = {"a": network, "b": shuffled(network, batch)}
    state = copy.deepcopy({task: net.state_dict() for task, net in networks.items()})
    data = {task: [batch] for task in networks}
    expected = {task: outputs(net, batch) for task, net in networks.items()}
    nothing = mtzip.zip_networks(networks, data, share=0)
    for task in networks:
        assert all(map(torch.equal, outputs(nothing[task], batch), expected[task]))
    zipped = mtzip.zip_networks(networks, data)
    assert all(axis.shared == min(axis.neurons.values()) for axis in zipped.report.axes)
    for task, net in networks.items():
        for got, wanted in zip(outputs(zipped[task], batch), expected[task], strict=True):
            assert (got - wanted).abs().max() <= 1e-4 * wanted.abs().max()
        for name, value in net.state_dict().items():
            assert torch.equal(value, state[task][name])
