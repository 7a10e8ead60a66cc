"""sherman_morrison_ against inverting afresh, and by its identities."""

from __future__ import annotations

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

import mtz_ext
from mtz_ext import reference
from tests import cases

BOUND = {torch.float32: 2e-5, torch.float64: 1e-13}


def scale(inverse: torch.Tensor) -> torch.Tensor:
    """The largest element of each matrix: an update's error is relative to the matrix, not to its smallest elements."""
    return inverse.double().abs().amax((-2, -1), keepdim=True)


def check(inverse, vectors, weight, dtype, assert_within):
    expected = reference.sherman_morrison(inverse, vectors, weight)
    got = inverse.clone()
    assert mtz_ext.sherman_morrison_(got, vectors, weight) is got
    if expected.numel():
        assert_within(got, expected, BOUND[dtype], scale(expected))
    assert torch.equal(got, got.mT), "exactly symmetric"


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("k", cases.AWKWARD)
@pytest.mark.parametrize("d", cases.AWKWARD)
def test_equals_inverting_afresh(d, k, dtype, device, assert_within):
    inverse = cases.damped_inverse(2, d=d, dtype=dtype).to(device)
    check(inverse, cases.randn(2, k, d, seed=1, dtype=dtype, device=device), 1.0, dtype, assert_within)


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("batch, d, k", [((5,), 64, 64), ((3,), 144, 50), ((), 300, 33), ((), 700, 130)])
def test_every_instruction_set(isa, batch, d, k, dtype, assert_within):
    inverse = cases.damped_inverse(*batch, d=d, dtype=dtype)
    check(inverse, cases.randn(*batch, k, d, seed=1, dtype=dtype), 0.5, dtype, assert_within)


@pytest.mark.parametrize("batch", cases.BATCHES, ids=str)
def test_batches_and_weights(batch, device, assert_within):
    inverse = cases.damped_inverse(*batch, d=19).to(device)
    weight = cases.randn(*batch, 7, seed=2, device=device).abs()
    for vectors in (cases.randn(*batch, 7, 19, seed=1, device=device), cases.randn(7, 19, seed=1, device=device)):
        for w in (weight, weight.double(), weight[..., :1], weight.flatten()[:1].sum(), 0.0, 3):
            check(inverse, vectors, w, torch.float32, assert_within)


@pytest.mark.parametrize("d", [19, 64, 300])
def test_taking_out_again(d, device, assert_within):
    inverse = cases.damped_inverse(3, d=d).to(device)
    vectors = 0.3 * cases.randn(3, 20, d, seed=1, device=device)
    got = mtz_ext.sherman_morrison_(inverse.clone(), vectors)
    mtz_ext.sherman_morrison_(got, vectors, weight=-1.0)
    # taking a vector out divides by 1 - x^T A^-1 x, here down to 1/40, what putting it in rounded; measured 4e-5
    assert_within(got, inverse, 1e-4, scale(inverse))


def test_order_of_signs_does_not_matter(device, assert_within):
    """Only the end has to be positive definite: a vector is taken out before it is put in."""
    inverse = torch.eye(4, device=device).unsqueeze(0)
    vectors = torch.tensor([[[2.0, 0, 0, 0], [3.0, 0, 0, 0]]], device=device)
    weight = torch.tensor([-1.0, 1.0], device=device)
    check(inverse, vectors, weight, torch.float32, assert_within)


def test_strides(device, assert_within):
    wide = cases.damped_inverse(2, d=19).to(device)
    vectors = cases.randn(2, 19, 10, seed=1, device=device)[:, :, ::2].mT
    buffer = torch.zeros(2, 25, 40, device=device)
    views = [buffer[:, :19, :19], buffer[:, 1:20, ::2][..., :19], buffer.mT[:, :19, :19], buffer[:, :19, 3:22]]
    expected = reference.sherman_morrison(wide, vectors)
    for view in views:
        buffer.fill_(7)
        view.copy_(wide)
        untouched = buffer.sum() - view.sum()
        mtz_ext.sherman_morrison_(view, vectors)
        assert_within(view, expected, 2e-5, scale(expected))
        assert torch.isclose(buffer.sum() - view.sum(), untouched), "nothing outside the view is written"


