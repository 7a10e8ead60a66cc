"""``correspondence=``: the layers that the user says answer to each other."""

from __future__ import annotations

import copy

import pytest
import torch
from nets import Functional, axes_of, mlp, noise, seeded, why
from torch import nn

import mtzip
from mtzip.inputs import as_batch
from mtzip.trace.analysis import Analysis
from mtzip.trace.correspond import correspond
from mtzip.trace.export import export

X = noise(200, 6)


def analysed(**networks):
    return [Analysis(export(task, network, as_batch(X))) for task, network in networks.items()]


def deep_and_shallow():
    return analysed(a=seeded(lambda: mlp(hidden=(8, 5, 4))), b=seeded(lambda: mlp(hidden=(7, 5)), 1))


def test_a_given_pair_takes_the_place_of_the_walks():
    """Of three hidden layers and two, the user pairs the last ones: the walk's second pair goes."""
    found = correspond(deep_and_shallow(), [{"a": "4", "b": "2"}])
    assert axes_of(found) == {"0": (8, 7), "4": (4, 5)}
    assert why(found, 0)["2"] == "no layer of the other networks answers to it"


def test_first_paired_with_last():
    """Layers that are alone must not push a pair out of the order: a's first layer stands beside b's second."""
    found = correspond(deep_and_shallow(), [{"b": "2", "a": "0"}])
    assert axes_of(found) == {"0": (8, 5)}
    for task, analysis in enumerate(deep_and_shallow()):
        order = [group.layers[task].path for group in found.layers if task in group.layers]
        assert order == list(analysis.layers)


def test_the_walk_goes_on_behind_a_given_pair():
    x = noise(4, 6)

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.out = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.out(torch.relu(self.second(torch.relu(self.first(x)))))

    networks = {"a": seeded(Two), "b": seeded(Two, 1)}
    analyses = [Analysis(export(task, network, as_batch(x))) for task, network in networks.items()]
    found = correspond(analyses, [{"a": "first", "b": "second"}])
    assert axes_of(found) == {"first": (6, 6)}
    assert why(found, 0)["second"] == "its counterpart cannot be shared"  # b's head
    assert why(found, 1)["first"] == "no layer of the other networks answers to it"


def test_a_walked_pair_that_crosses_a_given_one_gives_way():
    class Parallel(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.middle, self.right = (nn.Linear(6, 4) for _ in range(3))
            self.out = nn.Linear(4, 3)

        def forward(self, x):
            return self.out(self.left(x).relu() * self.middle(x).sigmoid() / self.right(x).exp())

    found = correspond(analysed(a=seeded(Parallel), b=seeded(Parallel, 1)), [{"a": "left", "b": "right"}])
    pairs = [tuple(layer.path for layer in group.layers.values()) for group in found.layers if len(group.layers) > 1]
    assert ("left", "right") in pairs
    assert ("middle", "middle") not in pairs  # called before in one network and behind in the other
    assert why(found, 1)["middle"] == "its network calls the layers in another order"


@pytest.mark.parametrize("alone", [{"a": "0"}, {"a": "0", "b": None}])
def test_a_layer_named_alone_stays_private(alone):
    found = correspond(analysed(a=seeded(mlp), b=seeded(mlp, 1)), [alone])
    assert axes_of(found) == {"2": (5, 5)}
    assert why(found, 0)["0"] == "correspondence= leaves it alone"
    assert why(found, 1)["0"] == "no layer of the other networks answers to it"


def test_three_tasks_two_of_which_are_paired():
    found = correspond(analysed(a=seeded(mlp), b=seeded(mlp, 1), c=seeded(mlp, 2)), [{"a": "0", "c": "0"}])
    assert axes_of(found)["0"] == (8, 8)
    assert sorted(next(axis for axis in found.axes if axis.name == "0").sizes) == [0, 2]


REFUSED = [
    ({"a": "0", "b": "0"}, TypeError, "must be a list of mappings"),
    (["0"], TypeError, r"correspondence\[0\] must be a mapping"),
    ([{"a": "0", "c": "0"}], KeyError, "must name tasks among"),
    ([{"a": "0", "b": "9"}], ValueError, r"correspondence\[0\]\['b'\] must be the path .* got '9'; there is '0'"),
    ([{"a": "0", "b": 0}], ValueError, r"must be the path .* got 0"),
    ([{"a": None}], ValueError, "must name at least one layer"),
    (
        [{"a": "0", "b": "0"}, {"a": "0", "b": "2"}],
        ValueError,
        "must name a layer once, got '0' of task 'a' in groups 0",
    ),
    ([{"a": "0", "b": "2"}, {"a": "2", "b": "0"}], ValueError, "in which every network calls its layers.*leave one"),
]


@pytest.mark.parametrize(("given", "error", "message"), REFUSED)
def test_refusals_name_what_was_given_and_what_to_do(given, error, message):
    with pytest.raises(error, match=message):
        correspond(analysed(a=seeded(mlp), b=seeded(mlp, 1)), given)


def test_layers_of_different_kinds_are_refused():
    x = noise(4, 2, 8, 8)
    analyses = [Analysis(export(task, seeded(Functional, at), as_batch(x))) for at, task in enumerate("ab")]
    with pytest.raises(ValueError, match=r"one kind and kernel, got 'a' conv1: conv2d 3x3, 'b' fc: linear"):
        correspond(analyses, [{"a": "conv1", "b": "fc"}])


def test_zip_networks_shares_the_pair_it_was_given():
    networks = {"a": seeded(lambda: mlp(hidden=(8, 8, 4))), "b": seeded(lambda: mlp(hidden=(7, 6)), 1)}
    before = {task: copy.deepcopy(network.state_dict()) for task, network in networks.items()}
    inputs = {"a": X, "b": noise(200, 6, seed=1)}
    given = [{"a": "2", "b": "0"}]
    zipped = mtzip.zip_networks(networks, inputs, correspondence=given)
    shared = {axis.name: axis.shared for axis in zipped.report.axes}
    assert shared == {"2": 7, "4": 4}  # the walk goes on behind the pair: a's third answers to b's second
    assert [axis.name for axis in mtzip.plan(networks, inputs, correspondence=given).axes] == list(shared)
    for task, network in networks.items():
        assert all(torch.equal(value, before[task][key]) for key, value in network.state_dict().items())
    whole = mtzip.zip_networks(networks, inputs, share=0.0, correspondence=given)
    assert all(torch.equal(whole[task](inputs[task]), networks[task](inputs[task])) for task in networks)
