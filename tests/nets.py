"""Networks as users write them, and what tracing finds in them: inputs of the tests of the orchestrator's stages."""

from __future__ import annotations

import copy
from collections import OrderedDict

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from mtzip.inputs import Batch, as_batch
from mtzip.trace.analysis import Analysis
from mtzip.trace.correspond import Correspondence, correspond
from mtzip.trace.export import export
from mtzip.trace.permute import permute_

IMAGE = (2, 8, 8)


def seeded(make, seed: int = 0) -> nn.Module:
    """``make()`` in evaluation mode with random weights of this seed and BatchNorm statistics that are not trivial."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = make()
        for module in network.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                if module.track_running_stats:
                    module.running_mean.normal_(std=0.3)
                    module.running_var.uniform_(0.5, 2)
                if module.affine:
                    module.weight.data.uniform_(0.5, 1.5).mul_(torch.randn(module.num_features).sign())
                    module.bias.data.normal_(std=0.3)
    return network.eval()


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Standard normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def mlp(inputs: int = 6, hidden=(8, 5), classes: int = 3, activation=nn.ReLU, bias: bool = True, norm: bool = False):
    """A Sequential of linear layers: 0, 2, 4 ... without BatchNorm."""
    layers: list[nn.Module] = []
    for width in hidden:
        layers += [nn.Linear(inputs, width, bias=bias), *([nn.BatchNorm1d(width)] if norm else []), activation()]
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, classes, bias=bias))


class Functional(nn.Module):
    """Two convolutions and two linear layers in the calls a user would write."""

    def __init__(self, widths=(6, 5, 7), classes: int = 3, batchnorm: bool = True, channels: int = 2):
        super().__init__()
        first, second, hidden = widths
        self.conv1 = nn.Conv2d(channels, first, 3, padding=1, bias=not batchnorm)
        self.bn1 = nn.BatchNorm2d(first) if batchnorm else nn.Identity()
        self.conv2 = nn.Conv2d(first, second, 3, stride=2, padding=1)
        self.fc = nn.Linear(second * 4, hidden)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(hidden, classes)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = F.max_pool2d(torch.relu(self.conv2(x)), 2)
        x = x.view(x.size(0), -1)
        x = self.drop(F.leaky_relu(self.fc(x)))
        return self.head(x)


def functional_as_sequential(widths=(6, 5, 7), classes: int = 3) -> nn.Sequential:
    """The graph of :class:`Functional`, other activations, as a Sequential."""
    first, second, hidden = widths
    layers = OrderedDict(
        c1=nn.Conv2d(2, first, 3, padding=1, bias=False),
        b1=nn.BatchNorm2d(first),
        r1=nn.GELU(),
        c2=nn.Conv2d(first, second, 3, stride=2, padding=1),
        r2=nn.SiLU(),
        pool=nn.AdaptiveAvgPool2d(2),
        flat=nn.Flatten(),
        f1=nn.Linear(second * 4, hidden),
        r3=nn.Tanh(),
        out=nn.Linear(hidden, classes),
    )
    return nn.Sequential(layers)


class Residual(nn.Module):
    """A stem, two residual blocks of one stream, and a head."""

    def __init__(self, width: int = 6, inner: int = 5, classes: int = 3, stem: type[nn.Conv2d] = nn.Conv2d):
        super().__init__()
        self.stem = stem(2, width, 3, padding=1, bias=False)
        self.stem_bn = nn.BatchNorm2d(width)
        self.ins = nn.ModuleList([nn.Conv2d(width, inner, 3, padding=1, bias=False) for _ in range(2)])
        self.mids = nn.ModuleList([nn.BatchNorm2d(inner) for _ in range(2)])
        self.outs = nn.ModuleList([nn.Conv2d(inner, width, 3, padding=1, bias=False) for _ in range(2)])
        self.ends = nn.ModuleList([nn.BatchNorm2d(width) for _ in range(2)])
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        x = F.relu(self.stem_bn(self.stem(x)))
        for enter, mid, leave, end in zip(self.ins, self.mids, self.outs, self.ends, strict=True):
            x = F.relu(x + end(leave(F.relu(mid(enter(x))))))
        return self.head(x.mean((2, 3)))


class Branches(nn.Module):
    """Two branches concatenated, a depthwise convolution behind them."""

    def __init__(self, left: int = 4, right: int = 3, classes: int = 3):
        super().__init__()
        self.left = nn.Conv2d(2, left, 1)
        self.right = nn.Conv2d(2, right, 3, padding=1)
        both = left + right
        self.depth = nn.Conv2d(both, both, 3, padding=1, groups=both)
        self.prelu = nn.PReLU(both)
        self.mix = nn.Conv2d(both, 6, 1)
        self.head = nn.Linear(6 * 4, classes)

    def forward(self, x):
        x = torch.cat([self.left(x), self.right(x).relu_()], 1)
        x = self.mix(self.prelu(self.depth(x)))
        return self.head(torch.flatten(F.adaptive_max_pool2d(x, 2), 1))


def conv1d_net(widths=(5, 4), classes: int = 3, channels: int = 3) -> nn.Sequential:
    """Two 1-d convolutions, the second strided and dilated, and a head; for inputs [N, channels, 16]."""
    first, second = widths
    return nn.Sequential(
        nn.Conv1d(channels, first, 3, padding="same"),
        nn.ReLU(inplace=True),
        nn.Conv1d(first, second, 4, stride=2, dilation=2, padding=1, bias=False),
        nn.BatchNorm1d(second),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(second * 6, classes),
    )


def analysed(network: nn.Module, x: torch.Tensor, task: str = "t") -> Analysis:
    """The axis analysis of a network on an example."""
    return Analysis(export(task, network, as_batch(x)))


def corresponding(*pairs: tuple[nn.Module, torch.Tensor]) -> tuple[list[Analysis], Correspondence]:
    """Analyses and correspondence of several networks."""
    analyses = [analysed(network, x, str(at)) for at, (network, x) in enumerate(pairs)]
    return analyses, correspond(analyses)


def axes_of(correspondence: Correspondence) -> dict[str, tuple[int, ...]]:
    """Name of every shared axis to its widths by task."""
    return {axis.name: tuple(axis.sizes[task] for task in sorted(axis.sizes)) for axis in correspondence.axes}


def why(correspondence: Correspondence, task: int) -> dict[str, str]:
    """What of a task stays private, and why."""
    return {note.name: note.reason for owner, note in correspondence.notes if owner == task}


def free_axes(analysis: Analysis) -> dict[int, list[str]]:
    """Atom to writers of every axis that some layer writes and that may be reordered."""
    atoms = [(atom, analysis.axes[atom]) for atom in analysis.axes.roots()]
    return {at: atom.writers for at, atom in atoms if atom.pinned is None and atom.size > 1 and atom.writers}


def reordering_error(analysis: Analysis, example: Batch, only: int | None = None) -> float:
    """Largest difference of the outputs in float64, relative to the largest output, with all free axes reordered."""
    generator = torch.Generator().manual_seed(1)
    orders = {}
    for atom in free_axes(analysis) if only is None else [only]:
        order = torch.randperm(analysis.axes[atom].size, generator=generator)
        orders[atom] = order.roll(1) if torch.equal(order, order.sort().values) else order
    network = copy.deepcopy(analysis.exported.network).double()
    before = copy.deepcopy(network.state_dict())

    def double(leaf):
        return leaf.double() if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf

    example = Batch(*(pytree.tree_map(double, part) for part in (example.args, example.kwargs)))
    with torch.no_grad():
        expected = analysis.exported.outputs(network, example)
        permute_(network, analysis, orders)
        got = analysis.exported.outputs(network, example)
    assert any(not torch.equal(value, before[key]) for key, value in network.state_dict().items()), "nothing moved"
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(got, expected, strict=True))


def assert_reordering_changes_nothing(network: nn.Module, x: torch.Tensor, least: int = 1) -> None:
    """Every free axis in a random order: the same function, also of inputs the network was not traced with."""
    analysis = analysed(network, x)
    free = free_axes(analysis)
    assert len(free) >= least, f"only {free} can be reordered"
    other = torch.randn(5, *x.shape[1:], generator=torch.Generator().manual_seed(1))
    assert reordering_error(analysis, as_batch(other)) < 1e-9


class CifarBlock(nn.Module):
    """Basic block; where the shape changes the shortcut takes every second pixel and pads the channels with zeros."""

    def __init__(self, channels: int, width: int, stride: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.added = (width - channels) // 2

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.added:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.added, self.added), "constant", 0)
        return F.relu(out + x)


class CifarResNet(nn.Module):
    """ResNet-20 (``blocks=3``), -32 (5) and -56 (9) of He et al. for 32 x 32 pictures."""

    def __init__(self, blocks: int = 3, widths=(16, 32, 64), classes: int = 10):
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        channels = widths[0]
        for stage, width in enumerate(widths):
            layers = []
            for block in range(blocks):
                layers.append(CifarBlock(channels, width, 2 if stage and not block else 1))
                channels = width
            setattr(self, f"layer{stage + 1}", nn.Sequential(*layers))
        self.linear = nn.Linear(channels, classes)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = F.avg_pool2d(x, x.size()[3])
        return self.linear(x.view(x.size(0), -1))
