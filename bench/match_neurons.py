"""match_neurons against SciPy's assignment and sorting all pairs."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

import mtz_ext
from bench import timer
from tests import cases

NAME = "match_neurons"
HELP = "matching: greedy against sorting all pairs, optimal against SciPy's linear_sum_assignment"
ORDER = 2


def uniform(n: int) -> torch.Tensor:
    """Independent costs."""
    return torch.rand(n, n, generator=cases.generator())


def neurons(n: int) -> torch.Tensor:
    """Distances of neurons of many lengths: short ones are near to all, which is what makes matching hard."""
    a, b = cases.randn(n, 64), cases.randn(n, 64, seed=1)
    lengths = torch.rand(2, n, 1, generator=cases.generator(2))
    return mtz_ext.neuron_distances(a * lengths[0], b * lengths[1])


def sort_all(costs: torch.Tensor, count: int) -> list[tuple[int, int]]:
    """Greedy by its definition: torch sorts all pairs, Python goes through them."""
    n, m = costs.shape
    rows, columns, pairs = [True] * n, [True] * m, []
    order = costs.flatten().argsort(stable=True)
    for start in range(0, len(order), 1 << 16):
        for flat in order[start : start + (1 << 16)].tolist():
            i, j = divmod(flat, m)
            if rows[i] and columns[j]:
                rows[i] = columns[j] = False
                pairs.append((i, j))
                if len(pairs) == count:
                    return pairs
    return pairs


def scipy_square(costs: torch.Tensor, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Exactly `count` pairs as an assignment on an (n + m - count) square with a forbidden corner."""
    n, m = costs.shape
    if count == min(n, m):
        return linear_sum_assignment(costs.cpu().numpy())
    square = np.zeros((n + m - count, n + m - count))
    square[:n, :m] = costs.cpu().numpy()
    square[n:, m:] = square.max() * (2 * count + 2)
    rows, columns = linear_sum_assignment(square)
    keep = (rows < n) & (columns < m)
    return rows[keep], columns[keep]


def run(options: argparse.Namespace) -> list[timer.Row]:
    """Time; the error of an optimal matching is that of its total cost."""
    rows, check = [], not timer.on_gpu(options)  # a check waits for the device
    kinds: dict[str, Callable[[int], torch.Tensor]] = {"uniform": uniform, "neurons": neurons}
    for n in [512] if options.quick else [512, 4096]:
        for kind, make in kinds.items():
            costs = make(n).to(options.device)
            ways = {
                "mtz_ext": lambda c=costs: mtz_ext.match_neurons(c, method="greedy", check=check),
                "sort all pairs": lambda c=costs, n=n: sort_all(c, n),
            }
            case = f"greedy, {n} x {n} {kind}"
            ours = "must 1,000,000 us, aim 200,000 us" if n == 4096 else ""
            targets = {"mtz_ext": ours}
            rows += timer.rows_of(NAME, case, ways, timer.Work(bytes=4.0 * n * n), options, targets=targets)
    if timer.on_gpu(options):
        return timer.report(rows, options)  # optimal matching runs on the CPU
    for n, count in [(512, 256)] if options.quick else [(512, 256), (512, 512), (2048, 1024)]:
        for kind, make in kinds.items():
            costs = make(n).to(options.device)
            ways = {
                "mtz_ext": lambda c=costs, k=count: mtz_ext.match_neurons(c, k),
                "SciPy": lambda c=costs, k=count: scipy_square(c, k),
            }
            chosen, (i, j) = ways["mtz_ext"](), ways["SciPy"]()
            total = costs[chosen[:, 0], chosen[:, 1]].double().sum().item()
            best = costs[torch.from_numpy(i), torch.from_numpy(j)].double().sum().item()
            wrong = {"mtz_ext": abs(total - best) / best}
            rows += timer.rows_of(NAME, f"optimal, {n} x {n} {kind}, {count} pairs", ways, timer.Work(), options, wrong)
    return timer.report(rows, options)
