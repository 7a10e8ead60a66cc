"""What one task minimises in retraining."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..inputs import Batch
from ..network.zipped import ZippedNetwork
from ..trace.select import Select
from .features import captured, in_stored_order, linear_paths, orders_of
from .losses import (
    Loss,
    Spread,
    check_same_shape,
    difference,
    distillation_loss,
    label_loss,
    output_tensor,
    relative_square,
)

#: Key of the outputs among the values that are distilled; no path of a module has a space.
OUTPUTS = "the outputs"


@dataclass
class Objective:
    """What one task minimises.

    Args:
        task: its name.
        loss: of output and targets, None for the default of labels.
        teacher: module or callable to imitate, None for none.
        outputs: whether to imitate its outputs.
        orders: path of each module whose output to imitate, to the order of its channels in the teacher.
        distillation: "mse" or "kl", of the outputs.
        temperature: of "kl".
        spreads: the teacher's variance of each distilled value, once :meth:`measure` has seen the first batches.
        table: the teacher's outputs for every sample of the data set, once :meth:`tabulate` has made them.
        select: what of the network's output counts for labels and teacher; ``loss`` gets the whole of it.
    """

    task: str
    loss: Loss | None = None
    teacher: Callable[..., Any] | None = None
    outputs: bool = True
    orders: Mapping[str, Tensor] = field(default_factory=dict)
    distillation: str = "mse"
    temperature: float = 2.0
    spreads: dict[str, float] = field(default_factory=dict)
    table: Tensor | None = None
    select: Select = None

    def __call__(self, network: nn.Module, batch: Batch, index: Tensor | None = None) -> Tensor:
        """The task's loss on one batch, a scalar.

        Args:
            network: the task's, of the zipped network.
            batch: on its device.
            index: which samples of the data set they are, None where that is not known.

        Raises:
            ValueError: nothing to minimise; shapes that do not go together; a loss that is no scalar.
        """
        self._check(batch)
        if self.teacher is None:
            wanted = {}
        elif self.table is not None and index is not None:
            wanted = {OUTPUTS: [self.table[index.to(self.table.device)]]}
        else:
            wanted = self.wanted(network, batch)
        with self._captured(network, "network", self._differences(wanted)) as features:
            raw = network(*batch.args, **batch.kwargs)
        terms = []
        if OUTPUTS in wanted:
            output, teacher = output_tensor(raw, self.task, self.select), wanted[OUTPUTS][0]
            arguments = (self.distillation, self.temperature, self.spreads.get(OUTPUTS, 1.0), self.task)
            terms.append(distillation_loss(output, teacher.to(output.dtype), batch.targets, *arguments))
        if self.teacher is not None:
            terms += self._feature_terms(features, wanted)
        if self.loss is not None:
            terms.append(self.loss(raw, batch.targets))
        elif batch.targets is not None:
            terms.append(label_loss(output_tensor(raw, self.task, self.select), batch.targets, self.task))
        total = sum(terms)
        if not isinstance(total, Tensor) or total.numel() != 1:
            got = list(total.shape) if isinstance(total, Tensor) else type(total).__name__
            raise ValueError(f"loss= of task {self.task!r} must return a scalar tensor, got {got}; take its mean")
        return total.squeeze()

    def wanted(self, network: nn.Module, batch: Batch) -> dict[str, list[Tensor]]:
        """What the teacher makes of a batch: its outputs, and features in the order of ``network``."""
        last = linear_paths(network, self.orders)

        def take(path: str, value: Tensor) -> Tensor:
            return in_stored_order(value, self.orders[path], path in last, path)

        with torch.no_grad(), self._captured(self.teacher, "teacher", take) as found:
            raw = self.teacher(*batch.args, **batch.kwargs)
        return found | ({OUTPUTS: [output_tensor(raw, self.task, self.select)]} if self.outputs else {})

    def tabulate(self, network: nn.Module, data: Batch, size: int) -> None:
        """Makes the teacher's outputs for a whole data set, so that it need not be run at every step.

        Only where they take no more memory than the inputs, and where the teacher is a module: in evaluation mode it
        says the same of a sample each time.

        Args:
            network: the task's.
            data: all samples.
            size: of the batches to run.
        """
        if self.orders or not self.outputs or not isinstance(self.teacher, nn.Module):
            return
        norms = [module for module in self.teacher.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        if any(norm.running_mean is None for norm in norms):  # what it says of a sample depends on the others
            return
        device = next(network.parameters()).device
        inputs = sum(leaf.nbytes for leaf in pytree.tree_leaves((data.args, data.kwargs)) if isinstance(leaf, Tensor))
        parts: list[Tensor] = []
        for start in range(0, data.size, size):
            batch = data.narrow(start, min(size, data.size - start)).to(device)
            (output,) = self.wanted(network, batch)[OUTPUTS]
            if len(output) != batch.size or output.nbytes * data.size > inputs * batch.size:
                return
            parts.append(output)
        self.table = torch.cat(parts)

    def measure(self, network: nn.Module, batches: list[Batch]) -> dict[str, Spread]:
        """Spread of every distilled value over some batches; its value belongs into ``spreads``."""
        found: dict[str, Spread] = {}
        for batch in batches if self.teacher is not None else ():
            for key, values in self.wanted(network, batch).items():
                for value in values:
                    found.setdefault(key, Spread()).add(value)
        return found

    def _differences(self, wanted: Mapping[str, list[Tensor]]) -> Callable[[str, Tensor], Tensor | None]:
        """What to keep of a feature when it is there: the teacher's taken off, None where it has no such.

        What takes nothing into the backward pass may be done inside a network that recomputes its activations.
        """
        left = {path: iter(values) for path, values in wanted.items()}

        def take(path: str, value: Tensor) -> Tensor | None:
            teacher = next(left.get(path, iter(())), None)
            if teacher is None:
                return None
            check_same_shape(value, teacher, f"features of {path!r}", self.task)
            return difference(value, teacher.to(value.dtype))

        return take

    def _feature_terms(self, found: Mapping[str, list[Any]], wanted: Mapping[str, list[Tensor]]) -> list[Tensor]:
        """One term: the mean over the layers of how far their outputs are from the teacher's, by the differences."""
        if not self.orders:
            return []
        terms = []
        for path in (path for path in found if path in wanted):
            if len(found[path]) != len(wanted[path]):
                raise ValueError(
                    f"the teacher of task {self.task!r} must call its layer {path!r} as often as the network, "
                    f"{len(found[path])} times, got {len(wanted[path])}; pass the network that was zipped"
                )
            terms += [relative_square(value, self.spreads.get(path, 1.0)) for value in found[path]]
        if not terms:
            raise ValueError(
                f"distill='features' found none of {list(self.orders)[:3]} of task {self.task!r} called as a module; "
                "its forward uses their weights itself: use distill='outputs'"
            )
        return [torch.stack(terms).mean()]

    def _captured(
        self, network: Any, which: str, take: Callable[[str, Tensor], Any]
    ) -> contextlib.AbstractContextManager[dict[str, list[Any]]]:
        """What is taken of what the distilled modules put out meanwhile; nothing where features are not asked for."""
        if not self.orders:
            return contextlib.nullcontext({})
        return captured(network, self.orders, self.task, which, take)

    def _check(self, batch: Batch) -> None:
        if self.teacher is None and batch.targets is None:
            raise ValueError(
                f"task {self.task!r} has neither labels nor a teacher, so there is nothing to retrain it for; give "
                "(inputs, targets) batches, or the network from before the zip as teachers={...}"
            )
        if self.loss is not None and batch.targets is None:
            raise ValueError(f"loss= of task {self.task!r} needs targets, got a batch without; give (inputs, targets)")


def objectives_of(
    zipped: ZippedNetwork,
    loss: Loss | Mapping[str, Loss] | None,
    teachers: Mapping[str, Callable[..., Any]] | None,
    distill: str,
    distillation: str,
    temperature: float,
) -> dict[str, Objective]:
    """One :class:`Objective` a task from the arguments of :func:`mtzip.retrain`."""
    teachers = zipped.originals or {} if teachers is None else teachers
    like = next(zipped.parameters())
    orders = orders_of(zipped) if distill != "outputs" and teachers else {}
    return {
        task: Objective(
            task,
            loss.get(task) if isinstance(loss, Mapping) else loss,
            _teacher(teachers.get(task), like),
            distill != "features" or not orders.get(task),  # a task without neurons to compare imitates its outputs
            {path: order.to(like.device) for path, order in orders.get(task, {}).items()},
            distillation,
            temperature,
            select=zipped.outputs.get(task),
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
