"""neuron_distances against its definition, and by its identities."""

from __future__ import annotations

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

import mtz_ext
from mtz_ext import reference
from tests import cases

# Measured maxima over these cases: float32 4.8e-7, float64 9e-16.
BOUND = {torch.float32: 1e-6, torch.float64: 4e-15}
SHAPES = [
    (n, m, d) for n in cases.AWKWARD for m in cases.AWKWARD for d in cases.AWKWARD if len({n, m, d}) == 3 or n == m == d
]


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_reference(shape, dtype, device, assert_within):
    n, m, d = shape
    a, b = cases.randn(n, d, dtype=dtype, device=device), cases.randn(m, d, seed=1, dtype=dtype, device=device)
    assert_within(mtz_ext.neuron_distances(a, b), reference.neuron_distances(a, b), BOUND[dtype])


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("n, m, d", [(19, 111, 99), (33, 16, 1025)])
def test_every_instruction_set(isa, n, m, d, dtype, assert_within):
    a, b = cases.randn(2, n, d, dtype=dtype), cases.randn(2, m, d, seed=1, dtype=dtype)
    assert_within(mtz_ext.neuron_distances(a, b), reference.neuron_distances(a, b), BOUND[dtype])


@pytest.mark.parametrize("batch", cases.BATCHES, ids=str)
@pytest.mark.parametrize("dtype", BOUND)
def test_batches_and_factor(batch, dtype, device, assert_within):
    a = cases.randn(*batch, 19, 11, dtype=dtype, device=device)
    b = cases.randn(*batch, 7, 11, seed=1, dtype=dtype, device=device)
    f = cases.randn(*batch, 11, 5, seed=2, dtype=dtype, device=device)
    got = mtz_ext.neuron_distances(a, b, f)
    assert got.dtype == dtype
    # a float64 factor is projected in float64: measured 2e-14 where the projected rows nearly agree
    assert_within(got, reference.neuron_distances(a, b, f), max(BOUND[dtype], 1e-13))


def test_leading_dimensions_broadcast(device, assert_within):
    a, b = cases.randn(4, 1, 5, 3, device=device), cases.randn(2, 6, 3, seed=1, device=device)
    f = cases.randn(3, 2, seed=2, device=device)
    assert_within(mtz_ext.neuron_distances(a, b, f), reference.neuron_distances(a, b, f), 1e-6)


@pytest.mark.parametrize("d", [64, 576, 4608])
def test_nearly_equal_rows(d, device, assert_within):
    """Norm expansion has no correct digit here."""
    a, b = (t.to(device) for t in cases.near_rows(64, d))
    assert_within(mtz_ext.neuron_distances(a, b), reference.neuron_distances(a, b), 1e-6)


@pytest.mark.parametrize("d", [64, 300])
def test_nearly_equal_rows_with_an_ill_conditioned_factor(d, device, assert_within):
    a, b = (t.to(device) for t in cases.near_rows(48, d))
    f = cases.factor(d, 1e4).to(device)
    assert_within(mtz_ext.neuron_distances(a, b, f), reference.neuron_distances(a, b, f), 1e-6)


