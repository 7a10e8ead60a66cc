"""Argument checks shared by the operators. Messages say: name, expected, got, remedy."""

from __future__ import annotations

import math

import torch


def shape(tensor: torch.Tensor) -> list[int]:
    """The shape as a plain list, for messages."""
    return list(tensor.shape)


def tensor_of(op: str, name: str, value: object, dtypes: tuple[torch.dtype, ...], dimensions: int) -> None:
    """`value` must be a dense tensor of one of `dtypes` with at least `dimensions` dimensions."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        names = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(
            f"{op}: {name} must be {names}, got {str(value.dtype).removeprefix('torch.')}; convert it with .to()"
        )
    if value.dim() < dimensions:
        raise ValueError(f"{op}: {name} must have at least {dimensions} dimensions, got shape {shape(value)}")


def alike(op: str, first: str, a: torch.Tensor, second: str, b: torch.Tensor) -> None:
    """Two tensors must share element type and device."""
    if a.dtype != b.dtype:
        raise TypeError(
            f"{op}: {second} must be {a.dtype} as {first} is, got {b.dtype}; convert one of them with .to()"
        )
    if a.device != b.device:
        raise ValueError(
            f"{op}: {second} must be on {a.device} as {first} is, got {b.device}; move one of them with .to()"
        )


def no_gradient(op: str, **tensors: object) -> None:
    """The operators have no derivative: refuse to lose one silently."""
    if not torch.is_grad_enabled():
        return
    for name, tensor in tensors.items():
        if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
            raise ValueError(
                f"{op}: {name} requires grad, but {op} has no derivative; pass {name}.detach() or use torch.no_grad()"
            )


def broadcast_batch(op: str, **tensors: tuple[torch.Tensor, int]) -> list[int]:
    """Leading dimensions of all tensors, each given with the number of its own trailing dimensions, broadcast."""
    batches = {name: list(t.shape[: t.dim() - own]) for name, (t, own) in tensors.items()}
    result, *others = batches.values()
    if all(batch == result for batch in others):
        return result
    for batch in others:
        longer, shorter = (result, batch) if len(result) >= len(batch) else (batch, result)
        shorter = [1] * (len(longer) - len(shorter)) + shorter
        result = []
        for x, y in zip(longer, shorter, strict=True):
            if x != y and x != 1 and y != 1:
                listed = ", ".join(f"{name} {b}" for name, b in batches.items())
                raise ValueError(f"{op}: leading dimensions must be equal or broadcast, got {listed}")
            result.append(y if x == 1 else x)
    return result


def as_batch(tensor: torch.Tensor, batch: list[int], own: int) -> torch.Tensor:
    """[..., own dimensions] -> [prod(batch), own dimensions], a view wherever strides allow one."""
    lead = tensor.dim() - own
    if lead == 0 and not batch:
        return tensor.unsqueeze(0)
    if lead == 1 and tensor.shape[0] == batch[0] and len(batch) == 1:
        return tensor
    tail = tensor.shape[lead:]
    return tensor.expand(*batch, *tail).reshape(math.prod(batch), *tail)
