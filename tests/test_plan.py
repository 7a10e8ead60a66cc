"""Pairing axes that several layers write: planted permutations are found, descent only descends."""

from __future__ import annotations

import pytest
import torch
from nets import IMAGE, CifarResNet, Residual, analysed, mlp, noise, seeded
from torch import nn

import mtzip
from bench import planning
from bench.zoo_copies import shuffled
from mtzip.inputs import as_batch
from mtzip.planning import descend
from mtzip.planning.activations import correlations, match_by_activations, same_form
from mtzip.planning.descend import Descent
from mtzip.planning.plan import observe_all, plan_axes
from mtzip.trace.correspond import correspond


def settled(network: nn.Module, x: torch.Tensor) -> nn.Module:
    """BatchNorm statistics of real inputs, so that channels differ."""
    network.train()
    with torch.no_grad():
        for _ in range(30):
            network(x)
    return network.eval()


RESIDUAL = {
    "residual": lambda: Residual(width=8, inner=6),
    "padded shortcuts": lambda: CifarResNet(blocks=2, widths=(4, 8, 16)),
}


@pytest.mark.parametrize("matching", ["optimal", "greedy", "activation"])
@pytest.mark.parametrize("make", RESIDUAL.values(), ids=RESIDUAL.keys())
def test_a_shuffled_copy_zips_onto_the_original(make, matching):
    shape = IMAGE if make is RESIDUAL["residual"] else (3, 16, 16)
    x = noise(96, *shape)
    network = settled(seeded(make), x)
    other = shuffled(network, as_batch(x), seed=3)
    zipped = mtzip.zip_networks({"a": network, "b": other}, {"a": x, "b": x}, matching=matching)
    assert all(axis.shared == min(axis.neurons.values()) for axis in zipped.report.axes)
    with torch.no_grad():
        expected = network(x)
        for task in "ab":
            assert (zipped[task](x) - expected).abs().max() < 1e-4 * expected.abs().max()


def planned(make, shape, seeds=(0, 1)):
    x = [noise(64, *shape, seed=seed) for seed in (5, 6)]
    networks = [settled(seeded(make, seed), data) for seed, data in zip(seeds, x, strict=True)]
    analyses = [analysed(network, data[:3]) for network, data in zip(networks, x, strict=True)]
    return analyses, correspond(analyses), [[as_batch(data)] for data in x]


def test_descent_lowers_the_total_and_stops_where_nothing_helps():
    analyses, correspondence, batches = planned(RESIDUAL["padded shortcuts"], (3, 16, 16))
    counts = {axis.name: min(axis.sizes.values()) for axis in correspondence.axes}
    totals = []
    for rounds in (0, 1, 8):
        observed = observe_all(analyses, correspondence, batches, None)
        descent = Descent(observed, correspondence.axes, counts, "optimal")
        totals.append(descent.run(rounds))
        for axis in correspondence.axes:
            assert sorted(observed.slots[id(axis)].order(1).tolist()) == list(range(axis.sizes[1]))
        assert totals[-1] == pytest.approx(sum(descent.cost(group) for group in descent.groups))
    assert totals[0] > totals[1] >= totals[2] > 0


def test_wide_axes_descend_too(monkeypatch):
    """Greedily, and those that several layers write are assigned as asked for in the end."""
    monkeypatch.setattr(descend, "WIDE", 1)
    asked = []
    match_neurons = descend.mtz_ext.match_neurons

    def noted(distances, count, method):
        asked.append((len(distances), method))
        return match_neurons(distances, count, method=method)

    monkeypatch.setattr(descend.mtz_ext, "match_neurons", noted)
    analyses, correspondence, batches = planned(RESIDUAL["padded shortcuts"], (3, 16, 16))
    counts = {axis.name: min(axis.sizes.values()) for axis in correspondence.axes}
    totals = []
    for rounds in (0, 8):
        descent = Descent(observe_all(analyses, correspondence, batches, None), correspondence.axes, counts, "optimal")
        totals.append(descent.run(rounds))
    assert totals[1] < totals[0]
    assert {method for _, method in asked} == {"greedy", "optimal"}
    several = [len(axis.writers) > 1 for axis in correspondence.axes]
    assert [method for _, method in asked].count("optimal") == sum(several) < len(several)


def test_costs_are_those_of_distances_taken_anew():
    """What is kept from round to round never differs from what the present pairings give."""
    analyses, correspondence, batches = planned(RESIDUAL["residual"], IMAGE)
    counts = {axis.name: min(axis.sizes.values()) - 1 for axis in correspondence.axes}
    observed = observe_all(analyses, correspondence, batches, None)
    descent = Descent(observed, correspondence.axes, counts, "optimal")
    improve, compared = descent._improve, []

    def checked(axis, matching=None):
        found = improve(axis, matching)
        compared.append((sum(descent._costs.values()), sum(descent.cost(group) for group in descent.groups)))
        return found

    descent._improve = checked
    descent.run(4)
    assert len(compared) >= len(correspondence.axes)
    for kept, anew in compared:
        assert kept == pytest.approx(anew, rel=1e-9)


def test_only_coupled_axes_are_planned_unless_by_activation():
    analyses, correspondence, batches = planned(RESIDUAL["residual"], IMAGE)
    counts = {axis.name: 3 for axis in correspondence.axes}
    found = plan_axes(analyses, correspondence, batches, counts, "refit", "optimal")
    assert [axis.name for axis, _ in found] == ["stem"]
    assert found[0][1].shared == 3
    every = plan_axes(analyses, correspondence, batches, counts, "refit", "activation")
    assert [axis.name for axis, _ in every] == [axis.name for axis in correspondence.axes]


def test_correlations_are_those_of_what_is_written_and_read():
    analyses, correspondence, batches = planned(lambda: mlp(hidden=(5, 4)), (6,))
    axis = correspondence.axes[0]
    found = correlations(analyses, correspondence, batches, [axis])[id(axis)][0, 1]
    x = torch.cat([batches[0][0].args[0], batches[1][0].args[0]])
    expected = 0
    for depth in (1, 2):  # in front of the activation and behind it
        with torch.no_grad():
            first, second = (analysis.exported.network[:depth](x).double() for analysis in analyses)
        expected = expected + torch.corrcoef(torch.cat([first, second], 1).T)[:5, 5:].nan_to_num() / 2
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert match_by_activations(axis, {(0, 1): found}, 5, "optimal").shared == 5


def test_inputs_of_different_forms_cannot_be_matched_by_activation():
    first, second = seeded(lambda: mlp(inputs=6)), seeded(lambda: mlp(inputs=7), 1)
    assert not same_form([analysed(first, noise(3, 6)), analysed(second, noise(3, 7))])
    with pytest.raises(ValueError, match="inputs of one shape"):
        mtzip.zip_networks({"a": first, "b": second}, {"a": noise(9, 6), "b": noise(9, 7)}, matching="activation")


def test_the_benchmark_plans_a_pair_of_transformers():
    row = planning.measure(planning.observed(tiny=True), "optimal", tiny=True)
    assert row.axes == 5 and row.total > 0 and row.must is None
