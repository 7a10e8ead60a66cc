"""The operators in plain torch, float64, by their definitions: slow, dense, written independently of the kernels."""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F


def neuron_distances(a: torch.Tensor, b: torch.Tensor, factor: torch.Tensor | None = None) -> torch.Tensor:
    """[..., n, d], [..., m, d], [..., d, r] -> float64 [..., n, m]: every difference formed, projected and squared."""
    difference = a.double().unsqueeze(-2) - b.double().unsqueeze(-3)  # [..., n, m, d]
    if factor is not None:
        difference = difference @ factor.double().unsqueeze(-3)  # [..., n, m, r]
    return 0.5 * difference.square().sum(-1)


def sherman_morrison(inverse: torch.Tensor, vectors: torch.Tensor, weight: float | torch.Tensor = 1.0) -> torch.Tensor:
    """[..., d, d], [..., k, d], [..., k] -> float64 [..., d, d]: invert, add, invert. Not in place."""
    x = vectors.double()
    w = torch.as_tensor(weight, dtype=torch.float64, device=x.device)
    w = w.expand(torch.broadcast_shapes(w.shape, x.shape[:-1]))
    matrix = torch.linalg.inv(inverse.double()) + x.mT @ (w.unsqueeze(-1) * x)
    return torch.linalg.inv(matrix)


def match_neurons(distances: torch.Tensor, count: int | None = None, method: str = "optimal") -> torch.Tensor:
    """[..., n, m] -> int64 [..., count, 2], cheapest pair first, ties by (row, column).

    "greedy" goes through all pairs in order; "optimal" tries every choice (so only for a handful of neurons).
    """
    n, m = distances.shape[-2:]
    count = min(n, m) if count is None else count
    matrices = distances.double().reshape(math.prod(distances.shape[:-2]), n, m).tolist()
    choose = _greedy if method == "greedy" else _optimal
    pairs = [choose(matrix, n, m, count) for matrix in matrices]
    return torch.tensor(pairs, dtype=torch.int64).reshape(*distances.shape[:-2], count, 2)


def _greedy(matrix: list[list[float]], n: int, m: int, count: int) -> list[tuple[int, int]]:
    rows, columns, pairs = set(), set(), []
    for _, i, j in sorted((matrix[i][j], i, j) for i in range(n) for j in range(m)):
        if len(pairs) < count and i not in rows and j not in columns:
            rows.add(i)
            columns.add(j)
            pairs.append((i, j))
    return pairs


def _optimal(matrix: list[list[float]], n: int, m: int, count: int) -> list[tuple[int, int]]:
    best, pairs = float("inf"), []
    for rows in itertools.combinations(range(n), count):
        for columns in itertools.permutations(range(m), count):
            cost = sum(matrix[i][j] for i, j in zip(rows, columns, strict=True))
            if cost < best:
                best, pairs = cost, list(zip(rows, columns, strict=True))
    return sorted(pairs, key=lambda pair: (matrix[pair[0]][pair[1]], pair))


def conv2d_second_moment(
    x: torch.Tensor,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
) -> torch.Tensor:
    """[N, C, H, W] -> float64 [groups, C k k / groups, C k k / groups]: all patches unfolded, one product."""
    patches = F.unfold(x.double(), kernel_size, dilation, padding, stride)  # [N, C k k, positions]
    patches = patches.reshape(x.shape[0], groups, -1, patches.shape[-1])
    return torch.einsum("sgip,sgjp->gij", patches, patches)
