"""What the ablations switch off, and the search for the largest share."""

from __future__ import annotations

import contextlib
import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import mtzip
from bench.paper import __main__ as command
from bench.paper import ablated, largest_share, methods, resnets, run
from bench.paper.case import Case, fewer_tests
from mtzip import within
from mtzip.demo.tasks import Task
from mtzip.merging import pairing, sweep


class Net(nn.Module):
    """One hidden layer on six inputs."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.fc2(torch.relu(self.fc1(x)))


class Conv(nn.Module):
    """One convolution of two channels and a head."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(2, 6, 3, bias=False), nn.Linear(6, 3)

    def forward(self, x):
        return self.fc(torch.relu(self.conv(x)).mean((2, 3)))


def small_case(make=Net, shape=(6,), **settings) -> Case:
    torch.manual_seed(0)
    x, y = torch.randn(300, *shape), torch.randint(3, (300,))
    tasks = {name: Task(name, x[:200], y[:200], x[200:], y[200:], 3) for name in "ab"}
    networks = {name: make().eval() for name in "ab"}
    return Case("small", networks, tasks, "?", ("mtzip",), calibration=150, **settings)


def test_moment_of_pixels_by_hand():
    # Two channels, two places: columns c0p0 c0p1 c1p0 c1p1.
    full = torch.tensor([[1.0, 9, 2, 9], [9, 3, 9, 4], [2, 9, 5, 9], [9, 4, 9, 7]])
    expected = torch.tensor([[2.0, 0, 3, 0], [0, 2, 0, 3], [3, 0, 6, 0], [0, 3, 0, 6]])
    assert torch.equal(ablated.of_pixels(full, (2,)), expected)


def test_euclidean_pairs_disregard_how_much_inputs_vary():
    """The copy's rows are swapped: by what varies they pair one way, by the weights alone the other way."""
    a, b = Net(), Net()
    with torch.no_grad():
        a.fc1.weight.zero_()
        a.fc1.weight[:, 0] = torch.arange(5.0)  # the only input that varies much
        a.fc1.weight[:, 1:] = 3 * torch.eye(5)  # and what nearly never does
        a.fc1.bias.zero_()
        b.fc1.weight.copy_(a.fc1.weight)
        b.fc1.weight[:, 1:] = a.fc1.weight[:, 1:].roll(1, 0)
        b.fc1.bias.zero_()
    x = torch.randn(400, 6) * torch.tensor([1.0, *[1e-6] * 5])
    networks, inputs = {"a": a, "b": b}, {"a": x, "b": x}

    def orders(context):
        with context():
            zipped = mtzip.zip_networks(networks, inputs, method="mtz", share={"fc1": 3})
        first, second = (torch.as_tensor(zipped.orders[task]["fc1"])[:3] for task in "ab")
        return sorted(zip(first.tolist(), second.tolist(), strict=True))

    assert all(i == j for i, j in orders(contextlib.nullcontext))
    assert all(j == (i + 1) % 5 for i, j in orders(ablated.euclidean_pairs))


@pytest.mark.parametrize("context", [ablated.euclidean_pairs, ablated.equal_rows, ablated.moment_of_pixels])
def test_context_is_undone(context):
    before = pairing.match_axis, within.sensitivities, sweep.collect
    with pytest.raises(KeyError), context():
        assert (pairing.match_axis, within.sensitivities, sweep.collect) != before
        raise KeyError
    assert (pairing.match_axis, within.sensitivities, sweep.collect) == before


@pytest.mark.parametrize("name", ["rows count alike", "no refit, pixel moments"])
def test_ablation_changes_the_zip(name):
    case = small_case(Conv, (2, 6, 6))
    plain = "no refit" if name.startswith("no refit") else "mtzip"
    found = [methods.METHODS[m].make(case, case.images(0), 0)["a"](case.tasks["a"].test_images) for m in (plain, name)]
    assert not torch.allclose(*found)


def test_planned_stores_no_more_than_the_uniform_share():
    case = small_case(share=0.6)
    uniform, planned = (methods.METHODS[name].make(case, case.images(0), 0) for name in methods.PLANNING)
    total = sum(p.numel() for network in case.networks.values() for p in network.parameters())
    assert planned.parameter_count() <= uniform.parameter_count() < total


def test_ablations_have_every_idea_once():
    assert len(set(methods.ABLATIONS)) == len(methods.ABLATIONS)
    assert not set(methods.ABLATIONS) & {*methods.BASELINES, *methods.PLANNING}


@pytest.mark.parametrize("distill", [None, "outputs", "both"])
def test_no_ablation_is_the_recipe_itself(distill):
    recipe = {} if distill is None else {"distill": distill}
    changes = [methods.METHODS[name].retrain(None) for name in methods.ablations_of(recipe)]
    usual = {"distill": distill or "outputs", "features_until": 1.0}
    assert not any(change and usual | change == usual for change in changes)
    assert len(methods.ablations_of(recipe)) == len(methods.ABLATIONS) - 1


def test_no_method_ends_with_outputs_alone_that_imitates_nothing_else():
    recipe = resnets.SEVERAL["recipe"]
    assert recipe["features_until"] < 1
    for name, method in methods.METHODS.items():
        settings = recipe | method.retrain(small_case())
        assert settings["distill"] == "both" or settings["features_until"] == 1, name


def test_fewer_tests_keep_images_with_their_labels():
    task = small_case().tasks["a"]
    few = fewer_tests(task)
    assert torch.equal(few.test_images, task.test_images[::5]) and torch.equal(few.test_labels, task.test_labels[::5])


@pytest.mark.parametrize("limit, expected", [(0.62, 0.6), (0.0, 0.0), (0.97, 0.95)])
def test_search_finds_the_largest_share_that_holds(limit, expected, monkeypatch, capsys):
    """An error that passes the limit at a known share is found to the grid."""
    tried = []

    def rows(case):
        share = 2 * (1 - case.share.parameters)
        tried.append(share)
        return iter([SimpleNamespace(worst=9.0), SimpleNamespace(worst=0.4 if share <= limit else 0.6)])

    monkeypatch.setattr(largest_share, "rows", rows)
    found = list(largest_share.search(iter([small_case(steps=1)]), quick=False))
    assert len(found) == 2 * len(tried) and len(tried) <= 5
    assert f"both: {expected:.0%}\n" in capsys.readouterr().out


def test_shares_that_are_given_are_tried_and_no_others():
    found = list(largest_share.search(iter([small_case(steps=1)]), False, 0, "cpu", (0.2, 0.3)))
    assert [(row.steps, row.share) for row in found] == [(0, "budget 90.0%"), (0, "budget 85.0%")]
    assert found[0].case.endswith(", 20% of parameters") and found[0].stored > found[1].stored


def test_rows_of_a_budget_name_it_and_the_worst_task():
    case = small_case(share=mtzip.Budget(parameters=0.9))
    before = {name: copy.deepcopy(net.state_dict()) for name, net in case.networks.items()}
    (row,) = run.rows(case)
    assert row.share == "budget 90.0%" and row.worst >= row.increase
    assert row.fraction <= 0.9
    for name, net in case.networks.items():
        assert all(torch.equal(value, before[name][key]) for key, value in net.state_dict().items())


def test_command_takes_steps(monkeypatch, capsys):
    case = small_case()
    monkeypatch.setattr(resnets, "cases", lambda quick, ablations: iter([case]))
    assert [row.steps for row in command.main(["resnets", "--steps", "1"])] == [0, 1]
    with pytest.raises(SystemExit):
        command.main(["resnets", "--steps", "-1"])
    assert "at least 0, got -1" in capsys.readouterr().err
