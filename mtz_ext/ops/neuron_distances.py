"""neuron_distances: what it costs, to second order, that one neuron stands for another."""

from __future__ import annotations

import torch

from mtz_ext import _checks, _native
from mtz_ext._library import register

_NAME = "neuron_distances"
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def neuron_distances(a: torch.Tensor, b: torch.Tensor, factor: torch.Tensor | None = None) -> torch.Tensor:
    """Functional difference of every pair of neurons: 1/2 |(a_i - b_j) F|^2.

    With F F^T the parallel sum of the tasks' curvatures this is the least increase of the two tasks' layer-wise squared
    errors when neurons i and j are merged (He, Zhou, Thiele 2018, eq. 7 and 8); without a factor, half the squared
    Euclidean distance.

    Parameters
    ----------
    a : [..., n, d]
        Incoming weights of n neurons, one a row.
    b : [..., m, d]
        Of m neurons; same element type and device.
    factor : [..., d, r], optional
        F. Leading dimensions of all three broadcast.

    Returns
    -------
    [..., n, m]
        In the element type of `a`; float32 for float16 and bfloat16.

    Notes
    -----
    Nearly equal neurons are the ones that matter, and every pair comes out right to 1e-6 relative (float32) however
    close the rows are: differences are taken before squares, in float64 where there is a factor. Equal rows give 0. NaN
    and Inf spread to their own pairs only, except from `factor`. Not differentiable: inputs that require grad are
    refused.
    Equivalent to ``0.5 * torch.cdist(a @ F, b @ F, compute_mode="donot_use_mm_for_euclid_dist") ** 2`` in float64.

    Raises
    ------
    TypeError
        Element types differ or are not floating point.
    ValueError
        Shapes do not fit, or the tensors are on different devices.
    """
    _checks.no_gradient(_NAME, a=a, b=b, factor=factor)
    return _op(a, b, factor)


def _shape(a: torch.Tensor, b: torch.Tensor, factor: torch.Tensor | None) -> list[int]:
    """Check all shapes; the batch of the result."""
    _checks.tensor_of(_NAME, "a", a, _DTYPES, 2)
    _checks.tensor_of(_NAME, "b", b, _DTYPES, 2)
    _checks.alike(_NAME, "a", a, "b", b)
    if a.shape[-1] != b.shape[-1]:
        raise ValueError(
            f"{_NAME}: b must have shape [..., m, {a.shape[-1]}] to go with a {_checks.shape(a)}, "
            f"got {_checks.shape(b)}"
        )
    if factor is None:
        return _checks.broadcast_batch(_NAME, a=(a, 2), b=(b, 2))
    _checks.tensor_of(_NAME, "factor", factor, _DTYPES, 2)
    _checks.alike(_NAME, "a", a, "factor", factor)
    if factor.shape[-2] != a.shape[-1]:
        raise ValueError(f"{_NAME}: factor must have shape [..., {a.shape[-1]}, r], got {_checks.shape(factor)}")
    return _checks.broadcast_batch(_NAME, a=(a, 2), b=(b, 2), factor=(factor, 2))


def _result_dtype(a: torch.Tensor) -> torch.dtype:
    return torch.float64 if a.dtype == torch.float64 else torch.float32


def _implementation(a: torch.Tensor, b: torch.Tensor, factor: torch.Tensor | None = None) -> torch.Tensor:
    batch = _shape(a, b, factor)
    out = torch.empty(*batch, a.shape[-2], b.shape[-2], dtype=_result_dtype(a), device=a.device)
    if a.device.type == "cpu" and a.dtype in (torch.float16, torch.bfloat16):
        a, b, factor = a.float(), b.float(), None if factor is None else factor.float()
    if factor is not None:
        a, b = _project("a", a, factor), _project("b", b, factor)
    a, b = _checks.as_batch(a, batch, 2), _checks.as_batch(b, batch, 2)
    _native.call(
        _NAME,
        a,
        *(_native.scalar(a), _native.scalar(out), *a.shape[:2], *b.shape[1:]),
        *(a.data_ptr(), *a.stride(), b.data_ptr(), *b.stride(), out.data_ptr()),
    )
    return out


def _project(name: str, x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """[..., n, d], [..., d, r] -> [..., n, r], in float64.

    Rows 1e-4 apart that are projected in float32 keep two digits, and three if the projection is rounded to it.
    """
    if x.device.type != "cpu":
        return x.detach().double() @ factor.detach().double()
    batch = _checks.broadcast_batch(_NAME, **{name: (x, 2), "factor": (factor, 2)})
    x, factor = _checks.as_batch(x, batch, 2), _checks.as_batch(factor, batch, 2)
    out = torch.empty(*batch, x.shape[1], factor.shape[2], dtype=torch.float64)
    _native.call(
        "projection",
        x,
        *(_native.scalar(x), *x.shape, factor.shape[2]),
        *(x.data_ptr(), *x.stride(), factor.data_ptr(), *factor.stride(), out.data_ptr()),
    )
    return out


def _fake(a: torch.Tensor, b: torch.Tensor, factor: torch.Tensor | None = None) -> torch.Tensor:
    return a.new_empty([*_shape(a, b, factor), a.shape[-2], b.shape[-2]], dtype=_result_dtype(a))


_op = register(f"{_NAME}(Tensor a, Tensor b, Tensor? factor=None) -> Tensor", _implementation, _fake)
