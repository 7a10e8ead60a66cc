"""sherman_morrison_: keep an inverse up to date while vectors arrive or leave."""

from __future__ import annotations

import torch

from mtz_ext import _checks, _native
from mtz_ext._library import register

_NAME = "sherman_morrison_"
_DTYPES = (torch.float32, torch.float64)
_HALF = (torch.float16, torch.bfloat16)
_REASONS = {1: "the update would make it indefinite (or it was not positive definite before)", 2: "NaN or Inf"}


def sherman_morrison_(
    inverse: torch.Tensor, vectors: torch.Tensor, weight: float | torch.Tensor = 1.0, check: bool = True
) -> torch.Tensor:
    """Turn A^-1 into (A + sum_q w_q x_q x_q^T)^-1, in place, for every matrix of a batch.

    Parameters
    ----------
    inverse : [..., d, d]
        Inverses of symmetric positive definite matrices; both triangles are read. Changed in place.
    vectors : [..., k, d]
        The x_q, one a row, in the element type of `inverse`, or float16 or bfloat16 for a float32 one; leading
        dimensions broadcast to those of `inverse`.
    weight : float or [..., k]
        The w_q. Negative ones take a vector out again. A tensor broadcasts to [..., k].
    check : bool
        Raise if a matrix could not be updated. This waits for the device; with False nothing does (and a CUDA graph can
        capture the call), such matrices stay as they were without notice.

    Returns
    -------
    [..., d, d]
        `inverse` itself, exactly symmetric.

    Notes
    -----
    A^-1 - w A^-1 x x^T A^-1 / (1 + w x^T A^-1 x) (Sherman and Morrison 1950), taken in blocks (Woodbury). Positive
    weights go first, so that only an update whose *end* is indefinite is refused. A matrix that is refused stays as it
    was, bit for bit, and the others are updated. In float32 start from a damped inverse (relative error below 2e-5):
    from 1e6 I it is above 1.

    Raises
    ------
    ValueError
        Shapes do not fit; with `check`, an update that would make a matrix indefinite or that meets NaN or Inf: the
        message says which matrices.
    TypeError
        `inverse` is neither float32 nor float64, or `vectors` has a type that does not go with it.
    """
    _checks.no_gradient(_NAME, inverse=inverse, vectors=vectors, weight=weight)
    if not isinstance(weight, torch.Tensor):
        weight = torch.full((), weight, dtype=torch.float64, device=inverse.device)
    _op(inverse, vectors, weight, check)
    return inverse


def _shape(inverse: torch.Tensor, vectors: torch.Tensor, weight: torch.Tensor) -> list[int]:
    """Check all shapes; the batch."""
    _checks.tensor_of(_NAME, "inverse", inverse, _DTYPES, 2)
    _checks.tensor_of(_NAME, "vectors", vectors, (*_DTYPES, *_HALF), 2)
    _checks.tensor_of(_NAME, "weight", weight, _DTYPES, 0)
    if inverse.dtype != torch.float32 or vectors.dtype not in _HALF or inverse.device != vectors.device:
        _checks.alike(_NAME, "inverse", inverse, "vectors", vectors)
    d, k = inverse.shape[-1], vectors.shape[-2]
    if inverse.shape[-2] != d:
        raise ValueError(f"{_NAME}: inverse must have shape [..., d, d], got {_checks.shape(inverse)}")
    if vectors.shape[-1] != d:
        raise ValueError(
            f"{_NAME}: vectors must have shape [..., k, {d}] to go with inverse {_checks.shape(inverse)}, "
            f"got {_checks.shape(vectors)}"
        )
    if weight.device != inverse.device:
        raise ValueError(f"{_NAME}: weight must be on {inverse.device} as inverse is, got {weight.device}")
    batch = list(inverse.shape[:-2])
    if _checks.broadcast_batch(_NAME, inverse=(inverse, 2), vectors=(vectors, 2)) != batch:
        raise ValueError(
            f"{_NAME}: leading dimensions of vectors must broadcast to those of inverse, {batch}, "
            f"got {_checks.shape(vectors)}"
        )
    if weight.dim() and (
        weight.shape[-1] not in (1, k)
        or _checks.broadcast_batch(_NAME, inverse=(inverse, 2), weight=(weight, 1)) != batch
    ):
        raise ValueError(f"{_NAME}: weight must broadcast to {[*batch, k]}, got {_checks.shape(weight)}")
    return batch


def _implementation(inverse: torch.Tensor, vectors: torch.Tensor, weight: torch.Tensor, check: bool = True) -> None:
    batch = _shape(inverse, vectors, weight)
    d, k = inverse.shape[-1], vectors.shape[-2]
    matrices = inverse.detach()
    flat = _checks.as_batch(matrices, batch, 2)
    in_place = flat.stride(-1) == 1 and flat.data_ptr() == inverse.data_ptr()
    if not in_place:
        flat = matrices.contiguous().view(-1, d, d)
    x = vectors.detach()
    if x.device.type == "cpu" and x.dtype in _HALF:
        x = x.float()
    x = _checks.as_batch(x, batch, 2)
    w = _checks.as_batch(weight.detach().double().expand(*batch, k), batch, 1)
    status = torch.empty(flat.shape[0], dtype=torch.int32, device=inverse.device)
    _native.call(
        "sherman_morrison",
        flat,
        *(_native.scalar(flat), _native.scalar(x), flat.shape[0], d, k, flat.data_ptr(), *flat.stride()[:2]),
        *(x.data_ptr(), *x.stride(), w.data_ptr(), *w.stride(), status.data_ptr()),
    )
    if not in_place:
        matrices.copy_(flat.view(matrices.shape))
    if check:
        _raise_for(status, batch)


def _raise_for(status: torch.Tensor, batch: list[int]) -> None:
    """ValueError naming the matrices that were not updated."""
    if not status.any():
        return
    failed = status.nonzero().flatten().tolist()
    listed = []
    for flat in failed[:5]:
        index = [int(i) for i in torch.unravel_index(torch.tensor(flat), batch)] if batch else []
        listed.append(f"matrix {index or ''}".rstrip() + f": {_REASONS[int(status[flat])]}")
    more = f"; and {len(failed) - 5} more" if len(failed) > 5 else ""
    raise ValueError(
        f"{_NAME}: {len(failed)} of {status.numel()} matrices left as they were, the others updated. "
        f"{'; '.join(listed)}{more}. Take out only what was put in, damp the matrix, or pass check=False."
    )


def _fake(inverse: torch.Tensor, vectors: torch.Tensor, weight: torch.Tensor, check: bool = True) -> None:
    _shape(inverse, vectors, weight)


_op = register(
    f"{_NAME}(Tensor(a!) inverse, Tensor vectors, Tensor weight, bool check=True) -> ()", _implementation, _fake
)