def test_strides(device, assert_within):
    a, b = cases.randn(13, 40, device=device), cases.randn(40, 22, seed=1, device=device)
    f = cases.randn(9, 20, seed=2, device=device)
    views = [(a[:, ::2], b[::2, ::3].mT), (a[::3, 1:21], b[:20].mT), (a[:1, :20].expand(5, 20), b[20:, :4].mT)]
    for left, right in views:
        for given in (None, f.mT):
            expected = reference.neuron_distances(left, right, given)
            assert_within(mtz_ext.neuron_distances(left, right, given), expected, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gives_float32(dtype, device, assert_within):
    a, b = cases.randn(19, 111, dtype=dtype, device=device), cases.randn(7, 111, seed=1, dtype=dtype, device=device)
    got = mtz_ext.neuron_distances(a, b)
    assert got.dtype == torch.float32
    assert_within(got, reference.neuron_distances(a, b), 1e-6)


def rows_in_common(n: int, d: int, dtype, seed: int) -> torch.Tensor:
    """Rows at all angles to one direction, from nearly parallel to nearly orthogonal, and a row of zeros."""
    rows = cases.randn(n, d, seed=seed, dtype=dtype) * torch.logspace(1, -3, n, dtype=dtype)[:, None]
    rows = rows + cases.randn(d, seed=99, dtype=dtype)
    rows[n // 2] = 0
    return rows


@pytest.mark.parametrize("dtype, factor", [(torch.float32, False), (torch.float32, True), (torch.float64, False)])
@pytest.mark.parametrize("n, m, d", [(70, 40, 64), (33, 50, 300), (19, 21, 1025)])
def test_pairs_at_every_angle(isa, n, m, d, dtype, factor, assert_within):
    """Where products cancel pairs are recomputed, one by one or a tile at once; which are, only their rows decide."""
    a, b = rows_in_common(n, d, dtype, 0), rows_in_common(m, d, dtype, 1)
    b[: min(n, m) : 3] = a[: min(n, m) : 3]
    f = cases.randn(d, 90, seed=2) if factor else None
    got = mtz_ext.neuron_distances(a, b, f)
    assert_within(got, reference.neuron_distances(a, b, f), BOUND[dtype])
    assert not got.diagonal()[::3].any(), "equal rows are at distance 0"
    assert torch.equal(got, mtz_ext.neuron_distances(b, a, f).mT)
    order = torch.randperm(n, generator=cases.generator(3))
    assert torch.equal(got[order], mtz_ext.neuron_distances(a[order], b, f))
    assert torch.equal(got[:3, :2], mtz_ext.neuron_distances(a[:3], b[:2], f))
    assert torch.equal(got, mtz_ext.neuron_distances(a.mT.contiguous().mT, b, f))


def test_a_nan_stays_in_its_row_among_many_columns(isa):
    a, b = cases.randn(20, 100), cases.randn(18, 100, seed=1)
    a[3, 7] = float("nan")
    got = mtz_ext.neuron_distances(a, b)
    assert got[3].isnan().all() and not got[[*range(3), *range(4, 20)]].isnan().any()


sizes = st.integers(1, 40)


@hypothesis.settings(deadline=None, max_examples=30)
@hypothesis.given(n=sizes, m=sizes, d=sizes, seed=st.integers(0, 2**20))
def test_identities(n, m, d, seed):
    a, b = cases.randn(n, d, seed=seed), cases.randn(m, d, seed=seed + 1)
    distances = mtz_ext.neuron_distances(a, b)
    assert not mtz_ext.neuron_distances(a, a).diagonal().any(), "a neuron is at distance 0 from itself"
    assert torch.equal(distances, mtz_ext.neuron_distances(b, a).mT), "symmetry"
    order = torch.randperm(n, generator=cases.generator(seed))
    assert torch.equal(distances[order], mtz_ext.neuron_distances(a[order], b)), "permuting neurons permutes rows"
    twice = mtz_ext.neuron_distances(torch.stack([a, a + 1]), b)
    assert torch.equal(distances, twice[0]), "stacking matrices changes nothing"
    assert torch.equal(4 * distances, mtz_ext.neuron_distances(2 * a, 2 * b)), "homogeneous of degree two"


def test_independent_of_threads(same_on_any_threads):
    a, b = cases.randn(3, 200, 300), cases.randn(3, 150, 300, seed=1)
    f = cases.randn(300, 40, seed=2)
    same_on_any_threads(lambda: mtz_ext.neuron_distances(a, b))
    same_on_any_threads(lambda: mtz_ext.neuron_distances(a[0, :9], b[0]))
    same_on_any_threads(lambda: mtz_ext.neuron_distances(a, b, f))


def test_nan_and_inf_stay_with_their_pairs(device):
    a, b = cases.randn(19, 50, device=device), cases.randn(21, 50, seed=1, device=device)
    clean = mtz_ext.neuron_distances(a, b)
    a[3, 7], b[5, 49] = torch.nan, torch.inf
    got = mtz_ext.neuron_distances(a, b)
    assert got[3].isnan().all() and got[:3, 5].isinf().all()
    keep = torch.ones_like(got, dtype=torch.bool)
    keep[3], keep[:, 5] = False, False
    assert torch.equal(got[keep], clean[keep])


def test_inputs_are_left_alone(device):
    a, b, f = (cases.randn(5, 5, seed=s, device=device) for s in range(3))
    before = [t.clone() for t in (a, b, f)]
    mtz_ext.neuron_distances(a, b, f)
    assert all(torch.equal(x, y) for x, y in zip((a, b, f), before, strict=True))


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((torch.ones(3, 4), torch.ones(3, 5)), ValueError, r"b must have shape \[\.\.\., m, 4\].*got \[3, 5\]"),
        ((torch.ones(4), torch.ones(3, 4)), ValueError, r"a must have at least 2 dimensions, got shape \[4\]"),
        ((torch.ones(2, 3, 4), torch.ones(3, 3, 4)), ValueError, r"leading dimensions .* a \[2\], b \[3\]"),
        (
            (torch.ones(3, 4), torch.ones(3, 4), torch.ones(5, 2)),
            ValueError,
            r"factor must have shape \[\.\.\., 4, r\]",
        ),
        (
            (torch.ones(3, 4), torch.ones(3, 4).double()),
            TypeError,
            r"b must be torch.float32 as a is, got torch.float64",
        ),
        ((torch.ones(3, 4).long(), torch.ones(3, 4).long()), TypeError, r"a must be float32 .* got int64"),
        ((torch.ones(3, 4, requires_grad=True), torch.ones(3, 4)), ValueError, r"a requires grad, .* a\.detach\(\)"),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        mtz_ext.neuron_distances(*arguments)


def test_parameters_pass_under_no_grad():
    with torch.no_grad():
        out = mtz_ext.neuron_distances(torch.ones(3, 4, requires_grad=True), torch.ones(3, 4))
    assert not out.requires_grad
