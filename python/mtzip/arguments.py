"""Checks of what users give: name, expected, got, before any work begins."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .errors import unknown_task
from .network.zipped import check_name
from .planning.budget import Budget, Plan

METHODS = ("refit", "mtz", "average")
SLOTS = ("all", "some")
MATCHINGS = ("optimal", "greedy", "activation")


def check_arguments(networks, inputs, share, method, matching, damping, reconstructions, samples) -> None:
    """Those of :func:`mtzip.zip_networks`.

    Raises:
        TypeError, ValueError: what is wrong, what was expected and what was given.
    """
    for name, value in (("networks", networks), ("inputs", inputs)):
        if not isinstance(value, Mapping):
            raise TypeError(f"{name} must be a mapping from task name to value, got {type(value).__name__}")
    if not networks:
        raise ValueError("networks must hold at least one network, got none")
    for task, network in networks.items():
        check_name(task)
        if not isinstance(network, nn.Module):
            raise TypeError(f"networks[{task!r}] must be an nn.Module, got {type(network).__name__}")
    if set(networks) != set(inputs):
        raise ValueError(f"inputs must have the tasks of networks, {sorted(networks)}, got {sorted(inputs)}")
    if len({id(network) for network in networks.values()}) < len(networks):
        raise ValueError("networks must be different objects, got the same one twice; pass copy.deepcopy of it")
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    if matching not in MATCHINGS:
        raise ValueError(f"matching must be one of {MATCHINGS}, got {matching!r}")
    values = share.values() if isinstance(share, Mapping) else [] if isinstance(share, (Budget, Plan)) else [share]
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value or value < 0:
            raise ValueError(f"share must be a fraction in [0, 1] or a mapping of fractions and counts, got {value!r}")
        if (isinstance(value, float) or not isinstance(share, Mapping)) and value > 1:
            raise ValueError(f"share must be a fraction in [0, 1], got {value!r}; counts are ints in a mapping")
    if damping is not None and not 0 < damping < float("inf"):
        raise ValueError(f"damping must be a positive number or None, got {damping!r}")
    if reconstructions < 0:
        raise ValueError(f"reconstructions must be 0 or more, got {reconstructions!r}")
    if samples is not None and samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples!r}")
    check_devices(networks)
    for task, network in networks.items():
        for path, parameter in network.named_parameters():
            if parameter.is_floating_point() and not torch.isfinite(parameter).all():
                raise ValueError(f"networks[{task!r}]: {path} must be finite, got NaN or Inf")


def check_devices(networks: Mapping[str, nn.Module]) -> None:
    """Raises ValueError unless all parameters and buffers of all networks are on one device."""
    first: tuple[str, torch.device] | None = None
    for task, network in networks.items():
        for path, tensor in (*network.named_parameters(), *network.named_buffers()):
            where, device = first = first or (f"networks[{task!r}] has {path}", tensor.device)
            if tensor.device != device and tensor.dim():  # a number may lie anywhere
                raise ValueError(
                    f"networks must be on one device, got {where} on {device} and {path} of networks[{task!r}] on "
                    f"{tensor.device}; move them to one with .to({str(device)!r})"
                )


def check_slots(slots: str, share: Any) -> None:
    """``slots``: which tasks share a stored neuron.

    Raises:
        ValueError: neither "all" nor "some", or "some" with a budget or plan, which count what "all" stores.
    """
    if slots not in SLOTS:
        raise ValueError(f"slots must be one of {SLOTS}, got {slots!r}")
    if slots == "some" and isinstance(share, (Budget, Plan)):
        raise ValueError(
            f"slots must be 'all' with a {type(share).__name__}, which counts the parameters that such slots store, "
            "got 'some'; give share a fraction or a mapping"
        )


def check_keep_zeros(value: Any) -> None:
    """ValueError for what is neither True, False nor "count"."""
    if not (isinstance(value, bool) or value == "count"):
        raise ValueError(f"keep_zeros must be True, False or 'count', got {value!r}")


def check_outputs(outputs: Any, networks: Mapping[str, nn.Module]) -> None:
    """``outputs``: task to the part of its output that counts.

    Raises:
        TypeError: neither a name, an index nor a function.
        KeyError: a task that there is none of.
    """
    if outputs is None:
        return
    if not isinstance(outputs, Mapping):
        raise TypeError(
            f"outputs must be a mapping from task name to what counts, got {type(outputs).__name__}; "
            "write {'a': 'logits'}"
        )
    for task, select in outputs.items():
        if task not in networks:
            raise unknown_task("outputs", task, networks)
        if isinstance(select, bool) or not (select is None or isinstance(select, (str, int)) or callable(select)):
            raise TypeError(
                f"outputs[{task!r}] must be a name, an index, a function of the output or None, "
                f"got {type(select).__name__}"
            )
