"""Where a zipped network's values can be compared with an original's: the order in which it stores their channels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..network.leaf import SharedLayer
from .sweep import Sweep

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def stored_orders(sweep: Sweep) -> dict[str, dict[str, Tensor]]:
    """Task to path of a module to the original's channel [n] that each channel of its output stands for.

    One entry for every linear layer or convolution that tasks share and that is called once: at the layer itself, or
    at the BatchNorm behind it, which undoes the scale at which the layer's rows are stored.
    """
    found: dict[str, dict[str, Tensor]] = {task: {} for task in sweep.tasks}
    matched = [axis for axis in sweep.correspondence.axes if id(axis) in sweep.slots]
    orders = [
        {axis.atoms[task]: sweep.slots[id(axis)].order(task) for axis in matched if task in axis.atoms}
        for task in range(len(sweep.tasks))
    ]
    for group in sweep.correspondence.layers:
        for task, layer in group.layers.items():
            modules = dict(sweep.networks[task].named_modules())
            module = modules.get(layer.path)
            plain = isinstance(module, SharedLayer) and isinstance(module, (nn.Linear, *_CONVOLUTIONS))
            if not plain or layer.calls > 1:
                continue
            path = layer.path if layer.norm is None else layer.norm.mean.rpartition(".")[0]
            order = sweep.analyses[task].axes.index(layer.rows, orders[task])
            size = sum(run.size for run in module.layout.rows)
            found[sweep.tasks[task]][path] = torch.arange(size) if order is None else order.cpu()
    return found
