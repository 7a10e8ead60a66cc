"""A retraining under way: what a step reads, does and changes."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..distributed import Ranks
from ..inputs import Batch, device_of
from ..network.zipped import ZippedNetwork
from .balance import Balanced, Fixed
from .guard import Snapshot, all_finite
from .history import History, Step, Validation
from .loaders import Cycle, ShuffledBatches
from .objective import Objective
from .optimizers import schedule
from .validation import Best


@dataclass
class Run:
    """Everything a step reads and changes.

    Args:
        zipped: the network being retrained.
        objectives: task to what it minimises.
        batches: task to its batches.
        optimizer, scheduler: the scheduler None without.
        balance: factors of the tasks.
        best: best weights so far, None without validation.
        batchnorm: "frozen" or "train".
        dropout: None switches it on for tasks without a teacher.
        accumulate: batches of every task a step.
        steps: to be taken.
        feature_steps: of these imitate features, the first ones.
        autocast: type of mixed precision, None without.
        ranks: processes that average their gradients.
    """

    zipped: ZippedNetwork
    objectives: Mapping[str, Objective]
    batches: Mapping[str, Cycle]
    optimizer: torch.optim.Optimizer
    scheduler: Any
    balance: Fixed | Balanced
    best: Best | None
    batchnorm: str
    dropout: bool | None
    accumulate: int
    steps: int
    feature_steps: int
    autocast: torch.dtype | None
    ranks: Ranks

    def __post_init__(self):
        self.device = device_of(self.zipped)
        self.parameters = [parameter for parameter in self.zipped.parameters() if parameter.requires_grad]
        self.history = History(self.zipped.tasks)
        self.good = Snapshot(self.zipped)
        self.zeros = self.zipped.zeros() if self.zipped.keep_zeros else None
        self.before = 0.0  # seconds of earlier runs
        self.started = time.perf_counter()
        self._ready = False

    @property
    def step_count(self) -> int:
        """Steps taken."""
        return len(self.history)

    # -- a step ------------------------------------------------------------------------------------------------

    def step(self, stop: bool = False) -> tuple[Step, bool]:
        """Makes one step.

        Args:
            stop: whether this process has been asked to stop.

        Returns:
            What happened, and whether any process has been asked to stop.

        Raises:
            FloatingPointError: a loss or gradient that is not finite; the weights are then as before.
        """
        self.clear_gradients()
        if self.step_count >= self.feature_steps:
            self._drop_features()
        drawn = {task: [next(batches) for _ in range(self.accumulate)] for task, batches in self.batches.items()}
        if not self._ready:
            self._begin(drawn)
        weights = dict(self.balance.weights)
        found = [self._backward(task, drawn[task], weights.get(task, 1.0)) for task in self.objectives]
        values = torch.stack([*found, found[0].new_tensor(float(stop))])
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        self.ranks.mean_([values, *gradients], "the gradients of a step")  # NaN of one reaches all
        *values, stop = values.tolist()
        losses = dict(zip(self.objectives, values, strict=True))
        if not (all(map(math.isfinite, values)) and all_finite(gradients)):
            raise FloatingPointError(self._blame(losses, drawn))
        self.good.keep()
        rate = float(self.optimizer.param_groups[0]["lr"])
        self.optimizer.step()
        if self.zeros is not None:
            self.zeros.restore_()
        schedule(self.scheduler, sum(weights.get(task, 1.0) * loss for task, loss in losses.items()))
        self.balance.update(losses)
        weights = {task: weights.get(task, 1.0) for task in losses}
        seconds = self.before + time.perf_counter() - self.started
        self.history.append(Step(self.step_count, losses, rate, seconds, weights))
        return self.history[-1], stop > 0

    def _backward(self, task: str, batches: list[Batch], weight: float) -> Tensor:
        """Adds a task's gradients to ``.grad``; its loss, [] float64 without the factor."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for batch in batches:
            with self._precision():
                loss = self.objectives[task](self.zipped[task], batch.to(self.device), getattr(batch, "index", None))
            if loss.requires_grad:  # not where all that is left to train belongs to other tasks
                (loss * (weight / len(batches))).backward()
            total += loss.detach() / len(batches)
        return total

    def _drop_features(self) -> None:
        """From here on outputs alone are imitated."""
        for objective in self.objectives.values():
            if objective.orders:
                objective.orders, self._ready = {}, False  # there may be something to tabulate now

    def _begin(self, drawn: Mapping[str, list[Batch]]) -> None:
        """Modes, and how far the teachers' values spread, for which a step's batches are taken."""
        self._set_modes()
        self._ready = True
        batches = (self.steps - self.feature_steps) * self.accumulate
        for task, objective in self.objectives.items():
            loader = self.batches[task].loader
            if isinstance(loader, ShuffledBatches) and batches * loader.batch_size >= loader.size:
                with self._precision():  # every sample is needed once at least
                    objective.tabulate(self.zipped[task], loader.data, loader.batch_size)
            if objective.teacher is None or objective.spreads:
                continue
            with self._precision():
                spreads = objective.measure(self.zipped[task], [batch.to(self.device) for batch in drawn[task]])
            for key, spread in spreads.items():
                count = torch.tensor(float(spread.count), dtype=torch.float64, device=self.device)
                self.ranks.sum_([count, spread.sum, spread.square], "the spread of the teachers' outputs")
                spread.count = float(count)
                objective.spreads[key] = spread.value()

    def _set_modes(self) -> None:
        """Training mode as far as it helps, teachers in evaluation mode.

        Beside a teacher dropout only adds noise. Measured on two networks for scikit-learn's digits, merged by
        averaging, 400 steps, three seeds: squared distance to the originals with dropout 0.3 on 3.0 and off 1.4, with
        0.5 on 5.6 and off 1.3 (28 before); with labels beside the teachers 3.5 and 1.9, 5.9 and 1.8. Test errors went
        the same way.
        """
        for task, network in self.zipped.networks.items():
            network.train(self.objectives[task].teacher is None if self.dropout is None else self.dropout)
            for module in network.modules():
                if isinstance(module, nn.modules.batchnorm._NormBase):
                    module.train(self.batchnorm == "train")
                elif isinstance(module, nn.RNNBase):
                    module.train()  # cuDNN has no backward pass of one in evaluation mode
        for objective in self.objectives.values():
            if isinstance(objective.teacher, nn.Module):
                objective.teacher.eval()

    def _precision(self) -> contextlib.AbstractContextManager:
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.autocast)

    def _blame(self, losses: Mapping[str, float], drawn: Mapping[str, list[Batch]]) -> str:
        """Which task's loss or gradient is not finite, and what to do. Takes the gradients apart to find out."""
        guilty = [task for task, value in losses.items() if not math.isfinite(value)]
        what = f"the loss is {losses[guilty[0]]}" if guilty else "a gradient is not finite"
        for task in losses if not guilty else ():
            self.clear_gradients()
            self._backward(task, drawn[task], self.balance.weights.get(task, 1.0))
            if not all_finite(p.grad for p in self.parameters if p.grad is not None):
                guilty.append(task)
        task = (guilty or list(losses))[0]
        leaves = pytree.tree_leaves([(batch.args, batch.kwargs, batch.targets) for batch in drawn[task]])
        clean = all(bool(torch.isfinite(leaf).all()) for leaf in leaves if isinstance(leaf, Tensor))
        remedy = "lower the learning rate" if clean else "the batch holds NaN or Inf: clean the data"
        remedy += "" if self.ranks.alone else " (of this process or another)"
        return f"step {self.step_count}, task {task!r}: {what}; {remedy}. The network has its last good weights again"

    def clear_gradients(self) -> None:
        """No parameter has a gradient any more."""
        self.optimizer.zero_grad()
        self.zipped.zero_grad()  # parameters that the user's optimizer does not hold

    def validate(self) -> Validation:
        """Scores the network and keeps its weights if they are the best."""
        together = lambda scores: self.ranks.means(scores, "the validation")  # noqa: E731
        self.history.validations.append(self.best.look(self.step_count, self.device, together))
        return self.history.validations[-1]
