"""Residual additions: what a layer in front of one should put out.

Behind an addition stands ``f(x) + skip``. The zipped skip is not the original's any more, and the layer that writes
f(x) is fitted last: its target is the original *sum* less what the zipped skip delivers, so that the errors of earlier
layers do not pile up in the residual stream.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from ..trace import rules
from ..trace.analysis import Layer
from .execute import Execution
from .moments import at_least_float32

#: Operators between a layer and an addition that leave values as they are (in evaluation).
_SAME = ("dropout", "feature_dropout", "alpha_dropout", "contiguous", "clone", "alias", "detach", "to", "_to_copy")


def skip_of(execution: Execution, layer: Layer) -> fx.Node | None:
    """The other operand of the addition that reads a layer's output; None where there is none or it is not known yet.

    Args:
        execution: of the layer's task.
        layer: its output may pass the BatchNorm behind it.
    """
    node = layer.node if layer.norm is None else layer.norm.node
    while len(node.users) == 1:
        (user,) = node.users
        name = rules.name_of(user).rstrip("_")
        if name == "add" and not user.kwargs:
            others = [arg for arg in user.args if isinstance(arg, fx.Node) and arg is not node]
            shape = execution.analysis.shape(node)
            known = len(others) == 1 and others[0].name in execution.zipped
            return others[0] if known and execution.analysis.shape(others[0]) == shape else None
        if name not in _SAME:
            return None
        node = user
    return None


def without_loss(
    execution: Execution, layer: Layer, outputs: Sequence[Tensor], order: Tensor | None, fold: tuple | None
) -> list[Tensor] | None:
    """What a layer should put out so that the sum behind it is the original's; None where there is nothing to make up.

    Args:
        execution: at the layer.
        layer: it may stand in front of an addition.
        outputs: the first samples of chunks of what the original puts out.
        order: stored order [r] of the rows, None for the network's own.
        fold: ([r], [r]) scale and shift of a BatchNorm to apply to ``outputs``, None for none.
    """
    skip = skip_of(execution, layer)
    if skip is None or not execution.is_changed(skip):
        return None
    channel = -1 if layer.kind == "linear" else 1
    back = None if order is None else torch.argsort(order)
    found = []
    for z, before, after in zip(outputs, execution.original[skip.name], execution.zipped[skip.name], strict=False):
        before, after = at_least_float32(before[: len(z)]), at_least_float32(after[: len(z)])
        moved = before - (after if back is None else after.index_select(channel, back.to(after.device)))
        z = at_least_float32(z)
        if fold is None:
            found.append(moved.add_(z))
        else:
            shape = [1] * z.dim()
            shape[channel] = -1
            scale, shift = (value.to(z.dtype).view(shape) for value in fold)
            found.append(moved.addcmul_(z, scale).add_(shift))
    return found
