"""match_neurons: which neuron of one network stands for which of another."""

from __future__ import annotations

import numpy as np
import torch

from mtz_ext import _checks, _native
from mtz_ext._library import register

_NAME = "match_neurons"
_DTYPES = (torch.float32, torch.float64)
_METHODS = ("optimal", "greedy")


def match_neurons(distances: torch.Tensor, count: int | None = None, method: str = "optimal") -> torch.Tensor:
    """One-to-one pairs (row, column) of a cost matrix, cheapest pair first.

    Parameters
    ----------
    distances : [..., n, m]
        Costs of any sign.
    count : int, optional
        Number of pairs, at most min(n, m); all min(n, m) by default.
    method : "optimal" or "greedy"
        "optimal": the `count` pairs of least total cost. That is not the cheapest `count` pairs of a full assignment, which
        is worse than greedy. "greedy": take the cheapest pair that is still free, again and again (the choice of He, Zhou,
        Thiele 2018, algorithm 1); faster.

    Returns
    -------
    int64 [..., count, 2]
        Ties are broken by (row, column), so the result is a function of the matrix alone.

    Raises
    ------
    ValueError
        NaN (for "optimal" anything not finite), named with its index; `count` out of range; unknown method.
    TypeError
        Not a float32 or float64 tensor.
    """
    _checks.no_gradient(_NAME, distances=distances)
    _checks.tensor_of(_NAME, "distances", distances, _DTYPES, 2)
    if count is None:
        count = min(distances.shape[-2], distances.shape[-1])
    return _op(distances, count, method)


def _check(distances: torch.Tensor, count: int, method: str) -> None:
    _checks.tensor_of(_NAME, "distances", distances, _DTYPES, 2)
    n, m = distances.shape[-2:]
    if method not in _METHODS:
        raise ValueError(f"{_NAME}: method must be one of {', '.join(_METHODS)}, got {method!r}")
    if count < 0 or count > min(n, m):
        raise ValueError(
            f"{_NAME}: count must be from 0 to min(n, m) = {min(n, m)} for distances {_checks.shape(distances)}, got {count}"
        )


def _implementation(distances: torch.Tensor, count: int, method: str) -> torch.Tensor:
    _check(distances, count, method)
    batch = list(distances.shape[:-2])
    costs = _checks.as_batch(distances.detach(), batch, 2)
    if method == "optimal":
        return _optimal(costs.cpu(), count, batch).to(distances.device)
    pairs = torch.empty(*batch, count, 2, dtype=torch.int64, device=distances.device)
    status = torch.empty(costs.shape[0], dtype=torch.int64, device=distances.device)
    _native.call(
        _NAME,
        costs,
        *(_native.scalar(costs), 0, *costs.shape, count),
        *(costs.data_ptr(), *costs.stride(), pairs.data_ptr(), status.data_ptr()),
    )
    bad = (status >= 0).nonzero()
    if len(bad):
        _raise_for(costs, batch, int(bad[0]), int(status[bad[0]]))
    return pairs


def _optimal(costs: torch.Tensor, count: int, batch: list[int]) -> torch.Tensor:
    from scipy.optimize import linear_sum_assignment

    n, m = costs.shape[1:]
    pairs = torch.empty(costs.shape[0], count, 2, dtype=torch.int64)
    for p, matrix in enumerate(costs.numpy()):
        if not np.isfinite(matrix).all():
            _raise_for(costs, batch, p, int((~np.isfinite(matrix)).argmax()))
        if not count:
            continue
        matrix = matrix.astype(np.float64)
        matrix -= matrix.min()
        # m - count dummy rows leave columns free, n - count dummy columns leave rows free; dummy with dummy is forbidden
        square = np.zeros((n + m - count, n + m - count))
        square[:n, :m] = matrix
        square[n:, m:] = (matrix.max() + 1) * (2 * count + 1)
        rows, columns = linear_sum_assignment(square)
        keep = (rows < n) & (columns < m)
        rows, columns = rows[keep], columns[keep]
        order = np.lexsort((columns, rows, matrix[rows, columns]))
        pairs[p, :, 0] = torch.from_numpy(rows[order])
        pairs[p, :, 1] = torch.from_numpy(columns[order])
    return pairs.view(*batch, count, 2)


def _raise_for(costs: torch.Tensor, batch: list[int], matrix: int, flat: int) -> None:
    n, m = costs.shape[1:]
    lead = [int(i) for i in torch.unravel_index(torch.tensor(matrix), batch)] if batch else []
    value = float(costs[matrix, flat // m, flat % m])
    raise ValueError(
        f"{_NAME}: distances must be {'' if value != value else 'finite'}, got {value} at {lead + [flat // m, flat % m]}"
    )


def _fake(distances: torch.Tensor, count: int, method: str) -> torch.Tensor:
    _check(distances, count, method)
    return distances.new_empty([*distances.shape[:-2], count, 2], dtype=torch.int64)


_op = register(f"{_NAME}(Tensor distances, SymInt count, str method) -> Tensor", _implementation, _fake)
