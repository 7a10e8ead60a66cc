"""Inputs shared by the operators' tests and benchmarks: awkward sizes, and the cases where digits get lost."""

from __future__ import annotations

import torch

AWKWARD = (0, 1, 19, 99, 111)
"""Nothing, one, and sizes that fill no panel, block or warp."""

BATCHES: tuple[tuple[int, ...], ...] = ((), (3,), (2, 0), (2, 3))


def generator(seed: int = 0) -> torch.Generator:
    """A generator of its own for every case, so that cases do not depend on their order."""
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    """Normal numbers, drawn in float64 on the CPU so that every type and device sees the same ones."""
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64).to(device, dtype)


def near_rows(n: int, d: int, gap: float = 1e-4, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple:
    """a, b [n, d]: row i of b is row i of a moved by `gap` times the row's length; all other rows are far."""
    a = randn(n, d, seed=seed, dtype=torch.float64)
    step = randn(n, d, seed=seed + 1, dtype=torch.float64)
    b = a + gap * a.norm(dim=-1, keepdim=True) * step / step.norm(dim=-1, keepdim=True)
    return a.to(dtype), b.to(dtype)


def factor(d: int, condition: float = 1e4, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """[d, d] with singular values from 1 down to 1 / condition."""
    left = torch.linalg.qr(randn(d, d, seed=seed, dtype=torch.float64))[0]
    right = torch.linalg.qr(randn(d, d, seed=seed + 1, dtype=torch.float64))[0]
    values = torch.logspace(0, -torch.tensor(condition, dtype=torch.float64).log10().item(), d, dtype=torch.float64)
    return (left * values @ right).to(dtype)


def damped_inverse(
    *batch: int,
    d: int,
    samples: int | None = None,
    damping: float = 1e-3,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """[*batch, d, d]: inverse of a damped second moment of normal vectors, `samples` of them (4 d + 1 by default)."""
    samples = 4 * d + 1 if samples is None else samples
    x = randn(*batch, samples, d, seed=seed, dtype=torch.float64)
    moment = x.mT @ x / samples
    moment = moment + damping * torch.eye(d, dtype=torch.float64)
    inverse = torch.linalg.inv(moment)
    return ((inverse + inverse.mT) / 2).to(dtype)
