"""match_neurons against trying every choice, SciPy, and its identities."""

from __future__ import annotations

import math

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

import mtz_ext
from mtz_ext import reference
from tests import cases


def total(distances: torch.Tensor, pairs: torch.Tensor) -> float:
    return distances[pairs[:, 0], pairs[:, 1]].double().sum().item()


def assert_valid(distances: torch.Tensor, pairs: torch.Tensor, count: int) -> None:
    assert pairs.dtype == torch.int64 and pairs.shape == (*distances.shape[:-2], count, 2)
    matrices = math.prod(distances.shape[:-2])
    flat = distances.reshape(matrices, *distances.shape[-2:])
    for matrix, chosen in zip(flat, pairs.reshape(matrices, count, 2), strict=True):
        assert len(set(chosen[:, 0].tolist())) == count and len(set(chosen[:, 1].tolist())) == count
        costs = matrix[chosen[:, 0], chosen[:, 1]]
        assert (costs.diff() >= 0).all(), "cheapest pair first"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n, m", [(0, 0), (0, 3), (1, 1), (1, 19), (19, 99), (111, 99), (111, 111), (300, 200)])
def test_greedy_equals_reference(n, m, dtype, device):
    distances = cases.randn(2, n, m, dtype=dtype, device=device)
    for count in sorted({0, min(1, n, m), min(n, m) // 2, min(n, m)}):
        got = mtz_ext.match_neurons(distances, count, "greedy")
        assert_valid(distances, got, count)
        assert torch.equal(got.cpu(), reference.match_neurons(distances, count, "greedy"))


@pytest.mark.parametrize(
    "make",
    [
        lambda i, j: i * 0.0 + j * 0.0,  # all equal
        lambda i, j: i + j,  # one mutual nearest pair at a time
        lambda i, j: -(i + j),
        lambda i, j: i * j,
        lambda i, j: j + 0 * i,  # every row likes the same column
        lambda i, j: i + 0 * j,
        lambda i, j: (i - j).abs(),
        lambda i, j: ((i * 7919 + j * 104729) % 5).float(),  # many ties
        lambda i, j: torch.where((i + j) % 3 == 0, torch.inf, (i * j) % 7),
        lambda i, j: torch.where((i + j) % 2 == 0, -0.0, 0.0),
    ],
)
def test_greedy_on_structured_costs(make, device):
    i, j = torch.arange(70.0).unsqueeze(1), torch.arange(90.0).unsqueeze(0)
    distances = make(i, j).to(device).float()
    for matrix in (distances, distances.mT):
        assert torch.equal(
            mtz_ext.match_neurons(matrix, None, "greedy").cpu(), reference.match_neurons(matrix, None, "greedy")
        )


@pytest.mark.parametrize("method", ["greedy", "optimal"])
def test_hubs_take_no_quadratic_number_of_rounds(method):
    """Cost r_i + c_j: every row prefers the same column. Rescanning all rows each round would take minutes."""
    n = 1500 if method == "greedy" else 200
    distances = cases.randn(n, 1).abs() + cases.randn(1, n, seed=1).abs()
    assert_valid(distances, mtz_ext.match_neurons(distances, None, method), n)


@pytest.mark.parametrize("n, m", [(0, 2), (1, 1), (2, 4), (4, 3), (5, 5)])
def test_optimal_equals_every_choice(n, m, device):
    for seed in range(4):
        distances = cases.randn(n, m, seed=seed, device=device)
        for count in range(min(n, m) + 1):
            got = mtz_ext.match_neurons(distances, count)
            assert torch.equal(got.cpu(), reference.match_neurons(distances, count))


def exactly(distances: np.ndarray, count: int) -> float:
    """The least total of `count` pairs: a linear assignment on the square with free rows and columns."""
    n, m = distances.shape
    square = np.zeros((n + m - count, n + m - count))
    square[:n, :m] = distances - distances.min()
    square[n:, m:] = 1e9
    rows, columns = linear_sum_assignment(square)
    chosen = (rows < n) & (columns < m)
    return distances[rows[chosen], columns[chosen]].astype(np.float64).sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n, m", [(19, 99), (99, 19), (111, 111), (200, 150)])
def test_optimal_equals_scipy(n, m, dtype):
    """At full count SciPy's assignment, below it a linear assignment on the (n + m - count) square."""
    distances = cases.randn(n, m, dtype=dtype)
    for count in (1, min(n, m) // 3, min(n, m) - 1, min(n, m)):
        pairs = mtz_ext.match_neurons(distances, count)
        assert_valid(distances, pairs, count)
        assert total(distances, pairs) == pytest.approx(exactly(distances.numpy(), count), rel=1e-9, abs=1e-9)


@hypothesis.settings(deadline=None, max_examples=60)
@hypothesis.given(
    n=st.integers(1, 90),
    m=st.integers(1, 90),
    values=st.integers(1, 40),
    large=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_all_pairs_equal_scipy_where_costs_are_equal(n, m, values, large, seed):
    """Whole numbers are added up without rounding, so the totals are the same; few of them make many ties."""
    distances = torch.randint(values, (n, m), generator=cases.generator(seed)).double()
    distances = distances + 2.0**40 * (torch.arange(n)[:, None] % 3) if large else distances.float()
    pairs = mtz_ext.match_neurons(distances)
    assert_valid(distances, pairs, min(n, m))
    assert total(distances, pairs) == distances.numpy()[linear_sum_assignment(distances.numpy())].sum(dtype=np.float64)
    turned = mtz_ext.match_neurons(distances.mT)
    assert total(distances.mT, turned) == total(distances, pairs)


@pytest.mark.parametrize(
    "make",
    [
        lambda n: cases.randn(n, n),
        lambda n: torch.randint(4, (n, n), generator=cases.generator(1)).float(),  # many ties
        lambda n: torch.zeros(n, n),
        lambda n: mtz_ext.neuron_distances(cases.randn(n, 6), cases.randn(n, 6, seed=1)),
        # every row likes the same columns: energy of a row + energy of a column - what they have in common
        lambda n: cases.randn(n, 1).square() + cases.randn(1, n, seed=1).square() + 0.1 * cases.randn(n, n, seed=2),
        lambda n: torch.arange(n).float()[:, None] * torch.arange(n).float(),
    ],
    ids=["normal", "few values", "equal", "rows", "hubs", "products"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_part_of_a_large_square_equals_scipy(make, dtype):
    """From 128 rows on the cheapest pairs of about the number are found by an auction with a cap."""
    distances = make(150).to(dtype)
    for count in (1, 37, 75, 135, 149):
        pairs = mtz_ext.match_neurons(distances, count)
        assert_valid(distances, pairs, count)
        assert total(distances, pairs) == pytest.approx(exactly(distances.numpy(), count), rel=1e-7, abs=1e-7)


def test_all_pairs_of_neurons_that_resemble_each_other():
    """Distances of nearly equal rows: bids are long here, and shortest paths finish what they leave."""
    a = cases.randn(300, 8)
    distances = mtz_ext.neuron_distances(a, a[torch.randperm(300, generator=cases.generator(3))] + 1e-3)
    pairs = mtz_ext.match_neurons(distances)
    rows, columns = linear_sum_assignment(distances.numpy())
    assert total(distances, pairs) == pytest.approx(distances.double().numpy()[rows, columns].sum(), rel=1e-9)


def test_optimal_is_not_the_cheapest_of_a_full_assignment():
    distances = torch.tensor([[1.0, 2.0], [1.5, 9.0]])
    assert mtz_ext.match_neurons(distances, 1).tolist() == [[0, 0]]
    assert mtz_ext.match_neurons(distances, 2).tolist() == [[1, 0], [0, 1]]


@hypothesis.settings(deadline=None, max_examples=40)
@hypothesis.given(n=st.integers(1, 25), m=st.integers(1, 25), seed=st.integers(0, 2**20), data=st.data())
def test_identities(n, m, seed, data):
    count = data.draw(st.integers(1, min(n, m)))
    distances = cases.randn(n, m, seed=seed)
    greedy, optimal = (mtz_ext.match_neurons(distances, count, how) for how in ("greedy", "optimal"))
    assert total(distances, optimal) <= total(distances, greedy) + 1e-6
    assert torch.equal(greedy, mtz_ext.match_neurons(distances, None, "greedy")[:count]), "greedy is a prefix of itself"
    assert torch.equal(greedy, mtz_ext.match_neurons(distances.mT, count, "greedy").flip(-1)), "transpose"
    order = torch.randperm(n, generator=cases.generator(seed))
    for how, pairs in (("greedy", greedy), ("optimal", optimal)):
        permuted = mtz_ext.match_neurons(distances[order], count, how)
        assert torch.equal(order[permuted[:, 0]], pairs[:, 0]) and torch.equal(permuted[:, 1], pairs[:, 1]), how
    stacked = mtz_ext.match_neurons(torch.stack([distances, distances + 1]), count, "greedy")
    assert torch.equal(stacked[0], greedy), "stacking matrices changes nothing"


def test_strides_and_threads(same_on_any_threads):
    wide = cases.randn(4, 60, 80)
    view = wide[::2, 5:45:2, ::3].mT
    expected = mtz_ext.match_neurons(view.contiguous(), 15, "greedy")
    assert torch.equal(mtz_ext.match_neurons(view, 15, "greedy"), expected)
    same_on_any_threads(lambda: mtz_ext.match_neurons(wide, None, "greedy"))
    large = cases.randn(400, 300)
    same_on_any_threads(lambda: mtz_ext.match_neurons(large, None, "greedy"))
    same_on_any_threads(lambda: mtz_ext.match_neurons(large.abs().cumsum(0).cumsum(1), None, "greedy"))
    same_on_any_threads(lambda: mtz_ext.match_neurons(wide, 33, "optimal"))
    same_on_any_threads(lambda: mtz_ext.match_neurons(wide, None, "optimal"))
    for any_way in (view, view.mT, wide.mT):
        assert torch.equal(mtz_ext.match_neurons(any_way), mtz_ext.match_neurons(any_way.contiguous()))


@pytest.mark.parametrize("method", ["greedy", "optimal"])
def test_nan_is_named(method, device):
    distances = cases.randn(2, 3, 19, 11, device=device)
    distances[1, 2, 17, 10] = torch.nan
    distances[1, 2, 18, 0] = torch.nan
    with pytest.raises(ValueError, match=r"got nan at \[1, 2, 17, 10\]"):
        mtz_ext.match_neurons(distances, 4, method)
    pairs = mtz_ext.match_neurons(distances, 4, method, check=False)
    assert pairs[1, 2].eq(-1).all()
    assert torch.equal(pairs[0], mtz_ext.match_neurons(distances[0], 4, method)), "the others are matched"


def test_optimal_needs_finite_costs():
    distances = torch.zeros(3, 4)
    distances[1, 2] = torch.inf
    with pytest.raises(ValueError, match=r"finite, got inf at \[1, 2\]"):
        mtz_ext.match_neurons(distances, 2)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((torch.ones(3, 4), 4), ValueError, r"count must be from 0 to min\(n, m\) = 3 .*got 4"),
        ((torch.ones(3, 4), -1), ValueError, r"count must be .* got -1"),
        ((torch.ones(3, 4), 2, "best"), ValueError, r"method must be one of greedy, optimal, got 'best'"),
        ((torch.ones(3),), ValueError, r"distances must have at least 2 dimensions"),
        ((torch.ones(3, 4).int(),), TypeError, r"distances must be float32 or float64, got int32"),
        (([[1.0]],), TypeError, r"distances must be a torch.Tensor, got list"),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        mtz_ext.match_neurons(*arguments)
