"""What one task minimises in retraining, and its part of a step."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .inputs import Batch
from .losses import Loss, distillation_loss, label_loss, output_tensor
from .share import ZippedNetwork


@dataclass
class Objective:
    """What one task minimises."""

    task: str
    loss: Loss | None
    teacher: Callable[..., Any] | None
    weight: float
    distillation: str
    temperature: float

    def __call__(self, network: nn.Module, batch: Batch) -> Tensor:
        """The task's loss on one batch, a scalar."""
        if self.teacher is None and batch.targets is None:
            raise ValueError(
                f"task {self.task!r} has neither labels nor a teacher, so there is nothing to retrain it for; give "
                "(inputs, targets) batches, or the network from before the zip as teachers={...}"
            )
        if self.loss is not None and batch.targets is None:
            raise ValueError(f"loss= of task {self.task!r} needs targets, got a batch without; give (inputs, targets)")
        raw = network(*batch.args, **batch.kwargs)
        terms = []
        if self.teacher is not None:
            with torch.no_grad():
                wanted = output_tensor(self.teacher(*batch.args, **batch.kwargs), self.task)
            output = output_tensor(raw, self.task)
            arguments = (batch.targets, self.distillation, self.temperature, self.task)
            terms.append(distillation_loss(output, wanted.to(output.dtype), *arguments))
        if self.loss is not None:
            terms.append(self.loss(raw, batch.targets))
        elif batch.targets is not None:
            terms.append(label_loss(output_tensor(raw, self.task), batch.targets, self.task))
        total = sum(terms) * self.weight
        if not isinstance(total, Tensor) or total.numel() != 1:
            got = list(total.shape) if isinstance(total, Tensor) else type(total).__name__
            raise ValueError(f"loss= of task {self.task!r} must return a scalar tensor, got {got}; take its mean")
        return total.squeeze()


def backward(objective: Objective, network: nn.Module, batch: Batch, parameters: list[Tensor], step: int) -> float:
    """Adds the task's gradients to ``.grad`` and returns its loss; FloatingPointError where either is not finite."""
    loss = objective(network, batch)
    value = float(loss.detach())
    what = f"the loss is {value}"
    if math.isfinite(value):
        if loss.requires_grad:  # not where all that is left to train belongs to other tasks
            loss.backward()
        if all_finite([parameter.grad for parameter in parameters if parameter.grad is not None]):
            return value
        what = "a gradient is not finite"
    values = [leaf for leaf in (*batch.args, *batch.kwargs.values(), batch.targets) if isinstance(leaf, Tensor)]
    clean = all(torch.isfinite(leaf).all() for leaf in values)
    remedy = "lower the learning rate" if clean else "the batch holds NaN or Inf: clean the data"
    raise FloatingPointError(
        f"step {step}, task {objective.task!r}: {what}; {remedy}. The network has its last good weights again"
    )


def all_finite(tensors: list[Tensor]) -> bool:
    """True if no number of any tensor is NaN or infinite; one pass and one synchronisation where that is so."""
    sums = [tensor.sum() for tensor in tensors if tensor.is_floating_point()]
    if not sums or all(math.isfinite(value) for value in torch.stack(sums).tolist()):
        return True
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)  # a sum may overflow where no number has


def objectives_of(
    zipped: ZippedNetwork,
    loss: Loss | Mapping[str, Loss] | None,
    teachers: Mapping[str, Callable[..., Any]] | None,
    weights: Mapping[str, float] | None,
    distillation: str,
    temperature: float,
) -> dict[str, Objective]:
    """One :class:`Objective` a task from the arguments of :func:`mtzip.retrain`."""
    teachers = zipped.originals or {} if teachers is None else teachers
    like = next(zipped.parameters())
    return {
        task: Objective(
            task,
            loss.get(task) if isinstance(loss, Mapping) else loss,
            _teacher(teachers.get(task), like),
            (weights or {}).get(task, 1.0),
            distillation,
            temperature,
        )
        for task in zipped.tasks
    }


def _teacher(teacher: Any, like: Tensor) -> Any:
    """The teacher, or a copy of it on the device and of the type of the network."""
    if not isinstance(teacher, nn.Module):
        return teacher
    own = next(teacher.parameters(), like)
    if own.device == like.device and own.dtype == like.dtype:
        return teacher
    return copy.deepcopy(teacher).to(like.device, like.dtype)
