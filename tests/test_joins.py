"""Slots that some of several tasks share: who joins whom, what it costs, and what comes out of a zip with them."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from nets import IMAGE, Branches, Functional, Residual, analysed, mlp, noise, seeded
from test_plan import settled
from torch import nn
from zipping import assert_finite, errors, inputs, some

import mtzip
from bench.zoo_copies import shuffled
from mtzip.inputs import as_batch
from mtzip.merging.joins import Forming
from mtzip.merging.match import slots_of
from mtzip.network.layout import Run
from mtzip.network.leaf import leaves
from mtzip.planning.partial import partial_axes
from mtzip.trace.correspond import correspond


def clusters(*sizes: int, seed: int = 0):
    """Points [n, 3] of every task, and the cost of joining: how much squared distances from a slot's mean grow."""
    points = [noise(size, 3, seed=10 * seed + at, dtype=torch.float64) for at, size in enumerate(sizes)]

    def cost(members, neurons, scales, new):
        known = torch.stack([points[m][neurons[:, at]] for at, m in enumerate(members)], 1)
        shape = (len(known), sizes[new], -1, 3)
        every = torch.cat([known[:, None].expand(shape), points[new][None, :, None].expand(shape)], 2)
        return spread(every) - spread(known)[:, None], None

    return points, Forming(sizes, cost)


def spread(points: torch.Tensor) -> torch.Tensor:
    """Summed squared distance [...] of points [..., k, d] from their mean."""
    return (points - points.mean(-2, keepdim=True)).square().sum((-1, -2))


def check(formed, points, joins: int) -> None:
    """Each neuron in one slot at most, so many joins, and every slot's cost that of its members."""
    for task, column in enumerate(formed.table.T):
        used = column[column >= 0]
        assert len(used.unique()) == len(used) and (used < len(points[task])).all()
    assert int((formed.table >= 0).sum()) - len(formed.table) == joins
    for row, cost in zip(formed.table.tolist(), formed.costs.tolist(), strict=True):
        members = torch.stack([points[task][neuron] for task, neuron in enumerate(row) if neuron >= 0])
        assert cost == pytest.approx(float(spread(members)), abs=1e-12)


SIZES = [(7, 7, 7), (5, 8, 6), (9, 4, 12), (6, 6, 6, 6), (3, 9, 5, 7)]


@pytest.mark.parametrize("matching", ["optimal", "greedy"])
@pytest.mark.parametrize("sizes", SIZES)
def test_as_many_joins_as_common_slots_make_and_never_dearer(sizes, matching):
    for seed, count in product(range(3), range(min(sizes) + 1)):
        points, forming = clusters(*sizes, seed=seed)
        joins = count * (len(sizes) - 1)
        common, partial = (forming.form(count, matching, way) for way in (False, True))
        check(common, points, joins)
        check(partial, points, joins)
        assert ((common.table >= 0).sum(1) == len(sizes)).all() and len(common.table) == count
        assert partial.costs.sum() <= common.costs.sum() + 1e-12


def test_partial_slots_are_cheaper_where_the_choice_is_free():
    lower = 0
    for seed in range(10):
        _, forming = clusters(12, 12, 12, seed=seed)
        lower += forming.form(6, "optimal", True).costs.sum() < 0.9 * forming.form(6, "optimal", False).costs.sum()
    assert lower == 10


def test_equal_costs_still_make_so_many_joins():
    """All prices tie: the number of joins is that asked for all the same."""
    forming = Forming((4, 5, 3), lambda members, neurons, scales, new: (torch.ones(len(neurons), (4, 5, 3)[new]), None))
    for joins in range(8):
        counts = forming._split(joins)
        assert sum(counts) == joins and all(0 <= c <= size for c, size in zip(counts, (5, 3), strict=True))


def test_slots_of_sets_stand_together():
    table = torch.tensor([[3, 1, -1], [0, 2, 1], [-1, 0, 2], [1, 4, -1], [2, 3, 0]])
    slots = slots_of(table, (0, 1, 2), (5, 6, 4), torch.arange(5.0))
    assert slots.sets == {(0, 1, 2): 2, (0, 1): 2, (1, 2): 1}
    assert slots.shared == 5 and slots.costs.tolist() == [1, 4, 3, 0, 2]
    assert slots.order(0).tolist() == [0, 2, 1, 3, 4]
    assert slots.order(1).tolist() == [2, 3, 4, 1, 0, 5]
    assert slots.order(2).tolist() == [1, 0, 2, 3]
    assert slots.runs(1, (0, 1, 2)) == (Run((0, 1, 2), 2), Run((0, 1), 2), Run((1, 2), 1), Run((1,), 1))
    assert slots.runs(1, (0, 1)) == (Run((0, 1), 4), Run((1,), 2))


class Itself(nn.Module):
    """A stream that a layer reads and writes, and a hidden axis behind it."""

    def __init__(self):
        super().__init__()
        self.stem, self.loop, self.out = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        return self.head(torch.relu(self.out(x + self.loop(x))))


