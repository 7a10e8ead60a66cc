"""conv2d_second_moment against unfolding, and by its identities."""

from __future__ import annotations

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st

import mtz_ext
from mtz_ext import reference
from tests import cases

BOUND = {torch.float32: 1e-6, torch.float64: 1e-14}

# N, C, H, W, kernel, stride, padding, dilation, groups
CASES = [
    (3, 4, 7, 6, 3, 1, 1, 1, 1),
    (2, 19, 9, 8, 3, 1, 1, 1, 1),
    (2, 33, 8, 8, 3, 1, 0, 1, 1),
    (2, 32, 8, 8, 3, 1, 2, 1, 1),
    (1, 99, 5, 5, 3, 1, 1, 1, 1),
    (19, 16, 4, 4, 3, 1, 1, 1, 1),
    (2, 20, 3, 3, 3, 1, 1, 1, 1),
    (2, 20, 3, 3, 3, 1, 0, 1, 1),
    (2, 20, 2, 9, 3, 1, 1, 1, 1),
    (2, 17, 11, 13, 5, 1, 2, 1, 1),
    (2, 17, 11, 13, (5, 3), 1, (0, 2), 1, 1),
    (2, 17, 11, 13, (1, 7), 1, (0, 3), 1, 1),
    (2, 17, 12, 13, 3, 1, 2, 2, 1),
    (2, 17, 12, 13, 2, 1, 1, 1, 1),
    (2, 17, 12, 13, 3, 2, 1, 1, 1),
    (2, 17, 12, 13, 3, (2, 1), (1, 0), (1, 2), 1),
    (2, 3, 15, 15, 7, 2, 3, 1, 1),
    (2, 17, 12, 13, 1, 1, 0, 1, 1),
    (2, 17, 12, 13, 1, 2, 0, 1, 1),
    (2, 17, 6, 5, 1, 1, 2, 1, 1),
    (2, 12, 9, 9, 3, 1, 1, 1, 3),
    (2, 12, 9, 9, 3, 1, 1, 1, 12),
    (2, 40, 9, 9, 3, 1, 1, 1, 2),
    (0, 4, 5, 5, 3, 1, 1, 1, 1),
    (2, 0, 5, 5, 3, 1, 1, 1, 1),
    (1, 1, 1, 1, 1, 1, 0, 1, 1),
    (1, 1, 1, 1, 3, 1, 1, 1, 1),
    (111, 19, 3, 1, (3, 1), 1, (1, 0), 1, 1),
    (40, 24, 20, 20, 3, 1, 1, 1, 1),
]


def scale(moment: torch.Tensor) -> torch.Tensor:
    """sqrt(out_ii out_jj): what an element can reach (Cauchy-Schwarz), so what its terms' rounding is relative to."""
    diagonal = moment.diagonal(dim1=-2, dim2=-1)
    return (diagonal.unsqueeze(-1) * diagonal.unsqueeze(-2)).sqrt()


def check(x, arguments, dtype, assert_within):
    got, expected = mtz_ext.conv2d_second_moment(x, *arguments), reference.conv2d_second_moment(x, *arguments)
    assert got.dtype == dtype
    if expected.numel():
        # where an offset sees few pixels the border strips leave little of the whole; its rounding stays: measured 7e-7
        assert_within(got, expected, BOUND[dtype], scale(expected).clamp_min(expected.abs().max() * 0.1))
    assert torch.equal(got, got.mT), "exactly symmetric"


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_unfolding(case, dtype, device, assert_within):
    x = cases.randn(*case[:4], dtype=dtype, device=device)
    if 0 in case[:2]:
        got = mtz_ext.conv2d_second_moment(x, *case[4:])
        assert got.shape == (1, case[1] * 9, case[1] * 9) and not got.any()
        return
    check(x, case[4:], dtype, assert_within)


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("case", CASES[1:3] + CASES[9:10] + CASES[14:17], ids=str)
def test_every_instruction_set(isa, case, dtype, assert_within):
    check(cases.randn(*case[:4], dtype=dtype), case[4:], dtype, assert_within)


def test_same_and_valid_padding(device):
    x = cases.randn(2, 3, 9, 10, device=device)
    assert torch.equal(
        mtz_ext.conv2d_second_moment(x, 3, padding="same"), mtz_ext.conv2d_second_moment(x, 3, padding=1)
    )
    assert torch.equal(mtz_ext.conv2d_second_moment(x, 3, padding="valid"), mtz_ext.conv2d_second_moment(x, 3))
    even = mtz_ext.conv2d_second_moment(x, 4, padding="same")
    by_hand = mtz_ext.conv2d_second_moment(F.pad(x, (1, 2, 1, 2)), 4)
    assert torch.allclose(even, by_hand, rtol=1e-5, atol=1e-4)


def test_column_order_is_that_of_the_weight(device, assert_within):
    """The energy of a convolution's output is wT H w."""
    x, w = cases.randn(3, 20, 9, 9, device=device), cases.randn(5, 20, 3, 3, seed=1, device=device)
    moment = mtz_ext.conv2d_second_moment(x, 3, padding=1)[0]
    rows = w.flatten(1)
    energy = F.conv2d(x, w, padding=1).double().square().sum((0, 2, 3))
    assert_within((rows @ moment * rows).sum(1), energy, 1e-5)


