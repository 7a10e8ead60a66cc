"""Wide layers from few samples: narrow coordinates change nothing, and no square matrix of the columns is formed."""

from __future__ import annotations

import pytest
import torch
from nets import mlp, noise, seeded
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mtzip
from mtzip.merging import narrow
from mtzip.merging.narrow import Narrow, Plane

WIDTH = 300


def pair(width: int = WIDTH):
    return {task: seeded(lambda: mlp(width, (30, 20), 4), at).double() for at, task in enumerate("ab")}


def inputs(count: int = 50, width: int = WIDTH):
    return {task: noise(count + at, width, seed=at).double() for at, task in enumerate("ab")}


@pytest.fixture
def used(monkeypatch):
    """Narrow coordinates for layers of 200 columns and more; the list of where they were used."""
    monkeypatch.setattr(narrow, "WIDE", 200)
    found = []
    make = Narrow.__init__
    monkeypatch.setattr(Narrow, "__init__", lambda self, *args: (found.append(args[1]), make(self, *args))[1])
    return found


def dead_and_equal(x):
    """Inputs as real ones are: pixels that never vary, samples that occur twice."""
    x = {task: value.clone() for task, value in x.items()}
    for value in x.values():
        value[:, ::7] = -0.4
        value[1::4] = value[::4][: len(value[1::4])]
    return x


@pytest.mark.parametrize("share", [1.0, 0.6])
@pytest.mark.parametrize("change", [lambda x: x, dead_and_equal])
@pytest.mark.parametrize("affine", [True, False])
def test_narrow_coordinates_change_nothing(used, monkeypatch, share, change, affine):
    x = change(inputs())
    found = mtzip.zip_networks(pair(), x, share=share, affine=affine)
    assert bool(used) == affine  # a bias that tasks share is one more column, and not of the samples
    monkeypatch.setattr(narrow, "WIDE", 10_000)
    used.clear()
    plain = mtzip.zip_networks(pair(), x, share=share, affine=affine)
    assert not used
    assert found.layouts() == plain.layouts()
    for task in "ab":
        assert all(torch.equal(order, plain.orders[task][path]) for path, order in found.orders[task].items())
    for name, value in found.state_dict().items():
        other = plain.state_dict()[name]
        assert (value - other).norm() <= 1e-6 * other.norm(), name
    for axis, other in zip(found.report.axes, plain.report.axes, strict=True):
        assert axis.difference == pytest.approx(other.difference, rel=1e-4)
    for layer, other in zip(found.report.layers, plain.report.layers, strict=True):
        assert layer.space == other.space
        assert layer.error == pytest.approx(other.error, rel=1e-6)


def test_a_point_of_the_plane_is_a_sum_of_the_two_rests():
    """Coordinates reproduce lengths and products, and come back as vectors; parallel rests and none among them."""
    basis = torch.linalg.qr(noise(40, 6).double()).Q
    rows = [noise(5, 40, seed=seed).double() for seed in (1, 2)]
    rows[1][1] = 3 * rows[0][1] + basis @ noise(6, seed=3).double()  # parallel beside the basis
    rows[0][2] = basis @ noise(6, seed=4).double()  # nothing beside it
    rows[0][3] = rows[1][3] = 0.0
    rests = [w - (w @ basis) @ basis.T for w in rows]
    plane = Plane.of(*((w, w @ basis) for w in rows))
    for one in range(2):
        for two in range(2):
            product = (rests[one] * rests[two]).sum(1)
            assert torch.allclose((plane.along[one] * plane.along[two]).sum(1), product, atol=1e-12)
    for mix in ((1.0, 0.0), (0.0, 1.0), (0.3, -2.0)):
        point = sum(m * along.T for m, along in zip(mix, plane.along, strict=True))
        back = sum(f[:, None] * rest for f, rest in zip(plane.factors(point), rests, strict=True))
        assert torch.allclose(back, sum(m * rest for m, rest in zip(mix, rests, strict=True)), atol=1e-12)


class Largest(TorchDispatchMode):
    """Remembers the most elements that any operator put out."""

    def __init__(self):
        super().__init__()
        self.found = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.found = max(self.found, leaf.numel())
        return result


@pytest.mark.parametrize("wide", [200, 10_000])
@pytest.mark.parametrize("share", [1.0, 0.6])
@pytest.mark.parametrize("method", ["refit", "mtz"])
def test_no_square_matrix_of_the_columns_from_few_samples(monkeypatch, wide, share, method):
    monkeypatch.setattr(narrow, "WIDE", wide)
    width, x = 600, inputs(40, 600)
    with Largest() as largest:
        zipped = mtzip.zip_networks(pair(width), x, share=share, method=method)
    assert zipped.report.layers[0].space == "sample"
    assert largest.found <= 4 * 40 * width, "something is larger than the samples of both tasks twice over"


def test_the_square_matrix_is_seen_where_samples_are_many():
    """What the test before would say if there were one."""
    with Largest() as largest:
        zipped = mtzip.zip_networks(pair(), inputs(400), share=1.0)
    assert zipped.report.layers[0].space == "feature"
    assert largest.found >= WIDTH**2


def test_zeros_to_keep_are_not_turned_into_other_columns(used):
    networks = pair()
    for network in networks.values():
        with torch.no_grad():
            network[0].weight[:, ::3] = 0
    zipped = mtzip.zip_networks(networks, inputs(), keep_zeros=True)
    assert used == []
    assert all((zipped[task][0].weight[:, ::3] == 0).all() for task in "ab")
