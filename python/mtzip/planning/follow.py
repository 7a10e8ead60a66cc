"""Following: a task whose outputs another task's trunk gives better than weights merged of both would.

Networks that were trained apart for one task, or for tasks close to each other, compute much the same by unrelated
weights. A trunk merged of both is true to neither; the trunk of one, with the other's head fitted to it by least
squares, is true to the one and may be truer to the other. That needs networks of one graph and inputs of one form.
How true it is is measured on inputs that the heads were not fitted on.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from itertools import permutations

import torch
from torch import Tensor, nn

from ..distributed import own_share, total
from ..inputs import Batch, leading
from ..merging import install, merge
from ..merging.execute import Execution
from ..merging.moments import View, collect
from ..merging.part import Part, Systems
from ..merging.solve import automatic_damping
from ..network.layout import Run
from ..trace.alike import Trunk, common_trunk
from ..trace.analysis import Analysis, Layer
from .activations import same_form

#: Samples to a column of the head, and bounds of how many are taken, to find out how well a task may follow another.
SAMPLES_PER_COLUMN, FEWEST, MOST = 4, 256, 1024

#: Samples that tell whether that is worth finding out, and how many times too large an error from so few may be. Of two
#: ResNet-20 of one task it is 0.21 in place of 0.13, of two tasks 1.2 in place of 0.77.
FIRST, TOO_LARGE = 64, 2.0

#: Of every so many parts of the samples one is kept apart, to measure on.
PARTS = 4

#: Path of a head to chunks of what it reads and of what it puts out.
Seen = dict[str, tuple[list[Tensor], list[Tensor]]]


class Followers:
    """Which tasks could follow which, and how well.

    Args:
        analyses: of the networks.
        batches: calibration chunks of every task.
    """

    def __init__(self, analyses: Sequence[Analysis], batches: Sequence[list[Batch]]):
        self.analyses, self.batches = analyses, batches
        self._known: dict[tuple[int, int, int], Seen] = {}

    def trunk(self, follower: int, leader: int) -> Trunk:
        """What ``follower`` takes over.

        Raises:
            ValueError: the networks differ in more than their weights and heads.
        """
        pair = [self.analyses[task] for task in (follower, leader)]
        if not same_form(pair):
            raise ValueError("their inputs have other shapes or types")
        return common_trunk(*pair)

    def error(self, follower: int, leader: int, samples: int | None = None) -> float:
        """Relative error of the follower's outputs, on samples that its head was not fitted on; mean of the heads.

        Args:
            follower, leader: tasks.
            samples: to fit and measure on; None for enough.

        Raises:
            ValueError: as of :meth:`trunk`, or the follower has too few samples.
        """
        found, heads = [], self.trunk(follower, leader).heads
        samples = samples or self._enough(follower, [own for own, _ in heads])
        read = self._values(leader, follower, [twin for _, twin in heads], samples)
        wanted = self._values(follower, follower, [own for own, _ in heads], samples)
        for own, twin in heads:
            inputs, outputs = read[twin.path][0], wanted[own.path][1]
            cuts = [len(x) - len(x) // PARTS for x in inputs]
            if total(int(all(cut == len(x) for x, cut in zip(inputs, cuts, strict=True)))):  # in any process
                raise ValueError(f"expected {PARTS} samples in a batch of its inputs at least")
            fit, rest = (
                _head(self.analyses[follower], own, *(_part(values, cuts, side) for values in (inputs, outputs)))
                for side in (0, 1)
            )
            rows = _solved(fit)
            found.append(install.relative_error(rest, rows, install.Outputs.of(rest, rows)))
        return sum(found) / len(found)

    def best(self, merged: Mapping[int, float]) -> dict[int, int]:
        """Who should follow whom, task to leader: the closest first, those that lead follow nobody.

        Args:
            merged: task to the relative error of its outputs as merged. A task is a candidate where its error behind
                another's trunk is less than those of both together; whether that is better for all shows in a zip.
        """
        errors = {}
        for follower, leader in permutations(range(len(self.analyses)), 2):
            allowed = merged[follower] + merged[leader]
            try:
                if self.error(follower, leader, FIRST) < TOO_LARGE * allowed:
                    errors[follower, leader] = self.error(follower, leader)
            except ValueError:
                continue
        chosen: dict[int, int] = {}
        for (follower, leader), error in sorted(errors.items(), key=lambda item: item[1]):
            if follower in chosen or follower in chosen.values() or leader in chosen:
                continue
            if error < merged[follower] + merged[leader]:
                chosen[follower] = leader
        return chosen

    def network(self, follower: int, leader: int, network: nn.Module) -> nn.Module:
        """A copy of the follower's ``network`` with the leader's trunk and heads fitted to that on all its inputs."""
        analysis, trunk = self.analyses[follower], self.trunk(follower, leader)
        new = copy.deepcopy(network)
        with torch.no_grad():
            for path, source in trunk.tensors.items():
                analysis.exported.tensor(path, new).copy_(self.analyses[leader].exported.tensor(source))
        inputs = _seen(self.analyses[leader], self.batches[follower], [twin for _, twin in trunk.heads])
        outputs = _seen(analysis, self.batches[follower], [own for own, _ in trunk.heads])
        for own, twin in trunk.heads:
            part = _head(analysis, own, inputs[twin.path][0], outputs[own.path][1])
            install.install_private(part, new, _solved(part))
        return new

    def _enough(self, task: int, heads: Sequence[Layer]) -> int:
        columns = max(View.of(head).matrix(self.analyses[task].exported.tensor(head.weight)).shape[1] for head in heads)
        return min(MOST, max(FEWEST, SAMPLES_PER_COLUMN * columns))

    def _values(self, task: int, data: int, heads: Sequence[Layer], samples: int) -> Seen:
        """What the heads of ``task`` read and put out on some inputs of task ``data``."""
        key = task, data, samples
        if key not in self._known:
            self._known[key] = _seen(self.analyses[task], leading(self.batches[data], own_share(samples)), heads)
        return self._known[key]


def _seen(analysis: Analysis, batches: Sequence[Batch], heads: Sequence[Layer]) -> Seen:
    """What the heads of an original network read and put out; run chunk by chunk, so that nothing else is kept."""
    found: Seen = {head.path: ([], []) for head in heads}
    for batch in batches:
        execution = Execution(analysis, analysis.exported.network, [batch])
        for head in heads:
            execution.advance(head.node)
            inputs, outputs = found[head.path]
            inputs.append(execution.inputs(head)[0])
            outputs.append(execution.original[head.node.name][0])
            execution.finish(head.node, False)
    return found


def _part(values: Sequence[Tensor], cuts: Sequence[int], side: int) -> list[Tensor]:
    """The first samples of every chunk up to its cut, or those behind it; chunks without any left out."""
    found = [x[cut:] if side else x[:cut] for x, cut in zip(values, cuts, strict=True)]
    return [x for x in found if len(x)]


def _head(analysis: Analysis, layer: Layer, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Part:
    """A head as the merge sees it: to be fitted from nothing, its old weights are for other inputs."""
    view = View.of(layer)
    moment, target = collect(view, inputs, outputs)
    columns, rows = len(moment.mean), len(target.mean)
    weight = moment.mean.new_zeros(rows, columns)
    runs = (Run((0,), columns // max(1, int(torch.tensor(layer.kernel).prod()))),)
    damping = automatic_damping(columns, moment.count)
    constant = "none" if layer.bias is None else "free"
    return Part(
        0, layer, view, analysis, moment, target, weight, weight.new_zeros(rows), runs, damping, constant=constant
    )


def _solved(part: Part) -> merge.Rows:
    """Rows of a head that fit its outputs best."""
    rows = torch.arange(len(part.weight), device=part.weight.device)
    return merge.solve_rows(Systems({0: part}), {0: rows}, None, "refit")[2][0]