@pytest.mark.parametrize(
    "make, shape, expected",
    [
        (lambda: mlp(hidden=(8, 5)), (6,), {"0"}),
        (lambda: mlp(hidden=(5, 8)), (6,), {"2"}),  # the wider
        (lambda: mlp(hidden=(5, 9, 6)), (6,), {"0", "4"}),  # those at the ends have one neighbour
        (lambda: Residual(8, 6), IMAGE, {"ins.0", "ins.1"}),
        (Itself, (6,), {"out"}),  # rows and columns of ``loop`` are one axis
    ],
)
def test_no_layer_connects_two_axes_of_partial_slots(make, shape, expected):
    analyses = [analysed(seeded(make, seed), noise(3, *shape), task) for seed, task in enumerate("abc")]
    assert partial_axes(analyses, correspond(analyses)) == expected
    assert partial_axes(analyses[:2], correspond(analyses[:2])) == set()


# -- whole networks --------------------------------------------------------------------------------------------------


def zipped_three(networks, data, share, **options):
    return mtzip.zip_networks(networks, some(data, networks), share, **options)


@pytest.mark.parametrize("method", ["refit", "mtz"])
def test_a_copy_shares_with_its_original_and_a_stranger_with_nobody(method):
    """Half of the joins of an axis are those of a copy: they cost nothing, the others are not made."""
    data = inputs(6)
    data["b"] = data["a"]
    first, stranger = seeded(lambda: mlp(hidden=(8, 6))), seeded(lambda: mlp(hidden=(8, 6)), 5)
    networks = {"a": first, "b": shuffled(first, as_batch(data["a"]), seed=3), "c": stranger}
    zipped = zipped_three(networks, data, {"0": 4}, slots="some", method=method)
    (axis,) = zipped.report.axes
    assert [(shared.tasks, shared.neurons) for shared in axis.sets] == [(("a", "b"), 8)]
    assert axis.used("a") == axis.used("b") == 8 and axis.used("c") == 0
    assert max(errors(zipped, networks, data).values()) < 1e-8
    common = zipped_three(networks, data, {"0": 4}, method=method)
    assert errors(common, networks, data)["c"] > 1e-4


KINDS = {
    "mlp": (lambda: mlp(6, (16, 12)), (6,)),
    "convolutions": (lambda: Functional((8, 6, 9)), IMAGE),
    "residual": (lambda: Residual(8, 6), IMAGE),
    "grouped": (Branches, IMAGE),
}


@pytest.mark.parametrize("method", ["refit", "mtz", "average"])
@pytest.mark.parametrize("kind", KINDS)
def test_as_many_parameters_and_all_that_follows(kind, method, tmp_path):
    make, shape = KINDS[kind]
    data = inputs(*shape)
    networks = {task: settled(seeded(make, seed), data[task]) for seed, task in enumerate("abc")}
    common, partial = (zipped_three(networks, data, 0.5, method=method, slots=slots) for slots in ("all", "some"))
    sets = [[set(shared.tasks) for shared in axis.sets] for axis in partial.report.axes]
    assert any(len(tasks) < 3 for found in sets for tasks in found) and all(sets)
    assert "by a, b" in str(partial.report) and "by a, b" not in str(common.report)
    scales = {
        slots: sum(p.numel() for name, p in zipped.named_parameters() if name.endswith("scale"))
        for slots, zipped in (("all", common), ("some", partial))
    }
    stored = [zipped.parameter_count() - scales[slots] for slots, zipped in (("all", common), ("some", partial))]
    assert stored[0] == stored[1]
    assert_finite(partial, data)
    mtzip.save(partial, tmp_path / "z.safetensors")
    loaded = mtzip.load(tmp_path / "z.safetensors", {task: make() for task in "abc"}).eval()
    partial.eval()
    assert all(torch.equal(loaded[task](data[task]), partial[task](data[task])) for task in "abc")
    assert loaded.report.axes == partial.report.axes
    together = partial(some(data, networks))
    assert all((together[t] - partial[t](data[t])).abs().max() < 1e-5 for t in "abc")
    before = sum(errors(partial, networks, data).values())
    mtzip.retrain(partial, data, steps=20, progress=False)
    assert sum(errors(partial, networks, data).values()) < before


def test_rows_of_every_set_are_jointly_optimal(assert_within):
    """The published merge, from samples alone: the first layer's rows of tasks that share them, by normal equations."""
    data = inputs(6)
    networks = {task: seeded(lambda: mlp(hidden=(10, 5)), seed) for seed, task in enumerate("abc")}
    damping = 1e-3
    zipped = zipped_three(networks, data, {"0": 5}, slots="some", method="mtz", damping=damping, affine=False)
    first = {task: next(leaf for _, leaf in leaves(zipped[task])) for task in "abc"}
    tasks = list("abc")
    orders = {task: zipped.orders[task]["0"].tolist() for task in tasks}
    checked = 0
    for at, task in enumerate(tasks):
        start = 0
        for run in first[task].layout.rows:
            if len(run.tasks) == 2 and run.tasks[0] == at:
                total = right = 0
                for member in run.tasks:
                    x = torch.cat([data[tasks[member]], torch.ones(len(data["a"]), 1)], 1).double()
                    moment = x.T @ x / len(x)
                    q = moment + damping * moment.diagonal().mean() * torch.eye(7)
                    rows = rows_of(first[tasks[member]].layout.rows, run.tasks)
                    layer = networks[tasks[member]][0]
                    own = torch.cat([layer.weight, layer.bias[:, None]], 1).detach().double()
                    chosen = own[[orders[tasks[member]][row] for row in rows]]
                    total, right = total + q, right + q @ chosen.T
                expected = torch.linalg.solve(total, right).T
                got = torch.cat([first[task].weight, first[task].bias[:, None]], 1)[start : start + run.size]
                assert_within(got.detach().double(), expected, 1e-5)
                checked += run.size
            start += run.size
    assert checked > 2


