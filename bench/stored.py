"""How many parameters a zipped network must store, by arithmetic on layer sizes alone.

Independent of how the library lays its blocks out: it looks at the original networks and at the number of neurons
shared on each axis, nothing else. For networks that are chains of linear and convolution layers.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


def expected_parameters(networks: Mapping[str, nn.Module], shared: Mapping[str, int], scaled: bool = True) -> int:
    """Parameters of the zip of chains that have the same layers but for the last one.

    A layer of n x m weights, of whose outputs k and inputs j are shared, stores k j of them once and n m - k j for each
    task. Where no BatchNorm follows, a shared neuron has a private scale and shift for each task in place of its bias;
    else the bias is stored once, and the BatchNorm's own scale and shift for each task.

    Args:
        networks: task to original network.
        shared: path of a layer to its number of shared output neurons; layers not named share none.
        scaled: whether shared neurons have a private scale and shift.
    """
    total = 0
    inputs, inputs_shared = None, 0  # neurons of the layer before, and how many of them are shared
    for layers in zip(*(_chain(network) for network in networks.values()), strict=True):
        path, first, _ = layers[0]
        rows_shared = shared.get(path, 0)
        # The data is everyone's: all columns of the first layer are common. Flattening repeats a channel's columns.
        columns, kernel = first.weight.shape[1], first.weight[0, 0].numel()
        columns_shared = columns if inputs is None else inputs_shared * (columns // inputs)
        once = rows_shared * columns_shared * kernel
        total += once
        for _, layer, normed in layers:
            total += layer.weight.numel() - once + _beside_weight(layer, rows_shared, normed, scaled)
        if first.bias is not None and (layers[0][2] or not scaled):
            total += rows_shared  # the merged bias
        inputs, inputs_shared = len(first.weight), rows_shared
    return total


def _beside_weight(layer: nn.Module, shared: int, normed: bool, scaled: bool) -> int:
    """What a task keeps of a layer beside its weight: bias or shift, scale, the affine of a BatchNorm."""
    rows = len(layer.weight)
    bias = 0 if layer.bias is None else rows - shared
    if normed:
        return bias + 2 * rows
    return bias + (2 * shared if scaled else 0)


def _chain(network: nn.Module) -> list[tuple[str, nn.Module, bool]]:
    """Path, layer and whether a BatchNorm follows, for each linear and convolution layer in order."""
    modules = [(path, module) for path, module in network.named_modules() if not list(module.children())]
    chain = []
    for at, (path, module) in enumerate(modules):
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            chain.append((path, module, at + 1 < len(modules) and isinstance(modules[at + 1][1], NORMS)))
    return chain
