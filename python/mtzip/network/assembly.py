"""Assembled weights that are kept between forward passes.

A leaf puts its weight together from blocks. In evaluation mode without gradients the result is kept until a block
changes: every in-place change raises a tensor's version counter, and a block that is given other memory has another
address. Whatever sets the mode, ``eval()`` included, forgets it too. What no counter sees is an in-place write through
``.data``, or a step of a fused optimiser, between two forward passes with no call of ``eval()`` in between.

What is kept of a large layer is little: one that is shared as a whole uses the stored weight and scales its output, a
linear layer applies block after block (``leaf.SMALL``). A large convolution of several blocks is kept as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import finalize

import torch
from torch import nn

# By the leaf's id until it is gone. Not attributes of the leaves: neither deepcopy nor pickle nor a state dict takes
# them along; no weak dictionary, whose look-up takes as long as everything else here.
_kept: dict[int, tuple[Any, dict[str, Any]]] = {}
_on = True


def kept(leaf: nn.Module, name: str, make: Callable[[bool], Any]) -> Any:
    """What ``make`` gives, remembered where ``leaf`` is in evaluation mode and nothing needs gradients.

    Args:
        leaf: whose own parameters are all that the result depends on.
        name: of the result, among those of the leaf.
        make: assembles it; told whether the result will be kept.
    """
    if leaf.training or not _on or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return make(False)
    try:
        state = [(p.data_ptr(), p._version) for p in leaf._parameters.values() if p is not None]
    except (RuntimeError, AttributeError):  # a tensor of a transform or of inference mode, which has no counter
        return make(False)
    found = _kept.get(id(leaf))
    if found is None or found[0] != state:
        if found is None:
            finalize(leaf, _kept.pop, id(leaf), None).atexit = False
        found = _kept[id(leaf)] = state, {}
    values = found[1]
    if name not in values:
        values[name] = make(True)
    return values[name]


def forget(leaf: nn.Module) -> None:
    """Lets go of what is kept for ``leaf``."""
    if id(leaf) in _kept:
        _kept[id(leaf)] = None, {}  # its end is watched already


@contextmanager
def assembled_anew() -> Iterator[None]:
    """Within it weights are assembled at every call: the memory of the stored blocks, and time for it.

    What was kept before stays until the mode is set: call ``eval()`` first.
    """
    global _on
    before, _on = _on, False
    try:
        yield
    finally:
        _on = before