@hypothesis.settings(deadline=None, max_examples=30)
@hypothesis.given(d=st.integers(1, 60), k=st.integers(0, 70), seed=st.integers(0, 2**20))
def test_identities(d, k, seed):
    inverse, vectors = (
        cases.damped_inverse(d=d, seed=seed, dtype=torch.float64),
        cases.randn(k, d, seed=seed, dtype=torch.float64),
    )
    matrix = torch.linalg.inv(inverse) + vectors.mT @ vectors
    got = mtz_ext.sherman_morrison_(inverse.clone(), vectors)
    eye = torch.eye(d, dtype=torch.float64)
    assert (got @ matrix - eye).abs().max() < 1e-9, "H^-1 H = I"
    half = k // 2
    parts = mtz_ext.sherman_morrison_(inverse.clone(), vectors[:half])
    mtz_ext.sherman_morrison_(parts, vectors[half:])
    assert (parts - got).abs().max() <= 1e-11 * inverse.abs().max(), "in two parts or at once"
    order = torch.randperm(d, generator=cases.generator(seed))
    permuted = mtz_ext.sherman_morrison_(inverse[order][:, order].clone(), vectors[:, order])
    assert (permuted - got[order][:, order]).abs().max() <= 1e-11 * inverse.abs().max(), "permutation equivariance"
    stacked = mtz_ext.sherman_morrison_(torch.stack([inverse, inverse]), torch.stack([vectors, 2 * vectors]))
    assert torch.equal(stacked[0], got), "stacking matrices changes nothing"


def test_independent_of_threads(same_on_any_threads):
    for batch, d, k in [((7,), 64, 40), ((), 300, 20), ((2,), 400, 70)]:
        inverse, vectors = cases.damped_inverse(*batch, d=d), cases.randn(*batch, k, d, seed=1)
        same_on_any_threads(lambda i=inverse, v=vectors: mtz_ext.sherman_morrison_(i.clone(), v))


@pytest.mark.parametrize("d", [5, 64, 300, 520])
@pytest.mark.parametrize("fault", ["indefinite update", "indefinite before", "nan vector", "inf inverse", "nan weight"])
def test_bad_matrix_is_left_and_named(d, fault, device, assert_within):
    inverse = cases.damped_inverse(2, 2, d=d).to(device)
    vectors, weight = cases.randn(2, 2, 20, d, seed=1, device=device), torch.ones(2, 2, 20, device=device)
    expected = reference.sherman_morrison(inverse, vectors)
    if fault == "indefinite update":
        weight[1, 0, 17] = -100.0
    elif fault == "indefinite before":
        inverse[1, 0] = -inverse[1, 0]
    elif fault == "nan vector":
        vectors[1, 0, 19, d - 1] = torch.nan
    elif fault == "inf inverse":
        inverse[1, 0, d - 1, d - 1] = torch.inf
    else:
        weight[1, 0, 3] = torch.nan
    before = inverse.clone()
    reason = "indefinite" if fault.startswith("indefinite") else "NaN or Inf"
    with pytest.raises(ValueError, match=rf"1 of 4 matrices left as they were.*matrix \[1, 0\]: .*{reason}"):
        mtz_ext.sherman_morrison_(inverse, vectors, weight)
    assert torch.equal(inverse[1, 0], before[1, 0]), "left as it was, bit for bit"
    good = torch.ones(2, 2, dtype=torch.bool, device=device)
    good[1, 0] = False
    assert_within(inverse[good], expected[good], 2e-5, scale(expected[good]))
    again = before.clone()
    mtz_ext.sherman_morrison_(again, vectors, weight, check=False)
    assert torch.equal(again, inverse), "check=False does the same without a word"


def test_removing_to_the_brink_is_refused(device):
    """1 - x^T A^-1 x is zero up to rounding: its sign means nothing."""
    x = cases.randn(1, 33, device=device)
    inverse = torch.eye(33, device=device) / (x @ x.mT)
    with pytest.raises(ValueError, match="indefinite"):
        mtz_ext.sherman_morrison_(inverse, x, weight=-1.0)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("d", [19, 500])
def test_half_vectors_are_those_numbers_in_float32(half, d, device):
    vectors = cases.randn(3, 7, d, dtype=half, device=device)
    inverse = cases.damped_inverse(3, d=d).to(device)
    expected = mtz_ext.sherman_morrison_(inverse.clone(), vectors.float())
    assert torch.equal(mtz_ext.sherman_morrison_(inverse, vectors), expected)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((torch.eye(4).double(), torch.ones(1, 4).half()), TypeError, r"vectors must be torch.float64"),
        ((torch.ones(3, 4), torch.ones(1, 4)), ValueError, r"inverse must have shape \[\.\.\., d, d\], got \[3, 4\]"),
        ((torch.eye(4), torch.ones(1, 5)), ValueError, r"vectors must have shape \[\.\.\., k, 4\].*got \[1, 5\]"),
        ((torch.eye(4), torch.ones(2, 1, 4)), ValueError, r"vectors must broadcast to those of inverse, \[\]"),
        ((torch.eye(4), torch.ones(1, 4), torch.ones(3)), ValueError, r"weight must broadcast to \[1\], got \[3\]"),
        ((torch.eye(4), torch.ones(1, 4).double()), TypeError, r"vectors must be torch.float32"),
        ((torch.eye(4).half(), torch.ones(1, 4).half()), TypeError, r"inverse must be float32 or float64, got float16"),
        ((torch.eye(4, requires_grad=True), torch.ones(1, 4)), ValueError, r"inverse requires grad"),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        mtz_ext.sherman_morrison_(*arguments)
