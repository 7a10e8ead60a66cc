"""sherman_morrison_ against batched Woodbury, vector by vector, and inverting afresh, in torch."""

from __future__ import annotations

import argparse

import torch

import mtz_ext
from bench import timer
from mtz_ext import reference
from tests import cases

NAME = "sherman_morrison"
HELP = "update of inverses: against batched Woodbury and inverting afresh"
ORDER = 1

# batch, d, vectors; what is asked of the ratio to Woodbury on a CPU, on a GPU, and there of the share of a product
SHAPES = [
    ((256,), 64, 64, "must 3, aim 8", "must 10, aim 30", ""),
    ((64,), 144, 144, "must 3, aim 8", "must 10, aim 30", ""),
    ((), 2048, 64, "must 1, aim 1.3", "", "must 70 %, aim 90 %"),
]
LARGER = [((), 4096, k, "", "", "must 70 %, aim 90 %") for k in (64, 256)]  # on a GPU


def woodbury(inverse: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """A^-1 - V^T (I + V X^T)^-1 V by Cholesky, V = X A^-1."""
    v = vectors @ inverse
    s = v @ vectors.mT
    s.diagonal(dim1=-2, dim2=-1).add_(1)
    w = torch.linalg.solve_triangular(torch.linalg.cholesky_ex(s)[0], v, upper=False)  # waits for no device
    return inverse - w.mT @ w


def afresh(matrix: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """(A + X^T X)^-1, the matrix given."""
    return torch.cholesky_inverse(torch.linalg.cholesky_ex(matrix + vectors.mT @ vectors)[0])


def run(options: argparse.Namespace) -> list[timer.Row]:
    """Time and error relative to the largest element."""
    rows = []
    on_gpu = timer.on_gpu(options)
    for batch, d, k, on_cpu, ratio, share in SHAPES[:1] if options.quick else SHAPES + (LARGER if on_gpu else []):
        inverse = cases.damped_inverse(d=d).expand(*batch, d, d).contiguous().to(options.device)
        vectors = 0.1 * cases.randn(*batch, k, d, seed=1, device=options.device)
        matrix = torch.linalg.inv(inverse.double()).float()
        exact = reference.sherman_morrison(inverse, vectors)
        changing = inverse.clone()
        ways = {
            "mtz_ext": lambda i=changing, v=vectors: mtz_ext.sherman_morrison_(i, v, check=not on_gpu),
            "Woodbury": lambda i=inverse, v=vectors: woodbury(i, v),
            "inverse afresh": lambda m=matrix, v=vectors: afresh(m, v),
        }
        got = {name: way() for name, way in ways.items()}
        wrong = {name: ((g.double() - exact).abs().max() / exact.abs().max()).item() for name, g in got.items()}
        matrices = inverse.numel() // d**2
        work = timer.Work(3.0 * k * d * d * matrices, 0 if share and on_gpu else 8.0 * d * d * matrices)
        targets = {"Woodbury": f"ratio {ratio if on_gpu else on_cpu}", "mtz_ext": f"share {share}" if on_gpu else ""}
        targets = {way: asked for way, asked in targets.items() if not asked.endswith(" ")}
        case = f"{' x '.join(map(str, batch)) or 1} x ({d} x {d}), {k} vectors"
        rows += timer.rows_of(NAME, case, ways, work, options, wrong, targets)
    return timer.report(rows, options)