def test_strides(device, assert_within):
    x = cases.randn(4, 12, 18, 40, device=device)
    views = [x[::2, :, ::2, ::3], x.transpose(1, 2)[:, :12, :, :12], x.to(memory_format=torch.channels_last), x.mT]
    views += [x[:1].expand(3, 12, 18, 40), x[:, 3:4].expand(4, 5, 18, 40)]
    for view in views:
        check(view, (3, 1, 1), torch.float32, assert_within)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gives_float32(dtype, device, assert_within):
    check(cases.randn(2, 16, 9, 9, device=device).to(dtype), (3, 1, 1), torch.float32, assert_within)


@hypothesis.settings(deadline=None, max_examples=30)
@hypothesis.given(
    n=st.integers(1, 4), c=st.integers(1, 40), h=st.integers(3, 12), w=st.integers(3, 12),
    stride=st.integers(1, 2), padding=st.integers(0, 2), seed=st.integers(0, 2**20),
)  # fmt: skip
def test_identities(n, c, h, w, stride, padding, seed):
    x = cases.randn(n, c, h, w, seed=seed, dtype=torch.float64)
    moment = mtz_ext.conv2d_second_moment(x, 3, stride, padding)
    size = 1e-12 * moment.abs().max()
    parts = mtz_ext.conv2d_second_moment(x[:1], 3, stride, padding) + (
        mtz_ext.conv2d_second_moment(x[1:], 3, stride, padding) if n > 1 else 0
    )
    assert (moment - parts).abs().max() <= size, "a sum over samples"
    padded = mtz_ext.conv2d_second_moment(F.pad(x, [padding] * 4), 3, stride)
    assert (moment - padded).abs().max() <= size, "padding is with zeros"
    order = torch.randperm(c, generator=cases.generator(seed))
    columns = (order.unsqueeze(1) * 9 + torch.arange(9)).flatten()
    permuted = mtz_ext.conv2d_second_moment(x[:, order], 3, stride, padding)
    assert (permuted - moment[:, columns][:, :, columns]).abs().max() <= size, "permuting channels"
    flipped = mtz_ext.conv2d_second_moment(x.flip(2, 3), 3, 1, padding)
    unflipped = mtz_ext.conv2d_second_moment(x, 3, 1, padding)
    mirror = (torch.arange(c).unsqueeze(1) * 9 + torch.arange(8, -1, -1)).flatten()
    assert (flipped - unflipped[:, mirror][:, :, mirror]).abs().max() <= 1e-12 * unflipped.abs().max(), "mirror image"
    assert torch.linalg.eigvalsh(moment[0]).min() >= -1e-10 * moment.abs().max(), "positive semidefinite"


def test_independent_of_threads(same_on_any_threads):
    x = cases.randn(6, 40, 9, 9)
    same_on_any_threads(lambda: mtz_ext.conv2d_second_moment(x, 3, padding=1))
    same_on_any_threads(lambda: mtz_ext.conv2d_second_moment(x, 3, 2, 1))
    same_on_any_threads(lambda: mtz_ext.conv2d_second_moment(x[:, :3], 5, 1, 2))
    same_on_any_threads(lambda: mtz_ext.conv2d_second_moment(x, 3, groups=8))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("stride", [1, 2])
def test_values_that_are_not_finite_are_named(value, stride, device):
    x = cases.randn(3, 20, 6, 6, device=device)
    x[2, 17, 5, 4] = value
    with pytest.raises(ValueError, match=r"x must be finite, got (nan|inf) at \[2, 17, 5, 4\]"):
        mtz_ext.conv2d_second_moment(x, 3, stride, 1)
    assert mtz_ext.conv2d_second_moment(x, 3, stride, 1, check=False).isnan().all()


def test_without_a_check_the_result_is_the_same(device):
    x = cases.randn(3, 20, 6, 6, device=device)
    assert torch.equal(mtz_ext.conv2d_second_moment(x, 3, check=False), mtz_ext.conv2d_second_moment(x, 3))


X = torch.ones(2, 4, 5, 5)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((X[0], 3), ValueError, r"x must have at least 4 dimensions|x must have shape \[N, C, H, W\]"),
        ((X, 6), ValueError, r"kernel_size \[6, 6\] .* must fit into the padded image"),
        ((X, 3, 1, 0, 3), ValueError, r"dilation \[3, 3\] must fit"),
        ((X, 3, 1, 0, 1, 3), ValueError, r"groups must divide the 4 channels .* got 3"),
        ((X, 3, 0), ValueError, r"stride must be an int >= 1 .* got 0"),
        ((X, 3, 1, -1), ValueError, r"padding must be an int >= 0 .* got -1"),
        ((X, 3, 2, "same"), ValueError, r'padding="same" needs stride 1'),
        ((X, 3, 1, "full"), ValueError, r"padding must be .* got 'full'"),
        ((X, (3, 3, 3)), ValueError, r"kernel_size must be an int .* two of them"),
        ((X.long(), 3), TypeError, r"x must be float32 .* got int64"),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        mtz_ext.conv2d_second_moment(*arguments)
