"""A task added to a zipped network: weighed by stored second moments, everything else as it was."""

from __future__ import annotations

import copy
import pickle
from itertools import pairwise

import pytest
import torch
from nets import IMAGE, Branches, Functional, Residual, mlp, noise, seeded
from test_zip import calibrated, errors, inputs, some
from torch import nn

import mtzip
from mtzip.kept import sharers
from mtzip.leaf import leaves

KINDS = {
    "mlp": (lambda: mlp(6, (16, 12)), (6,)),
    "convolutions": (lambda: Functional((8, 6, 9)), IMAGE),
    "residual": (lambda: Residual(8, 6), IMAGE),
    "grouped": (Branches, IMAGE),
}


def three(kind: str):
    """Networks a, b, c whose BatchNorms fit their inputs, and those inputs."""
    make, shape = KINDS[kind]
    data = inputs(*shape)
    return {task: calibrated(seeded(make, seed), data[task]) for seed, task in enumerate("abc")}, data


def zipped_pair(networks, data, *args, **options):
    pair = {task: networks[task] for task in "ab"}
    return mtzip.zip_networks(pair, some(data, pair), *args, keep_moments=True, **options)


def outputs(zipped, data) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return {task: zipped[task](data[task]) for task in zipped}


def state(network: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in network.state_dict().items()}


def assert_same(first, second) -> None:
    assert list(first) == list(second)
    assert all(torch.equal(first[key], second[key]) for key in first)


# -- what it costs ---------------------------------------------------------------------------------------------------


def quadratic(kept) -> torch.Tensor:
    """Q = alpha (H + lambda I) of a kept layer about zero, with a column of ones for a bias that all tasks share."""
    moment = kept.moment
    covariance = moment.covariance if moment.samples is None else moment.samples.T @ moment.samples
    mean = torch.cat([moment.mean, moment.mean.new_ones(1)])
    second = torch.outer(mean, mean)
    second[:-1, :-1] += covariance
    return kept.alpha * (second + kept.damping * second.diagonal().mean() * torch.eye(len(mean), dtype=torch.float64))


def cost(merged, weights, quadratics) -> float:
    pairs = zip(weights, quadratics, strict=True)
    return sum(float(((merged - w) @ q * (merged - w)).sum()) / 2 for w, q in pairs)


def merge(weights, quadratics) -> torch.Tensor:
    right = sum(w @ q for w, q in zip(weights, quadratics, strict=True))
    return torch.linalg.solve(sum(quadratics), right.T).T


def stored_weights(zipped, networks, path: str, before: str | None) -> list[torch.Tensor]:
    """The originals' weights of a linear layer, rows and columns in the order the zipped network stores."""
    found = []
    for task in zipped:
        weight = networks[task].get_submodule(path).weight.detach().double()[zipped.orders[task][path]]
        found.append(weight if before is None else weight[:, zipped.orders[task][before]])
    return found


def test_joining_costs_what_a_joint_merge_costs_and_less_than_a_chain(assert_within):
    """Every layer, in float64, at the same pairing and the same second moments."""
    make = lambda: mlp(6, (16, 12, 10))  # noqa: E731
    networks = {task: seeded(make, seed) for seed, task in enumerate("abc")}
    networks = {task: network.double() for task, network in networks.items()}
    data = inputs(6, dtype=torch.float64)
    zipped = mtzip.add_network(zipped_pair(networks, data, 1.0, "mtz", affine=False), "c", networks["c"], data["c"])
    for before, path in pairwise([None, "0", "2", "4"]):
        q = [quadratic(zipped.moments.layers[task][path]) for task in "abc"]
        w = stored_weights(zipped, networks, path, before)
        biases = [networks[t].get_submodule(path).bias.detach()[zipped.orders[t][path]] for t in "abc"]
        w = [torch.cat([weight, bias[:, None]], 1) for weight, bias in zip(w, biases, strict=True)]
        leaf = zipped["a"].get_submodule(path)
        added = torch.cat([leaf.weight, leaf.bias[:, None]], 1).detach()
        joint = cost(merge(w, q), w, q)
        ab = merge(w[:2], q[:2])
        chain = merge([ab, w[2]], [(q[0] + q[1]) / 2, q[2]])
        assert_within(torch.tensor(cost(added, w, q)), torch.tensor(joint), 1e-6)
        assert cost(added, w, q) < cost(chain, w, q)

