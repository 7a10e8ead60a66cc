"""Checks of what :func:`mtzip.retrain` is called with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from ..errors import unknown_task
from ..network.zipped import ZippedNetwork

CHOICES = {
    "distill": ("outputs", "features", "both"),
    "distillation": ("mse", "kl"),
    "batchnorm": ("frozen", "train"),
}


def check(zipped: Any, loaders: Any, **call: Any) -> None:
    """TypeError, ValueError or KeyError for arguments that are not as documented."""
    if not isinstance(zipped, ZippedNetwork):
        got = type(zipped).__name__
        raise TypeError(
            f"zipped must be a ZippedNetwork, got {got}; make one with mtzip.zip_networks, or take it out of its "
            "wrapper: under torchrun gradients are averaged without one"
        )
    if any(hasattr(parameter, "full_tensor") for parameter in zipped.parameters()):
        raise TypeError(
            "zipped must hold plain tensors, got parameters sharded by fully_shard; retrain before sharding, or "
            "train it in a loop of your own that calls zipped({task: inputs, ...})"
        )
    for name in ("steps", "batch_size", "accumulate", "checkpoint_every"):
        _check_count(name, call[name])
    for name in ("validate_every", "patience"):
        if call[name] is not None:
            _check_count(name, call[name])
            if call["validate"] is None:
                raise ValueError(f"{name} is for validate=, got no validate; pass a function of the network")
    for name in ("validate", "log"):
        if call[name] is not None and not callable(call[name]):
            raise TypeError(f"{name} must be callable, got {type(call[name]).__name__}")
    _check_tasks(zipped, loaders, call)
    _check_weights(call["weights"])
    for name, choices in CHOICES.items():
        if call[name] not in choices:
            raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}, got {call[name]!r}")
    _check_features_until(call["features_until"], call["distill"])
    if isinstance(call["optimizer"], str) and call["optimizer"] != "soap":
        got = call["optimizer"]
        raise ValueError(f"optimizer must be 'soap', an optimizer or a function that makes one, got {got!r}")
    if not call["temperature"] > 0:
        raise ValueError(f"temperature must be > 0, got {call['temperature']!r}")
    if call["dropout"] not in (None, True, False):
        raise ValueError(f"dropout must be None, True or False, got {call['dropout']!r}")
    if call["autocast"] not in (None, torch.bfloat16):
        raise ValueError(
            f"autocast must be torch.bfloat16 or None, got {call['autocast']!r}; float16 would need loss scaling"
        )


def _check_features_until(fraction: Any, distill: str) -> None:
    if not isinstance(fraction, (int, float)) or isinstance(fraction, bool) or not 0 <= fraction <= 1:
        raise ValueError(f"features_until must be a fraction of the steps, from 0 to 1, got {fraction!r}")
    if fraction != 1 and distill != "both":
        raise ValueError(f"features_until is for distill='both', got distill={distill!r}; pass distill='both'")


def _check_count(name: str, number: Any) -> None:
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise ValueError(f"{name} must be a positive integer, got {number!r}")


def _check_tasks(zipped: ZippedNetwork, loaders: Any, call: Mapping[str, Any]) -> None:
    """Every task has a loader, and no mapping names another task."""
    if not isinstance(loaders, Mapping):
        raise TypeError(f"loaders must map every task to its batches, got {type(loaders).__name__}")
    named = {name: call[name] for name in ("teachers", "weights", "loss")}
    for name, mapping in {"loaders": loaders, **named}.items():
        for task in mapping if isinstance(mapping, Mapping) else ():
            if task not in zipped:
                raise unknown_task(f"a key of {name}", task, zipped.tasks)
    missing = [task for task in zipped.tasks if task not in loaders]
    if missing:
        names = ", ".join(map(repr, missing))
        raise ValueError(f"loaders must have every task, since a step takes one batch of each; missing {names}")


def _check_weights(weights: Any) -> None:
    if isinstance(weights, Mapping):
        for task, weight in weights.items():
            if not (math.isfinite(weight) and weight >= 0):
                raise ValueError(f"weights[{task!r}] must be a finite number >= 0, got {weight!r}")
    elif weights not in (None, "balanced"):
        raise ValueError(f"weights must map tasks to factors, or be 'balanced', got {weights!r}")
