"""``retrain``: light retraining of a zipped network, one batch of every task a step."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..distributed import Ranks
from ..inputs import device_of
from ..network.zipped import ZippedNetwork
from .arguments import check
from .balance import Balanced, Fixed
from .checkpoint import Checkpoint, Termination, fingerprint
from .guard import modes_kept, seeded
from .history import History
from .loaders import Cycle, loader_of
from .losses import Loss
from .objective import objectives_of
from .optimizers import optimizer_of
from .resume import resume, settings_of, write
from .run import Run
from .validation import Best


def retrain(
    zipped: ZippedNetwork,
    loaders: Mapping[str, Any],
    steps: int,
    *,
    loss: Loss | Mapping[str, Loss] | None = None,
    teachers: Mapping[str, Callable[..., Any]] | None = None,
    weights: Mapping[str, float] | str | None = None,
    distill: str = "outputs",
    features_until: float = 1.0,
    distillation: str = "mse",
    temperature: float = 2.0,
    lr: float | None = None,
    optimizer: torch.optim.Optimizer | Callable[..., torch.optim.Optimizer] | str | None = None,
    scheduler: Any = None,
    batchnorm: str = "frozen",
    dropout: bool | None = None,
    batch_size: int = 128,
    accumulate: int = 1,
    autocast: torch.dtype | None = None,
    validate: Callable[[ZippedNetwork], float | Mapping[str, float]] | None = None,
    validate_every: int | None = None,
    patience: int | None = None,
    checkpoint: str | os.PathLike | None = None,
    checkpoint_every: int = 50,
    distributed: bool | None = None,
    seed: int | None = 0,
    log: Callable[[int, dict[str, float]], Any] | None = None,
    progress: bool = True,
) -> History:
    """Retrains ``zipped`` in place and returns what happened at every step.

    A step takes one batch of every task, adds up the tasks' gradients and makes one optimiser step. What a task
    minimises is the sum of what there is: the distance to its teacher, and the loss on its labels.

    Args:
        zipped: the network to retrain; frozen parameters (``requires_grad=False``) stay as they are, and so do zeros
            of the weights where it was zipped with ``keep_zeros``.
        loaders: task to batches, for every task: a DataLoader or other re-iterable of batches, or a whole data set as
            a tensor, an ``(inputs, targets)`` tuple of tensors, a dict of tensors or a Dataset. Each goes round on its
            own. Batches are inputs, ``(inputs, targets)``, or dicts of keyword arguments (``labels`` the target).
        steps: number of optimiser steps.
        loss: ``loss(output, targets)`` in place of the default for labels (cross entropy for integer targets, mean
            squared error for floating ones); one for all tasks or a mapping from task. It gets the raw output.
        teachers: task to module or callable to imitate; None takes ``zipped.originals``, ``{}`` none.
        weights: task to factor of its loss, 1 where not given; or "balanced": by what is left of every loss, so that
            no task starves another (GradNorm's inverse training rate, Chen et al. 2018).
        distill: what to imitate: the teachers' "outputs", their "features" (pre-activations of the layers that tasks
            share), or "both".
        features_until: fraction of the steps, the first ones, that imitate features where ``distill="both"``; the
            others imitate outputs alone. Where tasks share so much that features cannot be met, they keep outputs away.
        distillation: of the outputs: "mse" (relative to the variance of the teacher's outputs: fits logits and
            regression, and keeps zipped networks best) or "kl" (logits of a classifier).
        temperature: of "kl".
        lr: peak learning rate of the default optimiser, Adam with warm-up and cosine decay to zero, and of "soap".
        optimizer: instance over the network's parameters, or factory ``optimizer(parameters)``; it brings its own
            learning rate and no schedule. "soap" is Adam in the eigenbases of the weights' gradients
            (:mod:`mtzip.retraining.soap`), with Adam's schedule: a twentieth of the steps, at most 20, only look at
            gradients, the others come further than Adam's.
        scheduler: instance, or factory ``scheduler(optimizer)``; stepped once a step.
        batchnorm: "frozen" leaves the statistics as zipping has fitted them and normalises with them, their affine is
            trained; "train" normalises by the batch and updates them.
        dropout: whether the networks are in training mode, as dropout needs; None for tasks without a teacher.
        batch_size: for whole data sets.
        accumulate: batches of every task a step: their mean gradient, in the memory of one.
        autocast: mixed precision: ``torch.bfloat16``. None computes in the types of the network.
        validate: called with the network, in evaluation mode and without gradients, returns a number or a dict of
            them, lower is better; before the first step, every ``validate_every`` and after the last. The network is
            left with the weights that scored best (the mean of a dict).
        validate_every: steps; None for a tenth of ``steps``.
        patience: stop after so many validations without a better score.
        checkpoint: file to go on from. Where it is there, the run continues behind the step it was written at;
            otherwise, and from then on, it is written every ``checkpoint_every`` steps, at the end and on SIGTERM,
            which then ends the process with status 143. A run that was killed and called again in the same way ends
            with the same weights, bit for bit. The batches of the round under way are drawn again.
        checkpoint_every: steps.
        distributed: None averages gradients over the processes of torch.distributed's default group, if there is one:
            call it in all of them, each with its own part of the data. False does not.
        seed: makes the run repeatable (order of the batches drawn from torch's global generator, dropout) without
            disturbing the caller's generators; None draws from the caller's.
        log: called after every step and validation as ``log(steps_taken, scalars)``, scalars a dict of ``loss/<task>``,
            ``weight/<task>``, ``lr``, ``seconds``, ``validation/<name>``.
        progress: a bar with the loss of each task, on a terminal.

    Returns:
        History: the loss of each task, learning rate and time of every step, and the validations. The network's report
        keeps the losses in few values.

    Raises:
        KeyError: a task the network does not have.
        ValueError: a task without a loader, without labels and teacher; values out of range; an empty loader; a
            checkpoint that is damaged, or of another call.
        TypeError: something of the wrong kind.
        FloatingPointError: a loss or gradient that is not finite; names step and task. The network then has the
            weights of the last step at which everything was finite.
        RuntimeError: another process of the group is gone.
    """
    call = dict(locals())
    check(**call)
    ranks = Ranks(distributed)
    run = _run(call, ranks)
    saved = None
    if checkpoint is not None:
        saved = Checkpoint(checkpoint, checkpoint_every, settings_of(call, run), fingerprint(zipped))
    with contextlib.ExitStack() as stack:
        teachers_found = [objective.teacher for objective in run.objectives.values()]
        stack.enter_context(modes_kept([zipped, *teachers_found]))
        stack.enter_context(seeded(None if seed is None else seed + ranks.rank, run.device))
        stack.enter_context(torch.enable_grad())
        stack.callback(run.clear_gradients)
        for batches in run.batches.values():
            stack.callback(batches.close)
        ranks.take_([*zipped.parameters(), *zipped.buffers()], "the weights to start with")
        resume(run, saved)
        stop = stack.enter_context(Termination().noted()) if saved is not None else Termination()
        bar = stack.enter_context(_Progress(run.step_count, steps, progress and ranks.rank == 0))
        try:
            _loop(run, steps, saved, stop, log, bar)
            if not run.good.finite():
                raise FloatingPointError(
                    f"step {run.step_count - 1}: the weights are not finite after it; lower the lr"
                )
        except BaseException as error:
            # An interrupt leaves what there is; only weights that are no numbers, or led to none, are taken back.
            if isinstance(error, FloatingPointError) or not run.good.finite():
                run.good.restore()
            raise
    if run.best is not None and run.best.score < float("inf"):
        run.best.weights.restore()
        run.history.best = run.best.step
    if zipped.report is not None:
        zipped.report.note_retraining({task: run.history.losses(task) for task in zipped.tasks})
    return run.history


def _run(call: Mapping[str, Any], ranks: Ranks) -> Run:
    """The run of a call, at its beginning."""
    zipped, steps, weights = call["zipped"], call["steps"], call["weights"]
    device = device_of(zipped)
    parameters = [parameter for parameter in zipped.parameters() if parameter.requires_grad]
    if not parameters:
        raise ValueError("zipped must have a parameter with requires_grad=True, got none; there is nothing to retrain")
    optimizer, scheduler = optimizer_of(parameters, steps, call["optimizer"], call["scheduler"], call["lr"])
    loaders = {task: loader_of(task, call["loaders"][task], call["batch_size"]) for task in zipped.tasks}
    best = None
    if call["validate"] is not None:
        best = Best(zipped, call["validate"], call["validate_every"] or max(1, steps // 10), call["patience"])
    return Run(
        zipped,
        objectives_of(zipped, *(call[name] for name in ("loss", "teachers", "distill", "distillation", "temperature"))),
        {task: Cycle(task, loader, device) for task, loader in loaders.items()},
        optimizer,
        scheduler,
        Balanced(zipped.tasks) if weights == "balanced" else Fixed(weights or {}),
        best,
        call["batchnorm"],
        call["dropout"],
        call["accumulate"],
        steps,
        {"outputs": 0, "both": round(call["features_until"] * steps), "features": steps}[call["distill"]],
        call["autocast"],
        ranks,
    )


def _loop(run: Run, steps: int, saved: Checkpoint | None, stop: Termination, log: Any, bar: _Progress) -> None:
    """Steps, validations and checkpoints until the last step, or patience has run out."""
    if run.best is not None and not run.history.validations:
        _report(log, 0, {}, run)
    while run.step_count < steps and not (run.best is not None and run.best.exhausted):
        row, stopping = run.step(stop.requested)
        _report(log, run.step_count, row.scalars(), run, steps)
        bar.update(row.losses)
        done = run.step_count == steps or (run.best is not None and run.best.exhausted)
        if saved is not None and (done or stopping or run.step_count % saved.every == 0):
            write(run, saved)
        if stopping and not done:
            stop.obey()


def _report(log: Any, step: int, scalars: dict[str, float], run: Run, steps: int | None = None) -> None:
    """Validates where it is time to, and logs."""
    if run.best is not None and (steps is None or run.best.due(step, steps)):
        scores = run.validate().scores
        scalars = scalars | {f"validation/{name}": score for name, score in scores.items()}
    if log is not None:
        log(step, scalars)


class _Progress:
    """A tqdm bar with the loss of each task; none where there is no terminal, or before a second has passed."""

    def __init__(self, done: int, steps: int, shown: bool):
        from tqdm import tqdm

        disable = None if shown else True
        self.bar = tqdm(total=steps, initial=done, desc="retraining", unit="step", delay=1, disable=disable)

    def __enter__(self) -> _Progress:
        return self

    def update(self, losses: Mapping[str, float]) -> None:
        self.bar.set_postfix({task: f"{loss:.3g}" for task, loss in losses.items()}, refresh=False)
        self.bar.update()

    def __exit__(self, *_: Any) -> None:
        self.bar.close()
