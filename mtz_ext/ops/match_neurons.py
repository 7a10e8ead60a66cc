"""match_neurons: which neuron of one network stands for which of another."""

from __future__ import annotations

import torch

from mtz_ext import _checks, _native
from mtz_ext._library import register

_NAME = "match_neurons"
_DTYPES = (torch.float32, torch.float64)
_METHODS = ("greedy", "optimal")  # in the order of mtz::MatchMethod


def match_neurons(
    distances: torch.Tensor, count: int | None = None, method: str = "optimal", check: bool = True
) -> torch.Tensor:
    """One-to-one pairs (row, column) of a cost matrix, cheapest pair first.

    Parameters
    ----------
    distances : [..., n, m]
        Costs of any sign.
    count : int, optional
        Number of pairs, at most min(n, m); all min(n, m) by default.
    method : "optimal" or "greedy"
        "optimal": the `count` pairs of least total cost, exactly, at any size. That is not the cheapest `count` pairs
        of a full assignment, which is worse than greedy. "greedy": take the cheapest pair that is still free, again
        and again (as He, Zhou, Thiele 2018 do); faster.
    check : bool
        Raise for NaN. This waits for the device; with False and "greedy" nothing does (and a CUDA graph can capture the
        call), and all pairs of such a matrix are (-1, -1). "optimal" runs on the CPU, and waits for the device's costs.

    Returns
    -------
    int64 [..., count, 2]
        Ties are broken by (row, column), so the result is a function of the matrix alone.

    Raises
    ------
    ValueError
        `count` out of range; unknown method; with `check`, NaN (for "optimal" anything not finite), named with its
        index.
    TypeError
        Not a float32 or float64 tensor.
    """
    _checks.no_gradient(_NAME, distances=distances)
    _checks.tensor_of(_NAME, "distances", distances, _DTYPES, 2)
    if count is None:
        count = min(distances.shape[-2], distances.shape[-1])
    return _op(distances, count, method, check)


def _check(distances: torch.Tensor, count: int, method: str) -> None:
    _checks.tensor_of(_NAME, "distances", distances, _DTYPES, 2)
    n, m = distances.shape[-2:]
    if method not in _METHODS:
        raise ValueError(f"{_NAME}: method must be one of {', '.join(_METHODS)}, got {method!r}")
    if count < 0 or count > min(n, m):
        raise ValueError(
            f"{_NAME}: count must be from 0 to min(n, m) = {min(n, m)} for distances {_checks.shape(distances)}, "
            f"got {count}"
        )


def _implementation(distances: torch.Tensor, count: int, method: str, check: bool = True) -> torch.Tensor:
    _check(distances, count, method)
    batch = list(distances.shape[:-2])
    costs = _checks.as_batch(distances.detach(), batch, 2)
    if method == "optimal" and costs.device.type != "cpu":
        costs = costs.cpu()  # shortest paths are one long chain of dependent steps: nothing for a GPU
    pairs = torch.empty(*batch, count, 2, dtype=torch.int64, device=costs.device)
    status = torch.empty(costs.shape[0], dtype=torch.int64, device=costs.device)
    _native.call(
        _NAME,
        costs,
        *(_native.scalar(costs), _METHODS.index(method), *costs.shape, count),
        *(costs.data_ptr(), *costs.stride(), pairs.data_ptr(), status.data_ptr()),
    )
    bad = (status >= 0).nonzero() if check else ()
    if len(bad):
        matrix = int(bad[0])
        _raise_for(costs[matrix], batch, matrix, int(status[matrix]), method)
    return pairs.to(distances.device)


def _raise_for(costs: torch.Tensor, batch: list[int], matrix: int, flat: int, method: str) -> None:
    """ValueError for element `flat` of matrix number `matrix`."""
    lead = [int(i) for i in torch.unravel_index(torch.tensor(matrix), batch)] if batch else []
    row, column = divmod(flat, costs.shape[1])
    wanted = "finite" if method == "optimal" else "numbers or Inf"
    raise ValueError(
        f"{_NAME}: distances must be {wanted}, got {float(costs[row, column])} at {[*lead, row, column]}; "
        "look for NaN or Inf in the weights or the factor they were computed from"
    )


def _fake(distances: torch.Tensor, count: int, method: str, check: bool = True) -> torch.Tensor:
    _check(distances, count, method)
    return distances.new_empty([*distances.shape[:-2], count, 2], dtype=torch.int64)


_op = register(
    f"{_NAME}(Tensor distances, SymInt count, str method, bool check=True) -> Tensor", _implementation, _fake
)