def rows_of(runs, tasks) -> list[int]:
    """Positions of the rows that exactly ``tasks`` store."""
    owners = [run.tasks for run in runs for _ in range(run.size)]
    return [row for row, found in enumerate(owners) if found == tasks]


def test_another_task_joins_partial_slots():
    data = inputs(6)
    networks = {task: seeded(lambda: mlp(6, (16, 12)), seed) for seed, task in enumerate("abc")}
    zipped = zipped_three(networks, data, 0.5, slots="some", keep_moments=True)
    added = mtzip.add_network(zipped, "d", seeded(lambda: mlp(6, (16, 12)), 9), data["a"], share=0.5)
    assert sum(axis.used("d") for axis in added.report.axes) == 8 + 6
    assert_finite(added, {**data, "d": data["a"]})


@pytest.mark.parametrize("matching", ["greedy", "activation"])
def test_other_matchings(matching):
    data = inputs(*IMAGE)
    networks = {task: settled(seeded(lambda: Residual(8, 6), seed), data[task]) for seed, task in enumerate("abc")}
    zipped = zipped_three(networks, data, 0.5, slots="some", matching=matching)
    joins = {axis.name: sum(axis.used(t) for t in "abc") - axis.shared for axis in zipped.report.axes}
    assert joins == {axis.name: 2 * round(0.5 * min(axis.neurons.values())) for axis in zipped.report.axes}
    assert_finite(zipped, data)


def test_two_tasks_and_everything_shared_are_the_same_either_way():
    data = inputs(6)
    networks = {task: seeded(mlp, seed) for seed, task in enumerate("abc")}
    pair = {task: networks[task] for task in "ab"}
    for chosen, share in ((pair, 0.5), (networks, 1.0)):
        ways = [zipped_three(chosen, data, share, slots=slots) for slots in ("all", "some")]
        for first, second in zip(*(way.state_dict().values() for way in ways), strict=True):
            assert torch.equal(first, second)


def test_slots_are_checked():
    data = inputs(6)
    networks = {task: seeded(mlp, seed) for seed, task in enumerate("abc")}
    with pytest.raises(ValueError, match="slots must be one of"):
        zipped_three(networks, data, 0.5, slots="most")
    with pytest.raises(ValueError, match="slots must be 'all' with a Budget"):
        zipped_three(networks, data, mtzip.Budget(parameters=0.7), slots="some")


# -- axes that some of the tasks have --------------------------------------------------------------------------------


class OneBlock(nn.Module):
    """A stem of some kernel size and one residual block: networks of which the stems do not correspond."""

    def __init__(self, kernel: int):
        super().__init__()
        self.stem = nn.Conv2d(2, 6, kernel, padding=kernel // 2)
        self.inner = nn.Conv2d(6, 5, 3, padding=1)
        self.outer = nn.Conv2d(5, 6, 3, padding=1)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        return self.head(torch.relu(x + self.outer(torch.relu(self.inner(x)))).mean((2, 3)))


@pytest.mark.parametrize("slots", ["all", "some"])
@pytest.mark.parametrize("method", ["refit", "mtz", "average"])
@pytest.mark.parametrize("third", ["all of it", "outer with a", "outer with b"])
def test_layers_of_a_stream_that_other_tasks_have(third, method, slots):
    """Every writer of the stream is another set of tasks, and no layer need be of all of them."""
    given = {
        "all of it": [dict.fromkeys("abc", "inner"), dict.fromkeys("abc", "outer")],
        "outer with a": [dict.fromkeys("ac", "outer")],
        "outer with b": [dict.fromkeys("bc", "outer")],
    }
    kernels = (("a", 3), ("b", 3), ("c", 5))
    networks = {task: seeded(lambda k=k: OneBlock(k), seed) for seed, (task, k) in enumerate(kernels)}
    data = inputs(*IMAGE)
    zipped = zipped_three(networks, data, 0.7, method=method, correspondence=given[third], slots=slots)
    (stream,) = (axis for axis in zipped.report.axes if axis.name == "stem")
    assert stream.neurons == {"a": 6, "b": 6, "c": 6}
    # The average pairs a stream where its first layer is merged, which only a and b have.
    assert (stream.used("c") == 0) == (method == "average") and stream.used("a") >= 2
    assert_finite(zipped, data)
