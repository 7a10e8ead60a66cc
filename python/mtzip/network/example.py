"""The example input of every task: what a network is traced with when it leaves for a device.

:func:`mtzip.zip_networks` keeps two calibration samples a task in memory. A file of :func:`mtzip.save` has their shapes
and types alone, so that nobody's data travels with a network: after :func:`mtzip.load` they are tensors on the meta
device, and numbers are made up where they are needed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..inputs import Batch, as_batch, device_of

SAMPLES = 2  # of a task; tracing takes a single one for a size that never changes
_DEEPEST = 16  # nesting of a call's arguments
_MOST = 2**31  # elements of an example's tensor
_TYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64),
    )
}


def remembered(batch: Batch, fixed: int | None = None) -> Batch:
    """The first samples of ``batch`` in memory of their own.

    Args:
        batch: calibration inputs.
        fixed: batch size the network insists on, None if any will do.
    """
    few = batch.narrow(0, min(batch.size, fixed or SAMPLES))
    return Batch(*(_map(lambda tensor: tensor.detach().clone(), part) for part in (few.args, few.kwargs)))


def example_of(
    task: str, network: nn.Module, given: Mapping[str, Any] | None, kept: Mapping[str, Batch] | None
) -> Batch:
    """The example input of ``task`` on its network's device; numbers are made up where only shapes are known.

    Args:
        task: its name.
        network: where its example has to be.
        given: what the caller passed, task to a batch as calibration takes them, or None.
        kept: what the zipped network remembers.

    Raises:
        ValueError: there is none.
        TypeError: what was passed is no batch.
    """
    if given is not None and task in given:
        try:
            batch = as_batch(given[task])
            batch.size  # noqa: B018
        except (TypeError, ValueError) as error:
            raise type(error)(f"example[{task!r}]: {error}") from None
    elif kept and task in kept:
        batch = kept[task]
    else:
        raise ValueError(
            f"an example input of task {task!r} is needed and none is remembered; pass example={{{task!r}: inputs}}, "
            "a batch of two samples"
        )
    generator = torch.Generator().manual_seed(0)
    device = device_of(network)

    def real(tensor: Tensor) -> Tensor:
        if tensor.device.type != "meta":
            return tensor.detach().to(device)
        if tensor.is_floating_point():
            return torch.randn(tensor.shape, generator=generator).to(device, tensor.dtype)
        return torch.ones(tensor.shape, dtype=tensor.dtype, device=device)  # a token, a mask that hides nothing

    return Batch(*(_map(real, part) for part in (batch.args, batch.kwargs)))


def to_dict(batch: Batch) -> dict[str, Any] | None:
    """Shapes and types for a manifest; None for arguments that JSON has no form for."""
    try:
        return {"args": _plain(tuple(batch.args)), "kwargs": _plain(dict(batch.kwargs))}
    except TypeError:
        return None


def from_dict(data: Any, where: str) -> Batch:
    """The inverse of :func:`to_dict`: tensors on the meta device.

    Raises:
        ValueError: it is not what :func:`to_dict` writes.
    """
    if not isinstance(data, Mapping) or set(data) != {"args", "kwargs"}:
        raise ValueError(f"{where} must have args and kwargs, got {str(data)[:60]}")
    args, kwargs = (_made(data[name], f"{where}.{name}") for name in ("args", "kwargs"))
    if not isinstance(args, tuple) or not isinstance(kwargs, dict):
        raise ValueError(f"{where} must have a tuple of args and a mapping of kwargs, got others")
    batch = Batch(args, kwargs)
    try:
        batch.size  # noqa: B018
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return batch


def _map(change, part: Any) -> Any:
    return pytree.tree_map(lambda leaf: change(leaf) if isinstance(leaf, Tensor) else leaf, part)


def _plain(value: Any) -> Any:
    kind = type(value)
    if isinstance(value, Tensor) and str(value.dtype).removeprefix("torch.") in _TYPES:
        return {"tensor": [str(value.dtype).removeprefix("torch."), list(value.shape)]}
    if kind in (tuple, list):
        return {kind.__name__: [_plain(item) for item in value]}
    if isinstance(value, Mapping) and all(type(key) is str for key in value):
        return {"dict": {key: _plain(item) for key, item in value.items()}}
    if value is None or kind in (bool, int, str) or (kind is float and math.isfinite(value)):
        return {"value": value}
    raise TypeError(f"no form for {kind.__name__}")


def _made(data: Any, where: str, depth: int = 0) -> Any:
    if isinstance(data, Mapping) and len(data) == 1 and depth < _DEEPEST:
        kind, value = next(iter(data.items()))
        if kind in ("tuple", "list") and isinstance(value, (list, tuple)):
            items = [_made(item, f"{where}[{at}]", depth + 1) for at, item in enumerate(value)]
            return tuple(items) if kind == "tuple" else items
        if kind == "dict" and isinstance(value, Mapping):
            return {str(key): _made(item, f"{where}[{key!r}]", depth + 1) for key, item in value.items()}
        if kind == "value" and (value is None or isinstance(value, (bool, int, float, str))):
            return value
        if kind == "tensor" and isinstance(value, (list, tuple)) and len(value) == 2:
            name, shape = value
            sizes = isinstance(shape, (list, tuple)) and all(type(size) is int and size >= 0 for size in shape)
            if isinstance(name, str) and name in _TYPES and sizes and len(shape) <= 64 and math.prod(shape) <= _MOST:
                if all(size <= _MOST for size in shape):
                    return torch.empty(shape, dtype=_TYPES[name], device="meta")
    raise ValueError(f"{where} must be a value, a tensor's type and shape, or a list of them, got {str(data)[:60]}")
