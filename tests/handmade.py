"""Zipped networks put together by hand, without tracing or merging: what the tests of the later stages start from."""

from __future__ import annotations

import torch
from torch import nn

from mtzip.network.layout import Layout, Run
from mtzip.network.leaf import LEAVES, replace_module
from mtzip.network.zipped import ZippedNetwork
from mtzip.reports.report import AxisReport, LayerReport, Private, Report


class Small(nn.Module):
    """Convolution, BatchNorm, two linear layers, and a forward of functional calls as users write them."""

    def __init__(self, classes: int = 3, width: int = 6, hidden: int = 5):
        super().__init__()
        self.conv = nn.Conv2d(2, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.hidden = nn.Linear(width * 4, hidden)
        self.head = nn.Linear(hidden, classes)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x)))
        x = torch.relu(self.hidden(torch.flatten(x, 1)))
        return self.head(x)


def small(classes: int = 3, seed: int = 0, width: int = 6, hidden: int = 5) -> Small:
    """A :class:`Small` in eval mode with BatchNorm statistics that are not the trivial ones."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = Small(classes, width, hidden)
        for tensor in (network.norm.running_mean, network.norm.weight, network.norm.bias):
            tensor.data.normal_(std=0.2).add_(0.5)
    return network.eval()


def images(seed: int = 0, count: int = 8, dtype=torch.float32) -> torch.Tensor:
    """[count, 2, 2, 2] standard normal numbers."""
    return torch.randn(count, 2, 2, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def share_layer(networks: dict[str, nn.Module], path: str, rows, columns, bias="private", scaled: bool = False) -> None:
    """Replaces layer ``path`` of every network by a leaf; shared blocks get the values of the first task that has them.

    Args:
        networks: task to network, changed in place.
        path: of the layer, the same in every network.
        rows, columns: runs ``(tasks, size)`` over all tasks; a task's layer has those it is a member of.
        bias: "private", "shared" (as the rows) or None.
        scaled: a private scale for the rows that several tasks share.
    """
    made: dict[str, nn.Parameter] = {}
    for task, network in enumerate(networks.values()):
        layer = network.get_submodule(path)
        own_rows = tuple(Run(tasks, size) for tasks, size in rows if task in tasks)
        own_columns = tuple(Run(tasks, size) for tasks, size in columns if task in tasks)
        biases = {"private": (Run((task,), sum(r.size for r in own_rows)),), "shared": own_rows, None: None}[bias]
        scale = sum(run.size for run in own_rows if len(run.tasks) > 1) if scaled else 0
        layout = Layout(task, own_rows, own_columns, biases, scale)
        pieces: dict[str, list[torch.Tensor]] = {}
        top = 0
        for row in own_rows:
            left = 0
            for column in own_columns:
                piece = layer.weight.detach()[top : top + row.size, left : left + column.size]
                pieces.setdefault(layout.block_name(row.tasks, column.tasks), []).append(piece)
                left += column.size
            top += row.size
        values = {name: torch.cat(parts, 1) for name, parts in pieces.items()}
        top = 0
        for name, size in layout.bias_blocks().items():
            values[name] = layer.bias.detach()[top : top + size].clone()
            top += size
        blocks = {name: made.setdefault(name, nn.Parameter(value)) for name, value in values.items()}
        if scale:
            blocks["scale"] = nn.Parameter(torch.linspace(0.5, 1.5, scale, dtype=layer.weight.dtype))
        replace_module(network, layer, LEAVES[type(layer)].wrap(layer, layout, blocks))


BOTH = (0, 1)
CONV = [(BOTH, 4), ((0,), 2), ((1,), 2)]  # partly shared filters
FLAT = [(BOTH, 16), ((0,), 8), ((1,), 8)]  # what a flatten makes of them
ALL = [(BOTH, 5)]  # every hidden unit shared


def zipped_pair(scaled: bool = True, dtype=torch.float32, report: bool = True) -> ZippedNetwork:
    """Two :class:`Small` networks: conv partly shared, hidden layer fully shared, heads (3 and 4 classes) private."""
    originals = {"a": small(3, 0).to(dtype), "b": small(4, 1).to(dtype)}
    networks = {"a": small(3, 0).to(dtype), "b": small(4, 1).to(dtype)}
    share_layer(networks, "conv", CONV, [(BOTH, 2)])
    share_layer(networks, "hidden", ALL, FLAT, bias="private", scaled=scaled)
    for network in originals.values():
        network.requires_grad_(False)
    return ZippedNetwork(networks, small_report() if report else None, originals)


def zipped_three() -> ZippedNetwork:
    """Three :class:`Small` networks with runs shared by three, by two and by one of them, biases shared too."""
    networks = {name: small(3 + i, i) for i, name in enumerate("abc")}
    rows = [((0, 1, 2), 2), ((0, 1), 2), ((0, 2), 2), ((1, 2), 1), ((1,), 1), ((2,), 1)]
    flat = [(tasks, 4 * size) for tasks, size in rows]
    hidden = [((0, 1, 2), 3), ((1, 2), 2), ((0,), 2)]
    share_layer(networks, "conv", rows, [((0, 1, 2), 2)], bias="shared")
    share_layer(networks, "hidden", hidden, flat, bias=None, scaled=True)
    return ZippedNetwork(networks, None)


def small_report() -> Report:
    """A report as :func:`mtzip.zip_networks` would write it for :func:`zipped_pair`."""
    return Report(
        tasks=("a", "b"),
        method="refit",
        axes=[
            AxisReport("conv", {"a": 6, "b": 6}, 4, 0.0213),
            AxisReport("hidden", {"a": 5, "b": 5}, 5, None),
        ],
        layers=[
            LayerReport("conv", 228, 164, {"a": 512, "b": 512}, 1e-3, "feature", {"a": 0.01, "b": 0.25}),
            LayerReport("hidden", 250, 165, {"a": 128, "b": 128}, 1e-2, "sample", {"a": 0.1, "b": 0.002}),
        ],
        private=[Private("a", "head", "an output of the network")],
        parameters_before=545,
        parameters_after=396,
        seconds={"trace": 1.5, "sweep": 0.25},
    )
