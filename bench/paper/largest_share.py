"""The smallest network whose error rises by less than 0.5 % on both tasks: the VGG pair, of either width.

The paper reports 39.61 % of the parameters shared. A share of s of one network's parameters leaves 1 - s/2 of both
networks' to be stored, which is what :class:`mtzip.Budget` is given.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import mtzip

from .case import Case
from .run import rows
from .table import Row

LIMIT = 0.5  # percentage points, for each task
GRID = 0.05  # shares are multiples of it
PAPER = "39.61 % shared at < 0.5 on both (ImageNet, CelebA, full width)"


def search(
    cases: Iterator[Case],
    quick: bool,
    steps: int | None = None,
    device: str = "cpu",
    shares: Sequence[float] = (),
) -> Iterator[Row]:
    """A row for every share that halving comes to, with retraining; the largest within the limit is marked.

    The error is taken to rise with the share. Test images decide, as in the paper, so the share is the largest of few.

    Args:
        cases: of which the first is taken, with another share.
        quick: halve once less.
        steps: of retraining, the case's own if None.
        device: where to compute.
        shares: rows for these in place of halving.
    """
    case = next(cases).on(device)
    case = dataclasses.replace(case, methods=("mtzip",), paper=PAPER, steps=case.steps if steps is None else steps)
    if shares:
        for share in shares:
            yield from rows(at_share(case, share))
        return
    low, high = 0, round(1 / GRID)  # low holds, high is thought to fail: everything shared is the other experiment
    while high - low > (2 if quick else 1):
        middle = (low + high) // 2
        found = list(rows(at_share(case, middle * GRID)))
        yield from found
        low, high = (middle, high) if found[-1].worst < LIMIT else (low, middle)
    print(f"largest share of parameters tried at < {LIMIT} on both: {low * GRID:.0%}")


def at_share(case: Case, share: float) -> Case:
    """The case with a share of one network's parameters stored once."""
    name = f"{case.name.removesuffix(', 100% shared')}, {share:.0%} of parameters"
    return dataclasses.replace(case, name=name, share=mtzip.Budget(parameters=1 - share / 2))
