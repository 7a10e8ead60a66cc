"""The paper's experiments layer by layer: pruned networks, steps to recover, and the turns of a pair."""

from __future__ import annotations

import math

import pytest
import torch
from test_paper import network, task_of

import mtzip
from bench.paper import draw, in_turn, run, sparse
from bench.paper.case import Case
from bench.paper.measure import wrong
from bench.paper.recovery import Recovery, shown
from bench.paper.table import write_csv
from mtzip.demo.train import Recipe

DENSITIES = {"conv": 0.5, "fc1": 0.1, "fc2": 0.3}


@pytest.fixture
def small(monkeypatch, tmp_path):
    """A network of a name that the experiment knows, and an empty cache."""
    monkeypatch.setenv("MTZIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(sparse.DENSITIES, "small", DENSITIES)
    monkeypatch.setitem(sparse.RECIPES, "small", Recipe(epochs=2, rate=0.02, batch=50))
    monkeypatch.setitem(in_turn.TURNS, "small", (0.5, 1.0))


def counts(net) -> dict[str, int]:
    return {path: int((net.get_submodule(path).weight != 0).sum()) for path in DENSITIES}


def test_pruned_networks_have_the_largest_weights_of_every_layer_and_are_retrained(small):
    original, task = network(0), task_of("a")
    before = {key: value.clone() for key, value in original.state_dict().items()}
    found = sparse.pruned("small", original, task, 0)
    assert counts(found) == {"conv": 90, "fc1": 2880, "fc2": 48}
    for path in DENSITIES:
        weight, stays = original.get_submodule(path).weight, found.get_submodule(path).weight != 0
        assert weight.abs()[stays].min() >= weight.abs()[~stays].max()
        assert not torch.equal(found.get_submodule(path).weight[stays], weight[stays])
    assert all(torch.equal(before[key], value) for key, value in original.state_dict().items())
    again = sparse.pruned("small", original, task, 0)  # from the cache
    assert all(torch.equal(a, b) for a, b in zip(found.state_dict().values(), again.state_dict().values(), strict=True))
    again.fc1.weight.sum().backward()
    assert (again.fc1.weight.grad == 1).all()  # nothing holds the zeros any more


class Answers(dict):
    """Networks that err on the first ``bad`` test images of task a."""

    def __init__(self, task):
        self.bad, self.looks, truth = 0, 0, torch.eye(4)[task.test_labels]

        def answer(x):
            self.looks += 1
            return torch.cat([1 - truth[: self.bad], truth[self.bad :]])

        super().__init__(a=answer)


def test_recovery_is_the_first_look_within_a_tenth_of_a_point():
    task = task_of("a")
    zipped = Answers(task)
    case = Case("x", {}, {"a": task}, "?", (), every=10)
    recovery = Recovery(zipped, case, wrong(zipped, case.tasks))
    for step, bad in ((0, 5), (5, 0), (10, 1), (20, 0), (30, 3)):
        zipped.bad = bad
        recovery(step)
    assert recovery.steps == 20  # one of a hundred images is a point; step 5 is no time to look
    assert zipped.looks == 4  # before, 0, 10 and 20: not at 5, and no more once it has recovered
    never = Recovery(zipped, Case("x", {}, {"a": task}, "?", ()), wrong(zipped, case.tasks))
    never(0)
    assert never.steps == math.inf and zipped.looks == 5


def test_recovery_sees_the_weights_of_now():
    """Of leaves that keep assembled weights, after a fused step, which leaves no trace."""
    tasks = {"a": task_of("a"), "b": task_of("b", 4, 1)}
    networks = {"a": network(0), "b": network(1)}
    case = Case("x", networks, tasks, "?", (), every=1)
    zipped = mtzip.zip_networks(networks, case.images(0), {"fc1": 0.5})
    recovery = Recovery(zipped, case, {task: torch.zeros(100) for task in "ab"})
    recovery(0)
    optimizer = torch.optim.Adam(zipped.parameters(), lr=1.0, fused=True)
    sum(zipped[task](tasks[task].train_images[:50]).square().sum() for task in "ab").backward()
    optimizer.step()
    recovery(1)
    now = wrong({task: zipped.extract(task) for task in "ab"}, tasks)
    expected = 50 * sum(values.mean().item() for values in now.values())
    assert recovery.increases[1] == pytest.approx(expected)
    assert recovery.increases[0] != recovery.increases[1]


def test_steps_to_recover_are_the_median_over_seeds():
    assert shown([10], 100) == "10" and shown([0, 40, math.inf], 100) == "40"
    assert shown([0, math.inf, math.inf], 100) == "> 100"


def test_turns_of_a_pair(small):
    task = task_of("a")
    networks, tasks = {"a": network(0), "b": network(1)}, {"a": task, "b": task}
    found = list(in_turn.cases("small", "pair", networks, tasks, "?", quick=False))
    shares = [{"conv": 0.5}, {"conv": 1.0}, {"conv": 1.0, "bn": 0.5}]
    assert [case.share for case in found[:3]] == shares
    half = len(found) // 2
    assert [case.share for case in found[:half]] == [case.share for case in found[half:]]
    assert {(case.name, case.keep_zeros) for case in found} == {("pair, dense", False), ("pair, sparse", True)}
    assert all(counts(net)["fc1"] == 2880 for case in found[half:] for net in case.networks.values())
    methods = [case.methods for case in found[half:]]
    assert set(methods[:-1]) == {("mtzip", "zeros counted")}
    assert methods[-1] == ("mtzip", "zeros counted", "zeros lost")
    quick = list(in_turn.cases("small", "pair", networks, tasks, "?", quick=True))
    assert len(quick) == half and all(set(case.share.values()) == {1.0} for case in quick)
    assert quick[0].tasks["a"] is quick[0].tasks["b"] and len(quick[0].tasks["a"].test_labels) == 20


def test_rows_say_what_is_not_zero_and_how_long_it_took(small, tmp_path):
    tasks = {"a": task_of("a"), "b": task_of("b", 4, 1)}
    pruned = {name: sparse.pruned("small", network(seed), tasks[name], seed) for seed, name in enumerate("ab")}
    methods = ("mtzip", "zeros counted", "zeros lost")
    share = {"conv": 1.0, "fc1": 0.5}
    case = Case("pair, sparse", pruned, tasks, "?", methods, share, 2, 200, keep_zeros=True, every=1)
    rows = list(run.rows(case))
    assert [(row.method, row.steps) for row in rows] == [(method, steps) for method in methods for steps in (0, 2)]
    sizes = {(row.method, row.steps): row.nonzero for row in rows}
    assert sizes["zeros counted", 2] < sizes["mtzip", 2] < sizes["zeros lost", 2]
    assert 0 <= sizes["mtzip", 2] - sizes["mtzip", 0] <= 20  # biases, zero in front of a BatchNorm, and no weight
    assert {row.share for row in rows} == {"conv, fc1 50%"}
    assert all(row.recovered in ("0", "1", "2", "> 2") if row.steps else row.recovered == "" for row in rows)
    plain = list(run.rows(Case("pair", pruned, tasks, "?", ("mtzip",), share, 2, 200, keep_zeros=True)))
    assert [(row.errors, row.recovered) for row in plain] == [
        (row.errors, "") for row in rows[:2]
    ]  # looking changes nothing
    write_csv(rows, tmp_path / "rows.csv")
    draw.main(["layers", str(tmp_path / "rows.csv"), str(tmp_path / "picture.png")])
    assert (tmp_path / "picture.png").stat().st_size > 1000


@pytest.mark.parametrize("methods, lines", [(("mtzip",), 2), (("mtzip", "one after another", "no substitution"), 3)])
def test_a_picture_of_several_networks_has_a_line_a_method(methods, lines):
    rows = [
        {"share": "90%", "method": method, "original": " / ".join("1" * count), "increase": "1.5", "worst": "2.5"}
        for method in methods
        for count in (3, 4)
    ]
    (panel,) = draw.several(rows).axes
    assert len(panel.lines) == lines
    assert all(line.get_xdata().tolist() == [3, 4] for line in panel.lines)
