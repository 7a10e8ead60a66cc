"""Products in full float32, whatever the training script around has set for speed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def exact_products() -> Iterator[None]:
    """Products and convolutions of float32 in float32 inside, and as before afterwards; decorates functions too.

    A training script may allow TF32 or bfloat16 (``torch.set_float32_matmul_precision("medium")``), and torch allows
    TF32 in convolutions on a GPU by itself: 10 or 7 bits of fraction. Training bears that. Second moments, whose
    factors are of condition 1e4, and the proof that a reordered network computes the same do not.
    """
    backends = torch.backends
    get, put = torch.get_float32_matmul_precision, torch.set_float32_matmul_precision
    products = _full(get, put, "highest", ((backends.cuda, "matmul"), (backends.mkldnn, "matmul")))
    convolutions = _full(
        lambda: backends.cudnn.allow_tf32,
        lambda allowed: setattr(backends.cudnn, "allow_tf32", allowed),
        False,
        ((backends.cudnn, "conv"), (backends.cudnn, "rnn")),
    )
    with products, convolutions:
        yield


@contextmanager
def _full(get: Callable[[], Any], put: Callable[[Any], None], full: Any, operators: tuple) -> Iterator[None]:
    """One switch at its ``full`` precision. Since torch 2.9 every operator has its own, too; where a script has set
    these, the switch of all cannot be read any more."""
    found = [getattr(backend, name, None) for backend, name in operators]
    before = [(operator, operator.fp32_precision) for operator in found if hasattr(operator, "fp32_precision")]
    try:
        of_all = get()
        put(full)
    except RuntimeError:
        of_all = None
        for operator, _ in before:
            operator.fp32_precision = "ieee"
    try:
        yield
    finally:
        if of_all is not None:
            put(of_all)
        for operator, precision in before:
            if operator.fp32_precision != precision:
                operator.fp32_precision = precision
