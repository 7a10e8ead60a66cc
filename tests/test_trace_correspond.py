"""Which layer of one network answers to which of another, and which axes they have in common."""

from __future__ import annotations

from nets import (
    IMAGE,
    Functional,
    Residual,
    axes_of,
    corresponding,
    functional_as_sequential,
    mlp,
    noise,
    seeded,
    why,
)
from torch import nn
from torch.nn import functional as F

PICTURES = noise(4, *IMAGE)


def test_a_class_answers_to_a_sequential():
    """Other names, other activations, other widths, other heads: the same graph."""
    pair = (seeded(Functional), PICTURES), (seeded(lambda: functional_as_sequential((4, 5, 9), 10), 1), PICTURES)
    _, found = corresponding(*pair)
    assert axes_of(found) == {"conv1": (6, 4), "conv2": (5, 5), "fc": (7, 9)}
    assert why(found, 0) == {"head": "it is an output of the network"}
    assert why(found, 1) == {"out": "it is an output of the network"}


def test_another_depth_leaves_the_rest_private_by_name():
    x = noise(4, 6)
    _, found = corresponding((seeded(lambda: mlp(hidden=(8, 5, 4))), x), (seeded(lambda: mlp(hidden=(7, 5)), 1), x))
    assert axes_of(found) == {"0": (8, 7), "2": (5, 5)}
    assert why(found, 0) == {
        "4": "its counterpart cannot be shared",
        "6": "no layer of the other networks answers to it",
    }
    assert why(found, 1) == {"4": "it is an output of the network"}


def test_another_kernel_leaves_everything_behind_it_private():
    def make(kernel):
        return nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, kernel), nn.ReLU(), nn.Conv2d(4, 3, 1), nn.Flatten()
        )

    _, found = corresponding((seeded(lambda: make(3)), PICTURES), (seeded(lambda: make(1), 1), PICTURES))
    assert axes_of(found) == {"0": (4, 4)}
    assert set(why(found, 0)) == {"2", "4"}


def test_other_input_sizes_still_share_rows():
    _, found = corresponding((seeded(lambda: mlp(6)), noise(4, 6)), (seeded(lambda: mlp(9), 1), noise(4, 9)))
    assert axes_of(found) == {"0": (8, 8), "2": (5, 5)}


def test_operands_of_an_addition_may_change_places():
    class Swapped(Residual):
        def forward(self, x):
            x = F.relu(self.stem_bn(self.stem(x)))
            for enter, mid, leave, end in zip(self.ins, self.mids, self.outs, self.ends, strict=True):
                x = F.relu(end(leave(F.relu(mid(enter(x))))) + x)
            return self.head(x.mean((2, 3)))

    _, found = corresponding((seeded(Residual), PICTURES), (seeded(Swapped, 1), PICTURES))
    assert axes_of(found) == {"stem": (6, 6), "ins.0": (5, 5), "ins.1": (5, 5)}


def test_residual_streams_tied_differently_stay_apart():
    """What is one axis in one network and two in the other: never an error, and never one axis in both."""

    class Plain(nn.Module):
        def __init__(self, skip):
            super().__init__()
            self.a, self.b, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
            self.skip = skip

        def forward(self, x):
            x = self.a(x).relu()
            y = self.b(x).relu()
            return self.head(y + x if self.skip else y)

    x = noise(4, 6)
    _, found = corresponding((seeded(lambda: Plain(True)), x), (seeded(lambda: Plain(False), 1), x))
    assert axes_of(found) == {"a": (6, 6)}
    assert "tied to another axis" in why(found, 1)["b"]


def test_three_networks_have_an_axis_in_common():
    x = noise(4, 6)
    _, found = corresponding(*[(seeded(lambda w=w: mlp(hidden=(w, 5)), w), x) for w in (8, 7, 9)])
    assert axes_of(found) == {"0": (8, 7, 9), "2": (5, 5, 5)}
