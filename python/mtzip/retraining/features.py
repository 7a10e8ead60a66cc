"""Distillation at the zipped layers: the pre-activations a task's network has there, beside its teacher's.

Zipping reorders neurons, and lets a BatchNorm behind a layer undo the scale at which its rows are stored. So what can
be compared is listed when a network is zipped: ``zipped.orders[task]`` maps the path of a module, the layer itself or
the BatchNorm behind it, to the neuron of the original that each of its channels stands for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..network.zipped import ZippedNetwork
from ..precision import exact_products

#: Channels of float32 that a product reorders sooner than picking does: with AVX2 3.2 ms for 11 of 2 million numbers in
#: 16 channels, 1.1 for 2 of half a million in 64.
FEW = 64


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
def captured(
    network: Any,
    paths: Mapping[str, Any],
    task: str,
    which: str,
    take: Callable[[str, Tensor], Any] = lambda path, output: output.clone(),
) -> Iterator[dict[str, list[Any]]]:
    """While it lasts, what the modules at ``paths`` put out: path to one value a call, in order of the calls.

    Args:
        network: a module.
        paths: of modules inside it.
        task, which: names, for messages.
        take: what to keep, of path and output; no view of it, as an activation in place may follow.

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
    values: dict[str, list[Any]] = {}
    handles = []

    def keep(path: str):
        def hook(module, args, output):
            values.setdefault(path, []).append(take(path, output))

        return hook

    try:
        for path in paths:
            handles.append(modules[path].register_forward_hook(keep(path)))
        yield values
    finally:
        for handle in handles:
            handle.remove()


def in_stored_order(value: Tensor, order: Tensor, last: bool, path: str) -> Tensor:
    """A copy of what a teacher's layer puts out, with its channels as the zipped network stores them.

    Args:
        value: of the original.
        order: [n], the original's neuron of every channel.
        last: whether its channels are the last dimension, not dimension 1.
        path: of the layer, for the message.

    Raises:
        ValueError: another number of channels.
    """
    channel = -1 if last else 1
    if value.shape[channel] != len(order):
        raise ValueError(
            f"the teacher's layer {path!r} must have {len(order)} channels as the network's, got "
            f"{value.shape[channel]}; pass the network that was zipped"
        )
    return _reordered(value, channel, order)


def _reordered(value: Tensor, channel: int, order: Tensor) -> Tensor:
    """``value.index_select(channel, order)``, channels innermost where they were.

    In half precision those are a product with ones and zeros, and so are few channels of float32 on a CPU: exact, and
    several times as fast as picking them one by one.
    """
    inner = value.movedim(channel, -1)
    if not inner.is_contiguous():
        return value.index_select(channel, order)
    if value.dtype not in (torch.float16, torch.bfloat16) and not (value.is_cpu and len(order) <= FEW):
        return inner.index_select(-1, order).movedim(-1, channel)
    picks = torch.arange(len(order), device=order.device).unsqueeze(1) == order
    with exact_products(), torch.autocast(value.device.type, enabled=False):
        return (inner @ picks.to(value.dtype)).movedim(-1, channel)


def linear_paths(network: nn.Module, paths: Mapping[str, Any]) -> set[str]:
    """Those of ``paths`` whose module puts its channels last."""
    return {path for path in paths if isinstance(network.get_submodule(path), nn.Linear)}
