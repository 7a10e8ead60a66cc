"""Residual additions: what a layer in front of one should put out.

Behind an addition stands ``f(x) + skip``. The zipped skip is not the original's any more, and the layer that writes
f(x) is fitted last: its target is the original *sum* less what the zipped skip delivers, so that the errors of earlier
layers do not pile up in the residual stream.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from ..distributed import gathered_rows, total
from ..trace import rules
from ..trace.analysis import Layer
from .execute import Execution
from .moments import Moment, Target, View, at_least_float32
from .reconstruct import corrected

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


def offset_target(
    view: View,
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    offsets: Sequence[Tensor],
    moment: Moment,
    t: Target,
) -> Target:
    """A target moved by an offset at every position.

    Args:
        view: of the layer.
        inputs: chunks of what it reads.
        outputs: chunks of the target as it is.
        offsets: chunks of what is to be added to it.
        moment: of the inputs.
        t: moments of the target as it is.
    """
    outputs, offsets = ([at_least_float32(x) for x in chunks] for chunks in (outputs, offsets))
    moved = [z + offset for z, offset in zip(outputs, offsets, strict=True)]
    count = moment.count
    mean = total(sum(view.rows(offset).sum(0, dtype=torch.float64) for offset in offsets)) / count
    if t.samples is not None:
        rows = gathered_rows(torch.cat([view.rows(offset).double() for offset in offsets]))
        extra = rows.sub_(mean).div_(count**0.5)
        samples = t.samples + extra
        return Target(t.mean + mean, samples.square().sum(0), samples=samples)
    cross = total(
        sum(view.cross_moment(at_least_float32(x), offset).double() for x, offset in zip(inputs, offsets, strict=True))
    )
    square = total(
        sum(
            (view.rows(new).double().square() - view.rows(old).double().square()).sum(0)
            for new, old in zip(moved, outputs, strict=True)
        )
    )
    return corrected(t, moment, cross / count, mean, square / count)
