"""Light retraining of a zipped network: one batch of every task a step, gradients of shared weights summed."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .errors import unknown_task
from .guard import Snapshot, modes_kept, seeded
from .history import History, Step
from .inputs import device_of
from .loaders import cycle, loader_of
from .losses import Loss
from .objective import Objective, backward, objectives_of
from .share import ZippedNetwork

#: Peak learning rate of the default optimiser. A training-size rate destroys what merging has kept. Measured: mean test
#: error of the fully shared LeNet-300-100 MNIST pair over the originals', 100 steps with labels, three seeds: 0.11 at
#: 3e-4, 0.27 at 1e-3, 0.47 at 2e-3 (0.23 before). The quarter-width VGG-16 pair is 0.3 of 14 better at 1e-3.
LEARNING_RATE = 3e-4
#: Fraction of the steps over which the default schedule warms up.
WARM_UP = 0.1


def retrain(
    zipped: ZippedNetwork,
    loaders: Mapping[str, Any],
    steps: int,
    *,
    loss: Loss | Mapping[str, Loss] | None = None,
    teachers: Mapping[str, Callable[..., Any]] | None = None,
    weights: Mapping[str, float] | None = None,
    distillation: str = "mse",
    temperature: float = 2.0,
    lr: float | None = None,
    optimizer: torch.optim.Optimizer | Callable[..., torch.optim.Optimizer] | None = None,
    scheduler: Any = None,
    batchnorm: str = "frozen",
    batch_size: int = 128,
    seed: int | None = 0,
    log: Callable[[Step], Any] | None = None,
    progress: bool = True,
) -> History:
    """Retrains ``zipped`` in place and returns what happened at every step.

    A step takes one batch of every task, adds up the tasks' gradients and makes one optimiser step. What a task
    minimises is the sum of what there is: the distance to its teacher's outputs, and the loss on its labels.

    Args:
        zipped: the network to retrain; frozen parameters (``requires_grad=False``) stay as they are.
        loaders: task to batches, for every task: a DataLoader or other re-iterable of batches, or a whole data set as
            a tensor, an ``(inputs, targets)`` tuple of tensors, a dict of tensors or a Dataset. Each goes round on its
            own. Batches are inputs, ``(inputs, targets)``, or dicts of keyword arguments (``labels`` the target).
        steps: number of optimiser steps.
        loss: ``loss(output, targets)`` in place of the default for labels (cross entropy for integer targets, mean
            squared error for floating ones); one for all tasks or a mapping from task. It gets the raw output.
        teachers: task to module or callable whose outputs to imitate; None takes ``zipped.originals``, ``{}`` none.
        weights: task to factor of its loss, 1 where not given.
        distillation: "mse" (relative to the variance of the teacher's outputs: fits logits and regression, and
            keeps zipped networks best) or "kl" (logits of a classifier).
        temperature: of "kl".
        lr: peak learning rate of the default optimiser, Adam with warm-up and cosine decay to zero.
        optimizer: instance over the network's parameters, or factory ``optimizer(parameters)``; it brings its own
            learning rate and no schedule.
        scheduler: instance, or factory ``scheduler(optimizer)``; stepped once a step.
        batchnorm: "frozen" leaves the statistics as zipping has fitted them and normalises with them, their affine is
            trained; "train" normalises by the batch and updates them. All else, dropout too, is in training mode.
        batch_size: for whole data sets.
        seed: makes the run repeatable (order of the batches drawn from torch's global generator, dropout) without
            disturbing the caller's generators; None draws from the caller's.
        log: called after every step with its :class:`Step`.
        progress: a bar with the loss of each task, on a terminal.

    Returns:
        History: the loss of each task, learning rate and time of every step.

    Raises:
        KeyError: a task the network does not have.
        ValueError: a task without a loader, without labels and teacher; values out of range; an empty loader.
        TypeError: something of the wrong kind.
        FloatingPointError: a loss or gradient that is not finite; names step and task. The network then has the
            weights of the last step at which everything was finite.
    """
    _check(zipped, loaders, steps, loss, teachers, weights, distillation, temperature, batchnorm, batch_size)
    device = device_of(zipped)
    parameters = [parameter for parameter in zipped.parameters() if parameter.requires_grad]
    if not parameters:
        raise ValueError("zipped must have a parameter with requires_grad=True, got none; there is nothing to retrain")
    optimizer, scheduler = _optimizer(parameters, steps, optimizer, scheduler, lr)
    objectives = objectives_of(zipped, loss, teachers, weights, distillation, temperature)
    batches = {task: cycle(task, loader_of(task, loaders[task], batch_size)) for task in zipped.tasks}
    history = History(zipped.tasks)
    good = Snapshot(zipped)

    with contextlib.ExitStack() as stack:
        stack.enter_context(modes_kept([zipped, *(objective.teacher for objective in objectives.values())]))
        stack.enter_context(seeded(seed, device))
        stack.enter_context(torch.enable_grad())
        stack.callback(_clear_gradients, zipped, optimizer)
        _set_modes(zipped, objectives, batchnorm)
        bar = stack.enter_context(_progress(steps, progress))
        start = time.perf_counter()
        try:
            for step in range(steps):
                _clear_gradients(zipped, optimizer)
                losses = {}
                for task, objective in objectives.items():
                    batch = next(batches[task]).to(device)
                    losses[task] = backward(objective, zipped[task], batch, parameters, step)
                good.keep()
                rate = optimizer.param_groups[0]["lr"]
                optimizer.step()
                _schedule(scheduler, sum(losses.values()))
                history.append(Step(step, losses, rate, time.perf_counter() - start))
                bar.update(losses)
                if log is not None:
                    log(history[-1])
            if not good.finite():
                raise FloatingPointError(f"step {steps - 1}: the weights are not finite after it; lower the lr")
        except BaseException as error:
            # An interrupt leaves what there is; only weights that are no numbers, or led to none, are taken back.
            if isinstance(error, FloatingPointError) or not good.finite():
                good.restore()
            raise
        finally:
            for batch in batches.values():
                batch.close()
    return history


# -- optimiser -----------------------------------------------------------------------------------------------------


def _optimizer(parameters: list[Tensor], steps: int, optimizer: Any, scheduler: Any, lr: float | None):
    """The optimiser and the scheduler (None without)."""
    if optimizer is None:
        optimizer = torch.optim.Adam(parameters, LEARNING_RATE if lr is None else lr)
        if scheduler is None:
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: gentle(step, steps))
    elif lr is not None:
        raise ValueError("lr= is for the default optimizer; give optimizer= its own learning rate")
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


def _clear_gradients(zipped: ZippedNetwork, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    zipped.zero_grad()  # parameters that the user's optimizer does not hold


def _schedule(scheduler: Any, loss: float) -> None:
    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        scheduler.step(loss)
    elif scheduler is not None:
        scheduler.step()


# -- modes and progress -------------------------------------------------------------------------------------------


def _set_modes(zipped: ZippedNetwork, objectives: Mapping[str, Objective], batchnorm: str) -> None:
    zipped.train()
    for module in zipped.modules():
        if batchnorm == "frozen" and isinstance(module, nn.modules.batchnorm._NormBase):
            module.eval()
    for objective in objectives.values():
        if isinstance(objective.teacher, nn.Module):
            objective.teacher.eval()


class _progress:
    """A tqdm bar with the loss of each task; none where there is no terminal, or before a second has passed."""

    def __init__(self, steps: int, shown: bool):
        from tqdm import tqdm

        self.bar = tqdm(total=steps, desc="retraining", unit="step", delay=1, disable=None if shown else True)

    def __enter__(self) -> _progress:
        return self

    def update(self, losses: Mapping[str, float]) -> None:
        self.bar.set_postfix({task: f"{loss:.3g}" for task, loss in losses.items()}, refresh=False)
        self.bar.update()

    def __exit__(self, *_: Any) -> None:
        self.bar.close()


# -- checks --------------------------------------------------------------------------------------------------------


def _check(zipped, loaders, steps, loss, teachers, weights, distillation, temperature, batchnorm, batch_size) -> None:
    if not isinstance(zipped, ZippedNetwork):
        got = type(zipped).__name__
        raise TypeError(f"zipped must be a ZippedNetwork, got {got}; make one with mtzip.zip_networks")
    for name, number in (("steps", steps), ("batch_size", batch_size)):
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise ValueError(f"{name} must be a positive integer, got {number!r}")
    if not isinstance(loaders, Mapping):
        raise TypeError(f"loaders must map every task to its batches, got {type(loaders).__name__}")
    for name, mapping in (("loaders", loaders), ("teachers", teachers), ("weights", weights), ("loss", loss)):
        for task in mapping if isinstance(mapping, Mapping) else ():
            if task not in zipped:
                raise unknown_task(f"a key of {name}", task, zipped.tasks)
    missing = [task for task in zipped.tasks if task not in loaders]
    if missing:
        names = ", ".join(map(repr, missing))
        raise ValueError(f"loaders must have every task, since a step takes one batch of each; missing {names}")
    for task, weight in (weights or {}).items():
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"weights[{task!r}] must be a finite number >= 0, got {weight!r}")
    if distillation not in ("mse", "kl"):
        raise ValueError(f"distillation must be 'mse' or 'kl', got {distillation!r}")
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature!r}")
    if batchnorm not in ("frozen", "train"):
        raise ValueError(f"batchnorm must be 'frozen' or 'train', got {batchnorm!r}")
