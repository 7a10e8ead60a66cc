"""Real architectures from end to end: nothing is written for any of them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import mtzip
from bench.zoo import ARCHITECTURES
from mtzip.inputs import Batch, as_batch
from mtzip.permute import permute_
from mtzip.trace.analysis import Analysis
from mtzip.trace.export import export

#: Those that between them have every kind of layer; ``python -m bench architectures`` does all.
CHOSEN = ("ResNet-50", "MobileNetV2", "ViT-B/16", "BERT-Base", "GPT-2", "Llama", "zero-padded", "U-Net", "GRU")


def calibration(example: Batch) -> Batch:
    """Some dozens of samples: the example with noise, or with its tokens shuffled."""
    generator = torch.Generator().manual_seed(4)

    def more(x):
        if not isinstance(x, torch.Tensor) or not x.dim():
            return x
        x = torch.cat([x] * (8 if x.dim() > 3 else 40))
        if x.is_floating_point():
            return x + 0.5 * torch.randn(x.shape, generator=generator)
        return x[torch.randperm(len(x), generator=generator)]

    return Batch(*pytree.tree_map(more, (example.args, example.kwargs)))


def lively(network: nn.Module, batch: Batch) -> nn.Module:
    """Scales every weight so that its layer puts out numbers of variance one: random weights let signals vanish."""

    def scale(module, _, output):
        if isinstance(output, torch.Tensor) and isinstance(getattr(module, "weight", None), nn.Parameter):
            size = output.std()
            if module.weight.dim() > 1 and size > 0:
                module.weight.data /= size
                if getattr(module, "bias", None) is not None:
                    module.bias.data /= size
                return output / size
        return None

    handles = [module.register_forward_hook(scale) for module in network.modules()]
    outputs(network, batch)
    for handle in handles:
        handle.remove()
    return network


def outputs(network: nn.Module, batch: Batch) -> list[torch.Tensor]:
    with torch.no_grad():
        result = network(*batch.args, **batch.kwargs)
    result = getattr(result, "logits", result)
    return [x for x in pytree.tree_leaves(result) if isinstance(x, torch.Tensor) and x.is_floating_point()]


def shuffled(network: nn.Module, batch: Batch) -> nn.Module:
    """The same function with every free axis in a random order."""
    analysis = Analysis(export("b", network, batch))
    generator = torch.Generator().manual_seed(1)
    free = [atom for atom in analysis.axes.roots() if analysis.axes[atom].pinned is None]
    other = copy.deepcopy(network)
    orders = {atom: torch.randperm(analysis.axes[atom].size, generator=generator) for atom in free}
    permute_(other, analysis, orders)
    return other


@pytest.mark.parametrize(
    "architecture", [a for a in ARCHITECTURES if any(name in a.name for name in CHOSEN)], ids=lambda a: a.name
)
def test_a_network_zips_with_a_shuffled_copy_of_itself(architecture):
    torch.manual_seed(0)
    batch = calibration(as_batch(architecture.example(True)))
    network = lively(architecture.build(True).eval(), batch)
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
