"""Rules of operators: what keeps an axis, what fixes its order, and what is named because it has no rule."""

from __future__ import annotations

import pytest
import torch
from nets import (
    IMAGE,
    analysed,
    assert_reordering_changes_nothing,
    axes_of,
    corresponding,
    free_axes,
    noise,
    seeded,
    why,
)
from torch import nn
from torch.nn import functional as F

PICTURES = noise(4, *IMAGE)


class Calls(nn.Module):
    """A convolution, some function of what it puts out, and a head."""

    def __init__(self, between, features: int, width: int = 4, **modules):
        super().__init__()
        self.conv = nn.Conv2d(2, width, 3, padding=1)
        for name, module in modules.items():
            setattr(self, name, module)
        self.between = between
        self.head = nn.Linear(features, 3)

    def forward(self, x):
        return self.head(self.between(self, self.conv(x)))


@pytest.mark.parametrize(
    "between, features",
    [
        (lambda net, x: x.view(x.size(0), -1), 256),
        (lambda net, x: x.reshape(-1, 256).relu_(), 256),
        (lambda net, x: torch.flatten(F.relu(x, inplace=True), 1), 256),
        (lambda net, x: F.dropout(x.flatten(1), 0.5, net.training), 256),
        (lambda net, x: F.adaptive_avg_pool2d(x, 1).squeeze(-1).squeeze(-1), 4),
        (lambda net, x: F.adaptive_max_pool2d(x, 2).flatten(1), 16),
        (lambda net, x: F.avg_pool2d(x, 3, 2, 1).flatten(1), 64),
        (lambda net, x: x.mean([2, 3]), 4),
        (lambda net, x: x.amax((2, 3)), 4),
        (lambda net, x: x.flatten(2).max(-1).values, 4),
        (lambda net, x: (x.sigmoid() * x + 1.5).flatten(1), 256),
        (lambda net, x: F.pad(x, (1, 1, 0, 0)).flatten(1), 320),
        (lambda net, x: x.permute(0, 2, 3, 1).mean((1, 2)), 4),
        (lambda net, x: x.transpose(1, 3)[:, ::2].sum((1, 2)), 4),
        (lambda net, x: F.interpolate(x, scale_factor=0.5).flatten(1), 64),
        (lambda net, x: torch.cat([x, x.relu()], 1).flatten(1), 512),
        (lambda net, x: torch.cat(x.chunk(2, -1), -1).flatten(1), 256),
        (lambda net, x: (x / (x.var(unbiased=False) + 1)).flatten(1), 256),
        (lambda net, x: torch.where(x > 0, x, x * 0.1).flatten(1), 256),
        (lambda net, x: F.softmax(x, 1).flatten(1), 256),
        (lambda net, x: F.instance_norm(x).flatten(1), 256),
        (lambda net, x: F.layer_norm(x.mean((2, 3)), (4,)), 4),
    ],
)
def test_operators_that_keep_an_axis(between, features):
    assert_reordering_changes_nothing(seeded(lambda: Calls(between, features)), PICTURES)


@pytest.mark.parametrize(
    "module",
    [
        nn.BatchNorm2d(4),
        nn.BatchNorm2d(4, affine=False),
        nn.BatchNorm2d(4, track_running_stats=False),
        nn.PReLU(),
        nn.PReLU(4),
        nn.GroupNorm(4, 4),
        nn.InstanceNorm2d(4, affine=True),
        nn.Hardswish(),
        nn.ReLU6(inplace=True),
        nn.ELU(),
        nn.Mish(),
        nn.Dropout2d(),
        nn.Conv2d(4, 4, 3, padding=1, groups=4),
        nn.LocalResponseNorm(2),
        nn.ConvTranspose2d(4, 4, 3, padding=1),
        nn.Conv2d(4, 4, 3, padding=1, groups=2),
    ],
)
def test_modules_keep_the_axis_or_are_named(module):
    network = seeded(lambda: Calls(lambda net, x: net.module(x).flatten(1), 256, module=module))
    analysis = analysed(network, PICTURES)
    if isinstance(module, nn.LocalResponseNorm):
        assert "pools over it" in analysis.axes.why_pinned(analysis.layers["conv"].rows)
    else:
        assert_reordering_changes_nothing(network, PICTURES)
        assert not analysis.notes


