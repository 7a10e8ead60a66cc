"""``zip_networks`` from end to end, on small networks of every supported kind."""

from __future__ import annotations

import copy

import pytest
import torch
from nets import (
    IMAGE,
    Functional,
    analysed,
    mlp,
    seeded,
)
from torch import nn
from zipping import KINDS, METHODS, assert_finite, calibrated, errors, inputs, pair, zip_pair

from mtzip.network.leaf import SharedLayer, leaves
from mtzip.trace.permute import permute_

# -- what must hold for every kind of network and every method -------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_on_every_kind_of_network(kind, method):
    """Originals unchanged, finite weights, no more parameters than before, copies that are right to the last layer."""
    make, shape = KINDS[kind]
    networks, data = pair(make), inputs(*shape)
    networks["a"].train()
    networks["b"][0].weight.requires_grad_(False) if isinstance(networks["b"], nn.Sequential) else None
    before = {task: copy.deepcopy(network.state_dict()) for task, network in networks.items()}
    flags = {task: [p.requires_grad for p in network.parameters()] for task, network in networks.items()}
    zipped = zip_pair(networks, data, method=method)
    for task, network in networks.items():
        assert network.training == (task == "a") == zipped[task].training
        assert [p.requires_grad for p in network.parameters()] == flags[task]
        assert network.state_dict().keys() == before[task].keys()
        assert all(torch.equal(value, before[task][key]) for key, value in network.state_dict().items())
        assert type(zipped[task]) is type(network)
    assert zipped.training
    assert zipped.report.axes
    assert all(axis.shared == min(axis.neurons.values()) for axis in zipped.report.axes)
    assert zipped.report.parameters_before == sum(p.numel() for n in networks.values() for p in n.parameters())
    assert zipped.report.parameters_after == zipped.parameter_count() < zipped.report.parameters_before
    zipped.eval()
    assert_finite(zipped, data)
    if method == "refit":
        assert max(errors(zipped, networks, data).values()) < 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_a_copy_zips_onto_the_original(kind, method):
    """A network and its copy with every hidden axis in another order are one network, whatever the method."""
    make, shape = KINDS[kind]
    data = inputs(*shape)
    data["b"] = data["a"]
    networks = {task: calibrated(seeded(make), data[task]) for task in "ab"}
    analysis = analysed(networks["b"], data["b"])
    generator = torch.Generator().manual_seed(3)
    orders = {
        atom: torch.randperm(analysis.axes[atom].size, generator=generator)
        for atom in analysis.axes.roots()
        if analysis.axes[atom].pinned is None
    }
    permute_(networks["b"], analysis, orders)
    zipped = zip_pair(networks, data, method=method, reconstructions=0)
    assert max(errors(zipped, networks, data).values()) < 1e-8


@pytest.mark.parametrize("share", [0, 0.0, {}])
@pytest.mark.parametrize("method", METHODS)
def test_nothing_shared_is_the_originals_bit_for_bit(share, method):
    networks, data = pair(Functional), inputs(*IMAGE)
    zipped = zip_pair(networks, data, share, method)
    for task, network in networks.items():
        assert not list(leaves(zipped[task]))
        state = zipped[task].state_dict()
        assert all(torch.equal(state[key], value) for key, value in network.state_dict().items())
        assert torch.equal(zipped[task](data[task]), network(data[task]))
    assert zipped.report.parameters_after == zipped.report.parameters_before


@pytest.mark.parametrize("method", METHODS)
def test_the_same_call_gives_the_same_bits(method):
    networks, data = pair(Functional), inputs(*IMAGE)
    torch.manual_seed(5)
    first = zip_pair(networks, data, 0.7, method)
    torch.manual_seed(6)
    state = torch.get_rng_state()
    second = zip_pair(networks, data, 0.7, method)
    assert torch.equal(torch.get_rng_state(), state)
    first, second = first.state_dict(), second.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


