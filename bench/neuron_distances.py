"""neuron_distances against the plain product of the same size, norm expansion and torch.cdist."""

from __future__ import annotations

import argparse
from functools import partial

import torch

import mtz_ext
from bench import timer
from tests import cases

NAME = "neuron_distances"
HELP = "pairwise functional difference: against a @ b.T, norm expansion, torch.cdist in both modes"
ORDER = 0

SHAPES = [(512, 576), (512, 1152), (512, 2304), (512, 4608), (4096, 4096)]
QUICK = SHAPES[:2]
EXACT = "donot_use_mm_for_euclid_dist"


def expansion(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """1/2 (|a|^2 + |b|^2 - 2 a b)."""
    squares = a.square().sum(-1, keepdim=True) + b.square().sum(-1).unsqueeze(-2)
    return torch.addmm(squares, a, b.mT, beta=0.5, alpha=-1)


def cdist(a: torch.Tensor, b: torch.Tensor, mode: str) -> torch.Tensor:
    """Half the squared Euclidean distance."""
    return 0.5 * torch.cdist(a, b, compute_mode=mode).square()


def errors(got: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest relative error over all pairs, the nearly equal ones on the diagonal included."""
    return ((got[: len(exact)].double() - exact).abs() / exact).max().item()


def run(options: argparse.Namespace) -> list[timer.Row]:
    """Time, accuracy and share of the float32 product."""
    rows = []
    for n, d in QUICK if options.quick else SHAPES:
        a, b = (t.to(options.device) for t in cases.near_rows(n, d))
        functions = {
            "mtz_ext": mtz_ext.neuron_distances,
            "product a @ b.T": lambda a, b: a @ b.mT,
            "norm expansion": expansion,
            "cdist, by product": lambda a, b: cdist(a, b, "use_mm_for_euclid_dist"),
            "cdist, exact": lambda a, b: cdist(a, b, EXACT),
        }
        ways = {name: partial(function, a, b) for name, function in functions.items()}
        some = a[:64]
        exact = cdist(some.double(), b.double(), EXACT)
        wrong = {name: errors(f(some, b), exact) for name, f in functions.items() if name != "product a @ b.T"}
        work = timer.Work(2.0 * n * n * d, 4.0 * (2 * n * d + n * n))
        targets = {"product a @ b.T": "ratio must 0.56, aim 0.91", "cdist, exact": "ratio must 5, aim 20"}
        if timer.on_gpu(options):  # exact differences take two instructions an element, a product one
            work = timer.Work(work.flops, reach=0.5)
            targets = {"mtz_ext": "share must 60 %, aim 85 %", "cdist, exact": "ratio must 5, aim 20"}
        rows += timer.rows_of(NAME, f"{n} x {n}, d = {d}", ways, work, options, wrong, targets)
    rows += _with_factor(512, 576 if options.quick else 1152, options)
    return timer.report(rows, options)


def _with_factor(n: int, d: int, options: argparse.Namespace) -> list[timer.Row]:
    a, b = (t.to(options.device) for t in cases.near_rows(n, d))
    factor = cases.factor(d).to(options.device)

    def in_double() -> torch.Tensor:
        f = factor.double()
        return cdist(a.double() @ f, b.double() @ f, EXACT).float()

    ways = {
        "mtz_ext": lambda: mtz_ext.neuron_distances(a, b, factor),
        "float64 products + cdist, exact": in_double,
        "float32 products + cdist, exact": lambda: cdist(a @ factor, b @ factor, EXACT),
    }
    f = factor.double()
    exact = cdist(a[:64].double() @ f, b.double() @ f, EXACT)
    wrong = {name: errors(way(), exact) for name, way in ways.items()}
    work = timer.Work(2.0 * n * n * d + 4.0 * n * d * d)
    return timer.rows_of(NAME, f"{n} x {n}, d = {d}, factor of condition 1e4", ways, work, options, wrong)