@pytest.mark.parametrize(
    "kind, arguments",
    [
        ("Conv1d", dict(kernel_size=3, stride=2, padding=2, dilation=2)),
        ("Conv1d", dict(kernel_size=4, padding="same")),
        ("Conv2d", dict(kernel_size=(3, 1), stride=(2, 1), padding=(0, 1), dilation=(1, 2))),
        ("Conv2d", dict(kernel_size=4, padding="same", dilation=2)),
        ("Conv2d", dict(kernel_size=3, padding="valid")),
        ("Conv2d", dict(kernel_size=3, padding=1, padding_mode="circular")),
        ("Conv3d", dict(kernel_size=2, stride=(1, 2, 1), padding=1)),
    ],
)
def test_convolutions_of_any_setting(kind, arguments):
    space = int(kind[4])
    conv = getattr(nn, kind)
    first = seeded(lambda: nn.Sequential(conv(2, 4, **arguments), nn.ReLU(), conv(4, 5, 2), nn.Flatten()))
    x = noise(3, 2, *[9] * space)
    network = nn.Sequential(first, seeded(lambda: nn.Linear(first(x).shape[1], 3))).eval()
    assert_reordering_changes_nothing(network, x, 2)
    layer = analysed(network, x).layers["0.0"]
    assert (layer.kind, layer.private) == (kind.lower(), None)


@torch.library.custom_op("mtzip_tests::swap", mutates_args=())
def swap(x: torch.Tensor) -> torch.Tensor:
    return x.flip(1).clone()


swap.register_fake(lambda x: torch.empty_like(x))


@pytest.mark.parametrize(
    "between, features, name",
    [
        (lambda net, x: swap(x).flatten(1), 256, "swap"),
        (lambda net, x: x.sort(1).values.flatten(1), 256, "sort"),
        (lambda net, x: torch.fft.rfft(x, dim=1).abs().flatten(1), 192, "fft_rfft"),
        (lambda net, x: torch.einsum("...hw->...wh", x).flatten(1), 256, "einsum"),
        (lambda net, x: x.repeat_interleave(torch.tensor([1, 2, 1, 1]), 1).flatten(1), 320, "repeat_interleave"),
    ],
)
def test_operators_without_a_rule_are_named_and_leave_their_neighbours_private(between, features, name):
    make = lambda: Calls(between, features)  # noqa: E731
    _, found = corresponding((seeded(make), PICTURES), (seeded(make, 1), PICTURES))
    assert axes_of(found) == {}
    for task in (0, 1):
        reasons = why(found, task)
        assert name in reasons
        assert name in reasons["conv"]
        assert set(reasons) >= {"conv", "head"}


@pytest.mark.parametrize(
    "between, features",
    [
        (lambda net, x: (x + x.mean((2, 3)).view(-1, 4, 1, 1).flip(1)).flatten(1), 256),
        (lambda net, x: x.roll(1, 1).flatten(1), 256),
        (lambda net, x: x.cumsum(1).flatten(1), 256),
        (lambda net, x: x[:, ::2].flatten(1), 128),
        (lambda net, x: x[:, [2, 0, 1]].flatten(1), 192),
        (lambda net, x: F.pixel_shuffle(x, 2).flatten(1), 256),
        (lambda net, x: F.one_hot(x.argmax(1), 4).float().flatten(1), 256),
        (lambda net, x: x.max(1).indices.float().flatten(1), 64),
        (lambda net, x: x.transpose(1, 3).unfold(3, 2, 1).flatten(1), 384),
        (lambda net, x: F.avg_pool1d(x.mean(3).transpose(1, 2), 2).flatten(1), 16),
        (lambda net, x: F.pad(x, (0, 0, 0, 0, 1, 1), "circular").flatten(1), 384),
        (lambda net, x: x.transpose(1, 3).tril().flatten(1), 256),
        (lambda net, x: F.conv1d(x.mean(3).transpose(1, 2), torch.ones(8, 8, 3)).flatten(1), 16),
    ],
)
def test_an_axis_whose_order_matters_is_pinned(between, features):
    analysis = analysed(seeded(lambda: Calls(between, features)), PICTURES)
    assert not analysis.axes.is_free(analysis.layers["conv"].rows)


