"""What of a retraining survives a restart: its state, and going on from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from . import random_state
from .checkpoint import Checkpoint
from .history import History, Step, Validation
from .run import Run

#: Arguments that must be the same when a run goes on.
_SAME = (
    *("steps", "distill", "features_until", "distillation", "temperature", "lr", "batchnorm", "dropout"),
    *("batch_size", "accumulate", "validate_every", "patience", "seed"),
)


def settings_of(call: Mapping[str, Any], run: Run) -> dict[str, Any]:
    """What must be the same when a run goes on, as JSON can hold it."""
    weights = call["weights"]
    return {name: call[name] for name in _SAME} | {
        "tasks": list(run.zipped.tasks),
        "weights": dict(weights) if isinstance(weights, Mapping) else weights,
        "autocast": None if call["autocast"] is None else str(call["autocast"]),
        "validate": call["validate"] is not None,
        "optimizer": type(run.optimizer).__name__,
        "scheduler": None if run.scheduler is None else type(run.scheduler).__name__,
        "processes": run.ranks.size,
    }


def write(run: Run, saved: Checkpoint) -> None:
    """Writes the state of a run; called in all processes, the first one writes."""
    state = state_of(run)
    if run.ranks.rank == 0:
        saved.write(state)


def resume(run: Run, saved: Checkpoint | None) -> None:
    """Goes on from the checkpoint, if there is one.

    Raises:
        ValueError, OSError: it cannot be used, or read.
    """
    if saved is None:
        return
    state: Any = None
    if run.ranks.rank == 0:
        try:
            state = saved.read()
        except (ValueError, OSError) as error:
            state = error
    state = run.ranks.of_first(state, "a checkpoint")  # all go on from the same one, or none does
    if isinstance(state, Exception):
        raise state
    if state is not None:
        try:
            load(run, state)
        except (ValueError, LookupError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
            raise saved.refused(error) from error


def state_of(run: Run) -> dict[str, Any]:
    """Between two steps, everything the next one depends on. Called in all processes, the same in all."""
    own = {
        "loaders": {task: batches.position() for task, batches in run.batches.items()},
        "random": random_state.capture(run.device),
    }
    rows = run.history.rows
    numbers = lambda get: torch.tensor([get(row) for row in rows], dtype=torch.float64)  # noqa: E731
    return {
        "network": _tensors(run.zipped),
        "optimizer": run.optimizer.state_dict(),
        "scheduler": None if run.scheduler is None else run.scheduler.state_dict(),
        "balance": run.balance.state(),
        "best": None if run.best is None else run.best.state(),
        "spreads": {task: objective.spreads for task, objective in run.objectives.items()},
        "history": {
            "losses": numbers(lambda row: list(row.losses.values())),
            "weights": numbers(lambda row: list(row.weights.values())),
            "lr": numbers(lambda row: row.lr),
            "seconds": numbers(lambda row: row.seconds),
            "validations": [[row.step, row.scores] for row in run.history.validations],
        },
        "processes": run.ranks.gathered(own, "a checkpoint"),
    }


def load(run: Run, state: Mapping[str, Any]) -> None:
    """Continues from :func:`state_of`; the network is changed last.

    Raises:
        ValueError, LookupError, TypeError, AttributeError, RuntimeError: it does not fit.
    """
    history = _history(run.zipped.tasks, state["history"])
    tensors, given = _tensors(run.zipped), state["network"]
    for name in {**tensors, **given}:
        ours, its = (None if name not in of else (of[name].shape, of[name].dtype) for of in (tensors, given))
        if ours != its:
            raise ValueError(f"it is of another network: {name} must be {ours}, got {its}")
    own = state["processes"][run.ranks.rank]
    run.optimizer.load_state_dict(state["optimizer"])
    if run.scheduler is not None:
        known = run.scheduler.state_dict()
        run.scheduler.load_state_dict({key: value for key, value in state["scheduler"].items() if key in known})
    run.balance.load(state["balance"])
    if run.best is not None:
        run.best.load(state["best"])
    for task, objective in run.objectives.items():
        objective.spreads = dict(state["spreads"][task])
    for task, batches in run.batches.items():
        batches.go_to(own["loaders"][task])
    run.history, run.before = history, history.seconds
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(given[name])
    run.good.keep()
    random_state.restore(own["random"], run.device)


def _tensors(network: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer once, persistent or not."""
    return {name: tensor.detach() for name, tensor in (*network.named_parameters(), *network.named_buffers())}


def _history(tasks: tuple[str, ...], state: Mapping[str, Any]) -> History:
    columns = [state[name].tolist() for name in ("losses", "weights", "lr", "seconds")]
    rows = [
        Step(number, dict(zip(tasks, losses, strict=True)), lr, seconds, dict(zip(tasks, weights, strict=True)))
        for number, (losses, weights, lr, seconds) in enumerate(zip(*columns, strict=True))
    ]
    return History(tasks, rows, [Validation(int(step), dict(scores)) for step, scores in state["validations"]])