# -- how much is shared ----------------------------------------------------------------------------------------------


def stored(widths_a, widths_b, counts, columns, inner, norms, biases, classes, affine: bool) -> int:
    """Parameters a zipped pair of chains stores, by arithmetic: shared blocks once.

    Args:
        widths_a, widths_b, counts: of every hidden axis, and how many neurons of it are shared.
        columns: inputs of the first layer, all shared.
        inner: columns of every layer for each unit of the axis before it, head included.
        norms, biases: whether a BatchNorm follows each hidden layer, whether each layer has a bias, head included.
        classes: outputs of the two heads.
        affine: private scale and shift.
    """
    total, before = 0, (columns, columns, columns)
    for a, b, k, each, norm, bias in zip(widths_a, widths_b, counts, inner, norms, biases, strict=False):
        columns_a, columns_b, shared = (size * each for size in before)
        total += k * (shared + (columns_a - shared) + (columns_b - shared))  # shared rows
        total += (a - k) * columns_a + (b - k) * columns_b
        if norm:
            total += 2 * (a + b) + (a + b - k if bias else 0)
        elif affine and k:
            total += a + b + 2 * k
        elif bias:
            total += a + b - k
        before = a, b, k
    for width, size in zip(before, classes, strict=False):
        total += size * (width * inner[-1] + biases[-1])
    return total


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("share", [1.0, 0.5, {"fc": 0.5, "conv1": 3}])
def test_stored_parameters_are_what_arithmetic_says(method, share):
    networks = pair(lambda: Functional((6, 5, 7)), lambda: Functional((4, 5, 9), 10))
    zipped = zip_pair(networks, inputs(*IMAGE), share, method)
    smaller = {"conv1": 4, "conv2": 5, "fc": 7}
    if isinstance(share, float):
        counts = [round(share * width) for width in smaller.values()]
    else:
        counts = [3, 0, 4]
    assert {axis.name: axis.shared for axis in zipped.report.axes} == {
        name: count for name, count in zip(smaller, counts, strict=True) if count
    }
    expected = stored(
        (6, 5, 7), (4, 5, 9), counts, 2, (9, 9, 4, 1), (1, 0, 0), (0, 1, 1, 1), (3, 10), method == "refit"
    )
    assert zipped.parameter_count() == zipped.report.parameters_after == expected
    assert zipped.report.parameters_after - zipped.report.parameters_before == sum(
        layer.after - layer.before for layer in zipped.report.layers
    )


def test_counts_fractions_and_axes_not_named():
    networks = pair(lambda: mlp(hidden=(8, 5)), lambda: mlp(hidden=(6, 7), classes=4))
    zipped = zip_pair(networks, inputs(6), {"0": 1})
    assert {axis.name: axis.shared for axis in zipped.report.axes} == {"0": 1}
    assert isinstance(zipped["a"][0], SharedLayer)
    assert type(zipped["a"][2]) is nn.Linear
    zipped = zip_pair(networks, inputs(6), {"0": 1.0, "2": 0.25})
    assert {axis.name: (axis.neurons, axis.shared) for axis in zipped.report.axes} == {
        "0": ({"a": 8, "b": 6}, 6),
        "2": ({"a": 5, "b": 7}, 1),
    }


def test_shared_weights_are_one_tensor():
    zipped = zip_pair(pair(lambda: mlp(norm=True)), inputs(6))
    a, b = zipped["a"][0], zipped["b"][0]
    assert a.is_whole
    assert a.weight is b.weight
    assert isinstance(a, nn.Linear)
    assert "shared.0.weight_rows_0_1_columns_0_1" in zipped.state_dict()


def test_less_sharing_costs_less():
    networks, data = pair(lambda: mlp(hidden=(24, 16))), inputs(6, count=1000)
    worst = [max(errors(zip_pair(networks, data, share), networks, data).values()) for share in (0.25, 0.5, 1.0)]
    assert worst[0] < worst[1] < worst[2]