@pytest.mark.parametrize(
    "between, features, sizes",
    [
        (lambda net, x: x[:, :5].flatten(1), 320, [5, 7]),
        (lambda net, x: x[:, -3:].flatten(1), 192, [9, 3]),
        (lambda net, x: x[:, 2].flatten(1), 64, [9, 2]),
        (lambda net, x: x.narrow(1, 4, 4).flatten(1), 256, [4, 4, 4]),
        (lambda net, x: torch.cat(x.chunk(2, 1)[::-1], 1).flatten(1), 768, [6, 6]),
        (lambda net, x: torch.cat(x.split([3, 9], 1)[::-1], 1).flatten(1), 768, [3, 9]),
        (lambda net, x: F.glu(x, 1).flatten(1), 384, [6]),
        (lambda net, x: (lambda a, b: a * b.sigmoid())(*x.chunk(2, 1)).flatten(1), 384, [6]),
        (lambda net, x: x.view(-1, 3, 4, 8, 8).sum(1).flatten(1), 256, [3]),
        (lambda net, x: x.view(-1, 3, 4, 8, 8)[:, 1].flatten(1), 256, [4]),
        (lambda net, x: sum(x.view(-1, 3, 4, 8, 8).unbind(1)).flatten(1), 256, [4]),
        (lambda net, x: x.unflatten(1, (4, 3)).transpose(1, 2).flatten(1), 768, [4]),
        (lambda net, x: F.channel_shuffle(x, 3).flatten(1), 768, [3]),
        (lambda net, x: F.pixel_shuffle(x, 2).flatten(1), 768, [3]),
        (lambda net, x: F.pixel_unshuffle(x, 2).flatten(1), 768, [12]),
        (lambda net, x: F.unfold(x, 2, stride=2).flatten(1), 768, [12]),
        (lambda net, x: F.group_norm(x, 3).flatten(1), 768, [3]),
        (lambda net, x: F.group_norm(x, 1).flatten(1), 768, [12]),
        (lambda net, x: F.pad(x, (0, 0, 0, 0, 2, 1)).flatten(1), 960, [12]),
        (lambda net, x: F.pad(x, (0, 0, 0, 0, -2, 0)).flatten(1), 640, [2, 10]),
        (lambda net, x: torch.cat([x, x.new_zeros(x.shape[0], 3, 8, 8)], 1).flatten(1), 960, [12]),
        (
            lambda net, x: torch.cat(
                [x, torch.linspace(0, 1, 64).expand(x.shape[0], 1, 64).unflatten(2, (8, 8))], 1
            ).flatten(1),
            832,
            [12],
        ),
        (lambda net, x: (x * x.mean(1, keepdim=True).expand_as(x)).flatten(1), 768, [12]),
        (lambda net, x: x.repeat(1, 2, 1, 1).flatten(1), 1536, [12]),
        (lambda net, x: x.repeat_interleave(2, 1).flatten(1), 1536, [12]),
        (lambda net, x: torch.stack([x, x.relu()], 2).flatten(1), 1536, [12]),
        (lambda net, x: x.movedim(1, -1).movedim(-1, 1).flatten(1), 768, [12]),
        (lambda net, x: F.normalize(x, dim=1).flatten(1), 768, [12]),
        (lambda net, x: F.interpolate(x, scale_factor=2, mode="bilinear").flatten(1)[:, ::4], 768, []),
        (lambda net, x: torch.einsum("nchw,ncij->nhi", x, x).flatten(1), 64, [12]),
        (lambda net, x: (x.flatten(2) @ x.flatten(2).transpose(1, 2)).sum(1), 12, [12]),
        (lambda net, x: torch.bmm(x.flatten(2).transpose(1, 2), x.flatten(2)).flatten(1), 4096, [12]),
        (lambda net, x: x.roll((1, 2), (2, 3)).flip(2).flatten(1), 768, [12]),
        (lambda net, x: x.std((2, 3)), 12, [12]),
        (lambda net, x: torch.var_mean(x, (2, 3))[0], 12, [12]),
        (lambda net, x: F.adaptive_max_pool2d(x, 2, return_indices=True)[0].flatten(1), 48, [12]),
    ],
)
def test_pieces_and_products_of_an_axis(between, features, sizes):
    """Sizes of the axes that 12 channels become when they are cut, split, repeated or joined."""
    network = seeded(lambda: Calls(between, features, width=12))
    analysis = analysed(network, PICTURES)
    free = free_axes(analysis)
    assert [analysis.axes[atom].size for atom in free if "conv" in free[atom]] == sizes
    if sizes:
        assert_reordering_changes_nothing(network, PICTURES)
