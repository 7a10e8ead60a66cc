"""Distillation at the zipped layers: the pre-activations a task's network has there, beside its teacher's.

Zipping reorders neurons, and lets a BatchNorm behind a layer undo the scale at which its rows are stored. So what can
be compared is listed when a network is zipped: ``zipped.orders[task]`` maps the path of a module, the layer itself or
the BatchNorm behind it, to the neuron of the original that each of its channels stands for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..network.zipped import ZippedNetwork


def orders_of(zipped: ZippedNetwork) -> Mapping[str, Mapping[str, Tensor]]:
    """Task to path to order [n].

    Raises:
        ValueError: nothing is shared, or the network does not know.
    """
    if not any(zipped.orders.values()):
        raise ValueError(
            "distill='features' needs layers that tasks share and their neurons' order in the originals, got a network "
            "that has none; zip with share > 0, or use distill='outputs'"
        )
    return zipped.orders


@contextlib.contextmanager
def captured(network: Any, paths: Mapping[str, Any], task: str, which: str) -> Iterator[dict[str, list[Tensor]]]:
    """While it lasts, what the modules at ``paths`` put out: path to one tensor a call, in order of the calls.

    Args:
        network: a module.
        paths: of modules inside it.
        task, which: names, for messages.

    Raises:
        ValueError: it has no such module.
    """
    modules = dict(network.named_modules(remove_duplicate=False)) if isinstance(network, nn.Module) else {}
    missing = [path for path in paths if path not in modules]
    if missing:
        got = "it has none" if modules else f"got {type(network).__name__}"
        raise ValueError(
            f"distill='features' needs the {which} of task {task!r} to be a module with a layer {missing[0]!r}, {got}; "
            "pass the network that was zipped, or use distill='outputs'"
        )
    values: dict[str, list[Tensor]] = {}
    handles = []

    def keep(path: str):
        def hook(module, args, output):
            values.setdefault(path, []).append(output.clone())  # an activation in place may follow

        return hook

    try:
        for path in paths:
            handles.append(modules[path].register_forward_hook(keep(path)))
        yield values
    finally:
        for handle in handles:
            handle.remove()


def in_stored_order(
    values: Mapping[str, list[Tensor]], orders: Mapping[str, Tensor], linear: set[str]
) -> dict[str, list[Tensor]]:
    """A teacher's values with their channels as the zipped network stores them.

    Args:
        values: path to tensors of the original.
        orders: path to the original's neuron of every channel.
        linear: paths whose channels are the last dimension; the others' are dimension 1.

    Raises:
        ValueError: another number of channels.
    """
    found: dict[str, list[Tensor]] = {}
    for path, tensors in values.items():
        channel, order = -1 if path in linear else 1, orders[path]
        for value in tensors:
            if value.shape[channel] != len(order):
                raise ValueError(
                    f"the teacher's layer {path!r} must have {len(order)} channels as the network's, got "
                    f"{value.shape[channel]}; pass the network that was zipped"
                )
            found.setdefault(path, []).append(_reordered(value, channel, order))
    return found


def _reordered(value: Tensor, channel: int, order: Tensor) -> Tensor:
    """``value.index_select(channel, order)``, channels innermost where they were.

    In half precision those are a product with ones and zeros: exact, and with the tile registers of a CPU several times
    as fast as picking them one by one.
    """
    inner = value.movedim(channel, -1)
    if value.dtype not in (torch.float16, torch.bfloat16) or not inner.is_contiguous():
        return value.index_select(channel, order)
    picks = torch.arange(len(order), device=order.device).unsqueeze(1) == order
    return (inner @ picks.to(value.dtype)).movedim(-1, channel)


def linear_paths(network: nn.Module, paths: Mapping[str, Any]) -> set[str]:
    """Those of ``paths`` whose module puts its channels last."""
    return {path for path in paths if isinstance(network.get_submodule(path), nn.Linear)}
