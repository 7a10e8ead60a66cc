"""The default optimiser and its schedule, or the user's."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .soap import Soap

#: Peak learning rate of the default optimiser. A training-size rate destroys what merging has kept. Measured: mean test
#: error of the fully shared LeNet-300-100 MNIST pair over the originals', 100 steps with labels, three seeds: 0.11 at
#: 3e-4, 0.27 at 1e-3, 0.47 at 2e-3 (0.23 before). The quarter-width VGG-16 pair is 0.3 of 14 better at 1e-3.
LEARNING_RATE = 3e-4
#: The same of SOAP.
SOAP_RATE = 1e-3
#: Fraction of the steps over which the default schedule warms up.
WARM_UP = 0.1
#: Fraction of the steps in which SOAP only looks at gradients, and the most there are.
LOOK, MOST_LOOKS = 0.05, 20


def optimizer_of(parameters: list[Tensor], steps: int, optimizer: Any, scheduler: Any, lr: float | None):
    """The optimiser and the scheduler (None without) from the arguments of :func:`mtzip.retrain`.

    Raises:
        TypeError: no optimiser.
        ValueError: one of other parameters; ``lr`` beside an optimiser that has its own.
    """
    if optimizer is None:
        # Fused: one pass over the weights, a third of the time on a CPU, where the optimiser is half of a small step.
        fused = all(parameter.device.type in ("cpu", "cuda") for parameter in parameters)
        optimizer = torch.optim.Adam(parameters, LEARNING_RATE if lr is None else lr, fused=fused)
        if scheduler is None:
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: gentle(step, steps))
    elif isinstance(optimizer, str):
        looks = min(max(1, round(LOOK * steps)), MOST_LOOKS)
        optimizer = Soap(parameters, SOAP_RATE if lr is None else lr, look=looks)
        if scheduler is None:  # a look takes no rate: the warm-up begins with the first move
            scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer, lambda step: gentle(step - looks, steps - looks) if step >= looks else 0.0
            )
    elif lr is not None:
        raise ValueError("lr= is for the default optimizer and 'soap'; give optimizer= its own learning rate")
    elif not isinstance(optimizer, torch.optim.Optimizer):
        optimizer = optimizer(parameters)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be, or return, a torch.optim.Optimizer, got {type(optimizer).__name__}")
    known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not any(id(parameter) in known for parameter in parameters):
        raise ValueError(
            "optimizer must hold parameters of the zipped network, got none of them; make it from zipped.parameters()"
        )
    if scheduler is not None and not hasattr(scheduler, "step"):
        scheduler = scheduler(optimizer)
    return optimizer, scheduler


def gentle(step: int, steps: int) -> float:
    """Factor of the learning rate at ``step``: linear warm-up, then a cosine to zero."""
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return (step + 1) / (warm + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def schedule(scheduler: Any, loss: float) -> None:
    """One step of a scheduler, if there is one."""
    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        scheduler.step(loss)
    elif scheduler is not None:
        scheduler.step()
