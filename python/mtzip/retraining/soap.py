"""SOAP for light retraining: Adam in the eigenbases of a weight's gradients, looked at before the first move."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

TINY = 1e-30  # for a weight whose gradients are all zero


class Soap(torch.optim.Optimizer):
    """Adam in the basis in which a weight's gradients are uncorrelated.

    For every weight, taken as a matrix G of [first size, rest], the first ``look`` gradients move nothing: they add up
    to G G^T and G^T G, whose eigenvectors are the basis from then on; of a convolution with many columns channels and
    pixels are sides of their own. For the distance to a teacher these are, but for scale, the two Kronecker factors of
    the loss' Hessian (Shampoo, Gupta et al. 2018), and Adam's division by the root of the mean square is a step along
    each of their eigenvectors by itself (SOAP, Vyas et al. 2024). Here the basis stays: retraining that is light hardly
    moves it, and a step costs two products of small matrices more than Adam's.
    Vectors (biases, scales) get Adam.

    Args:
        params: parameters, or groups of them.
        lr: learning rate, of Adam's size.
        betas: decay of the means of gradients and of their squares.
        eps: of the root of the mean square over all a weight's gradients, added to that of each: where there are next
            to none, as along constant inputs, Adam's full steps would follow rounding.
        look: gradients of a weight that are only looked at.
        most: a convolution of more columns is split into channels and pixels, and a side that is longer still keeps the
            basis it has; an eigenbasis of n takes n^2 numbers and n^3 work.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-3,
        look: int = 20,
        most: int = 4096,
    ):
        if not (isinstance(look, int) and look >= 1):
            raise ValueError(f"look must be a positive integer, got {look!r}; one gradient at least gives a basis")
        if not (math.isfinite(lr) and lr >= 0):
            raise ValueError(f"lr must be a finite number >= 0, got {lr!r}")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "look": look, "most": most})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step, or one look."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    _step(parameter, self.state[parameter], **group)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch does, but without rounding what is kept of a half-precision weight to half precision."""
        super().load_state_dict(state_dict)
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for at, kept in state_dict["state"].items():
            for key, value in kept.items():
                if isinstance(value, Tensor):
                    self.state[parameters[at]][key] = value.to(parameters[at].device, copy=True)


def _step(
    parameter: Tensor,
    state: dict[str, Any],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    look: int,
    most: int,
    **_: Any,
) -> None:
    gradient = parameter.grad.to(torch.promote_types(parameter.dtype, torch.float32))
    gradient = gradient.reshape(_sides(gradient, most))
    if not state:
        state["step"] = 0
        state["mean"], state["square"] = torch.zeros_like(gradient), torch.zeros_like(gradient)
        for side, size in enumerate(gradient.shape if gradient.dim() > 1 else ()):
            if size <= most:
                state[f"basis {side}"] = gradient.new_zeros(size, size)
    state["step"] += 1
    bases = {side: state[f"basis {side}"] for side in range(gradient.dim()) if f"basis {side}" in state}
    if state["step"] <= look:
        for side, moment in bases.items():
            rows = gradient.movedim(side, 0).flatten(1)
            moment.addmm_(rows, rows.T)
            if state["step"] == look:
                state[f"basis {side}"] = _eigenbasis(moment)
        return
    steps = state["step"] - look
    gradient = _turned(gradient, bases)
    mean, square = state["mean"], state["square"]
    mean.lerp_(gradient, 1 - betas[0])
    square.mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
    square = square / (1 - betas[1] ** steps)
    root = square.sqrt() + eps * square.mean().sqrt() + TINY
    update = mean / (1 - betas[0] ** steps) / root
    update = _turned(update, {side: basis.T for side, basis in bases.items()})
    parameter.sub_((lr * update).reshape(parameter.shape))


def _sides(gradient: Tensor, most: int) -> list[int]:
    """[rows, columns]; of a convolution whose columns are too many, [rows, channels, pixels]."""
    if gradient.dim() < 2:
        return list(gradient.shape)
    rows, *rest = gradient.shape
    columns = math.prod(rest)
    return [rows, columns] if columns <= most or len(rest) == 1 else [rows, rest[0], columns // rest[0]]


def _turned(tensor: Tensor, bases: dict[int, Tensor]) -> Tensor:
    """Every side of ``tensor`` in the basis, one vector a column, that there is for it."""
    for side, basis in bases.items():
        tensor = torch.tensordot(tensor, basis, ([side], [0])).movedim(-1, side)
    return tensor


def _eigenbasis(moment: Tensor) -> Tensor:
    """Eigenvectors [n, n] of a symmetric positive semidefinite matrix, one a column."""
    scale = moment.diagonal().mean()
    if not scale > 0:
        return torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    return torch.linalg.eigh(moment / scale)[1].contiguous()  # the same products after a checkpoint
