"""In-place operators: the graph computes what the network does, also where it writes into views."""

from __future__ import annotations

import pytest
import torch
from nets import IMAGE, analysed, assert_reordering_changes_nothing, free_axes, noise, seeded
from torch import nn

from mtzip.inputs import as_batch
from mtzip.merging.execute import Execution

PICTURES = noise(4, *IMAGE)


def row(x):
    x[:, 0] = 0
    return x


def rows(x):
    x[:, 1:3].mul_(2)
    return x


def pixels(x):
    x[:, :, 2:, 3] = 1
    x[..., -1] += x[..., 0]
    return x


def turned(x):
    y = x.transpose(1, 2)
    y[:, 0] += 1
    y[:, :, 3] *= 2
    return x


def flat(x):
    x.view(x.size(0), -1)[:, 5:9].neg_()
    return x


def turned_then_flat(x):
    y = x.transpose(1, 2)
    y[:, 0] = 1
    x.view(x.size(0), -1)[:, 5:9].neg_()
    return x + y.transpose(1, 2)


def view_made_before(x):
    y, z = x.transpose(1, 2), x[:, 1:]
    x.mul_(2)
    z += 1
    return x + y.transpose(1, 2) + z.sum(1, keepdim=True)


def permuted(x):
    x = x.permute(0, 2, 3, 1)
    x[..., 1] += 2
    return x.permute(0, 3, 1, 2)


def chunks(x):
    a, b = x.chunk(2, 1)
    a += 1
    b.mul_(a)
    return x


def unbound(x):
    first, *_ = x.unbind(1)
    first.zero_()
    return x


def split_of_a_view(x):
    _, b = x.transpose(1, 3).split([3, 5], 1)
    b.relu_()
    return x


def whole(x):
    x = x.contiguous()
    y = x
    y += 1
    x.clamp_(min=0)
    return x * y


def copied(x):
    y = x.clone()
    y[:, :2].copy_(x[:, 2:])
    return y - x


def strided(x):
    x[:, :, ::2].fill_(0.5)
    return x


@pytest.mark.parametrize(
    "write, sizes",
    [
        (row, [3]),
        (rows, [2]),
        (pixels, [4]),
        (turned, [3]),
        (flat, []),
        (turned_then_flat, []),
        (view_made_before, [3]),
        (permuted, [2]),
        (chunks, [2]),
        (unbound, []),
        (split_of_a_view, [4]),
        (whole, [4]),
        (copied, [2]),
        (strided, [4]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_writes_reach_everything_that_shows_the_tensor(write, sizes):
    """The graph's own values equal the network's, bit for bit; ``sizes`` of the axes that the 4 channels leave free."""

    class Writing(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(2, 4, 3, padding=1), nn.Linear(256, 3)

        def forward(self, x):
            return self.head(write(self.conv(x)).flatten(1))

    network = seeded(Writing).requires_grad_(False)
    analysis = analysed(network, PICTURES)
    execution = Execution(analysis, analysis.exported.network, [as_batch(PICTURES)])
    (output,) = next(iter(reversed(analysis.exported.graph.nodes))).args[0]
    seen = []
    execution.advance(None, {output.name: lambda: seen.append(execution.original[output.name][0])})
    assert torch.equal(seen[0], network(PICTURES))
    assert not analysis.notes
    assert [analysis.axes[atom].size for atom, writers in free_axes(analysis).items() if "conv" in writers] == sizes
    if sizes:
        assert_reordering_changes_nothing(network, PICTURES)
