"""What retraining minimises: distance to a teacher's outputs, a loss on labels, or both."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ..trace.select import Select, selected

Loss = Callable[[Any, Any], Tensor]


def output_tensor(output: Any, task: str, select: Select = None) -> Tensor:
    """The tensor that counts of what a network returns: itself, ``logits`` of a dict or ModelOutput, a tuple's first.

    Args:
        output: what it returned.
        task: its name, for messages.
        select: what of the output counts, as :func:`mtzip.zip_networks` was told.

    Raises:
        TypeError: none of these is a tensor.
    """
    output = found = output if select is None else selected(output, select)
    if isinstance(output, Mapping):
        found = output.get("logits")
    elif hasattr(output, "logits"):
        found = output.logits
    elif isinstance(output, (tuple, list)) and output:
        found = output[0]
    if not isinstance(found, Tensor):
        raise TypeError(
            f"the network of task {task!r} must return a tensor, a tuple that starts with one, or something with "
            f"'logits', got {type(output).__name__}; pass loss= to work on it yourself"
        )
    return found


def class_dim(output: Tensor, targets: Tensor | None) -> int | None:
    """Dimension of ``output`` that runs over the classes, None where ``targets`` cannot be class indices of it.

    Targets [N, ...] belong to outputs [N, C, ...], the convention of torch, or [N, ..., C], that of language models.
    Without targets: the last dimension of outputs [N, C] and [N, L, C], dimension 1 of [N, C, H, W] and up.
    """
    if output.dim() < 2:
        return None
    if targets is None:
        return -1 if output.dim() < 4 else 1
    if targets.shape == output.shape[:1] + output.shape[2:]:
        return 1
    return -1 if targets.shape == output.shape[:-1] else None


def is_integer(targets: Any) -> bool:
    """True for targets that may be class indices."""
    return isinstance(targets, Tensor) and not (targets.is_floating_point() or targets.is_complex())


def label_loss(output: Tensor, targets: Any, task: str) -> Tensor:
    """Cross entropy for integer targets, mean squared error for floating ones.

    Args:
        output: [N, C, ...] or [N, ..., C] for class indices [N, ...]; for floating targets of the same size.
        targets: a tensor.
        task: name, for messages.

    Raises:
        TypeError: targets are no tensor.
        ValueError: shapes that do not go together; boolean targets.
    """
    if not isinstance(targets, Tensor):
        raise TypeError(f"targets of task {task!r} must be a tensor, got {type(targets).__name__}; pass loss= for it")
    if not is_integer(targets):
        if targets.numel() != output.numel():
            raise ValueError(
                f"floating targets of task {task!r} must have the shape of the output {list(output.shape)}, "
                f"got {list(targets.shape)}; pass loss= for another comparison"
            )
        return F.mse_loss(output, targets.to(output.dtype).view_as(output))
    dim = class_dim(output, targets)
    if dim is None or output.shape[dim] < 2 or targets.dtype == torch.bool:
        raise ValueError(
            f"integer targets of task {task!r} must be class indices [N, ...] for outputs [N, C, ...] or [N, ..., C] "
            f"with C > 1, got {targets.dtype} {list(targets.shape)} for outputs {list(output.shape)}; "
            "pass loss= (binary_cross_entropy_with_logits for yes or no)"
        )
    return F.cross_entropy(output.movedim(dim, 1), targets.long())


def kl_loss(output: Tensor, teacher: Tensor, dim: int, temperature: float) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(output / T)), mean over all but the classes (Hinton et al. 2015)."""
    student = F.log_softmax(output / temperature, dim)
    target = F.log_softmax(teacher / temperature, dim)
    return temperature**2 * F.kl_div(student, target, reduction="none", log_target=True).sum(dim).mean()


class Spread:
    """Variance of a teacher's values over the batches it is shown, about the mean of each channel.

    Measured once, over the batches of the first step, and kept: so that the loss of a batch is the mean over its
    samples, whatever the size of the batch, the number of batches a step or the number of processes.
    """

    def __init__(self):
        self.count = self.sum = self.square = 0.0

    def add(self, values: Tensor) -> None:
        """Takes in the teacher's values, [N, ...]."""
        values = values.detach().double()
        channels = class_dim(values, None)
        rows = values.reshape(-1, 1) if channels is None else values.movedim(channels, -1).flatten(0, -2)
        self.count = self.count + len(rows)
        self.sum = self.sum + rows.sum(0)
        self.square = self.square + rows.square().sum(0)

    def value(self) -> float:
        """Mean variance of the channels; their mean square where one sample is all there was. Never zero."""
        energy = self.square / self.count
        spread = (energy - (self.sum / self.count).square()).clamp_min(0) if self.count > 1 else energy
        energy, spread = float(energy.mean()), float(spread.mean())
        return max(spread, 1e-6 * energy, 1e-12)  # a teacher whose outputs are all the same


def relative_mse(output: Tensor, teacher: Tensor, spread: float) -> Tensor:
    """Mean squared error relative to the variance of the teacher's outputs: comparable between tasks."""
    return relative_square(difference(output, teacher), spread)


def difference(output: Tensor, teacher: Tensor) -> Tensor:
    """``output - teacher``, in float32 where they are float16, whose range is too small for it."""
    kept = torch.float32 if output.dtype == torch.float16 else output.dtype
    return output.to(kept) - teacher.to(kept)


def relative_square(difference: Tensor, spread: float) -> Tensor:
    """Mean square of a difference that nobody else has, relative to the teacher's variance."""
    return _MeanSquare.apply(difference) / spread


class _MeanSquare(torch.autograd.Function):
    """``x.square().mean()`` whose gradient takes the place of x, in bfloat16 where x is; for one backward pass.

    Under autocast ``F.mse_loss`` makes float32 copies of both sides, forward and backward: three times the time, and
    with features half of a retraining step.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        with torch.autocast(x.device.type, enabled=False):
            size = torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, torch.float32))
            return size.square() / x.numel()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return x.mul_((2 * gradient / x.numel()).to(x.dtype))


def distillation_loss(
    output: Tensor, teacher: Tensor, targets: Any, kind: str, temperature: float, spread: float, task: str
) -> Tensor:
    """How far the outputs are from the teacher's.

    Args:
        output, teacher: of the same shape.
        targets: labels that came along, or None; class indices tell "kl" which dimension runs over the classes.
        kind: "mse" (relative to the teacher's variance: fits logits and regression alike) or "kl".
        temperature: of "kl".
        spread: the teacher's variance, for "mse".
        task: name, for messages.

    Raises:
        ValueError: shapes differ, or "kl" for outputs without classes.
    """
    check_same_shape(output, teacher, "outputs", task)
    if kind == "mse":
        return relative_mse(output, teacher, spread)
    classes = class_dim(output, targets if is_integer(targets) else None)
    if classes is None or output.shape[classes] < 2:
        raise ValueError(
            f"distillation='kl' needs outputs [N, C, ...] with C > 1 classes, got {list(output.shape)} "
            f"for task {task!r}; use distillation='mse'"
        )
    return kl_loss(output, teacher, classes, temperature)


def check_same_shape(output: Tensor, teacher: Tensor, what: str, task: str) -> None:
    """ValueError where the teacher's values cannot be imitated."""
    if output.shape != teacher.shape:
        raise ValueError(
            f"the teacher of task {task!r} must give {what} {list(output.shape)} as the network does, "
            f"got {list(teacher.shape)}; pass the network that was zipped"
        )
