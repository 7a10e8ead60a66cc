"""How much a network's outputs depend on each neuron, measured without labels.

The sensitivity of a neuron is E[sum (d out / d z_i)^2] over samples, positions and outputs, divided by the variance of
the outputs: the diagonal of the Gauss-Newton matrix with respect to its pre-activation. A small error e in the neuron
costs about E[e^2] times that in relative output error. Rows are fitted more exactly where it is large. It is estimated
with random signs, E_v[(d (v . out) / d z_i)^2], which needs one backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ..distributed import first_samples
from ..inputs import Batch
from ..trace.analysis import Analysis
from .moments import at_least_float32

#: Least sensitivity relative to the layer's mean: a neuron that hardly matters today still keeps its place.
FLOOR = 1e-2


def sensitivities(
    analysis: Analysis, batches: list[Batch], samples: int | None = None, probes: int | None = None, seed: int = 0
) -> dict[str, Tensor]:
    """Sensitivity of every row of every layer, [r] float64; a layer no output depends on is left out.

    Args:
        analysis: of the original network.
        batches: calibration chunks.
        samples: how many of their samples to use; None for 64 with convolutions, whose many positions average the noise
            away, and 512 without.
        probes: draws of the random signs, one backward pass each; None for 2 with convolutions and 4 without.
        seed: of the random signs.
    """
    convolutional = any(layer.kind != "linear" for layer in analysis.layers.values())
    samples = samples or (64 if convolutional else 512)
    probes = probes or (2 if convolutional else 4)
    generator = torch.Generator().manual_seed(seed)
    totals: dict[str, Tensor] = {}
    outputs: list[Tensor] = []
    taken = 0
    for batch in first_samples(batches, samples):
        batch = batch.narrow(0, min(batch.size, samples - taken))
        for path, gradient in _gradients(analysis, batch, generator, probes, outputs):
            axis = -1 if analysis.layers[path].kind == "linear" else 1
            squares = at_least_float32(gradient).square().movedim(axis, -1).reshape(-1, gradient.shape[axis])
            totals[path] = totals.get(path, 0) + squares.sum(0, dtype=torch.float64)
        taken += batch.size
        if taken >= samples:
            break
    if not outputs:
        return {}
    variance = torch.cat(outputs).double().var(0, correction=0).sum()
    scale = 1 / (taken * probes * (variance if variance > 0 else 1.0))
    return {path: total * scale for path, total in totals.items() if 0 < total.mean() < torch.inf}


def _gradients(
    analysis: Analysis, batch: Batch, generator: torch.Generator, probes: int, seen: list[Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Path and gradient of the randomly signed outputs with respect to every layer's output, once a probe.

    The outputs [n, everything] go to ``seen``.
    """
    exported = analysis.exported
    layers = {layer.node.name: path for path, layer in analysis.layers.items() if layer.calls == 1}
    leaves = pytree.tree_leaves((batch.args, batch.kwargs))
    values: dict[str, Any] = dict(zip(exported.inputs, leaves, strict=True))
    values.update({name: exported.tensor(path) for name, path in exported.tensors.items()})
    values.update(exported.constants)
    marked: dict[str, Tensor] = {}
    outputs: list[Tensor] = []
    with torch.enable_grad():
        for node in exported.graph.nodes:
            if node.op == "call_function":
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda arg: values[arg.name])
                value = node.target(*args, **kwargs)
                if node.name in layers:
                    value = value if value.requires_grad else value.detach().requires_grad_()
                    marked[layers[node.name]] = value
                values[node.name] = value
            elif node.op == "output":
                outputs = [values[arg.name] for arg in node.all_input_nodes]
                outputs = [out for out in outputs if isinstance(out, Tensor) and out.requires_grad]
    if outputs:
        seen.append(torch.cat([out.detach().flatten(1) for out in outputs if len(out) == batch.size], 1))
    for probe in range(probes if outputs else 0):
        signs = [torch.randint(0, 2, out.shape, generator=generator).to(out) * 2 - 1 for out in outputs]
        try:
            gradients = torch.autograd.grad(
                outputs, list(marked.values()), signs, retain_graph=probe < probes - 1, allow_unused=True
            )
        except RuntimeError:  # an operator without a derivative: rows count alike
            return
        for path, gradient in zip(marked, gradients, strict=True):
            if gradient is not None:
                yield path, gradient


def row_weighting(sensitivity: Tensor, scale: Tensor | None) -> Tensor:
    """Factor [r] on the rows of a joint fit: the root of the sensitivity, of the output after a folded BatchNorm.

    Its mean square is one: only the rows of a layer are weighed against each other. Weighing the tasks by their
    sensitivities too lets the more sensitive one take the shared weights over (measured).

    Args:
        sensitivity: of the layer's own output, [r].
        scale: [r] of the folded BatchNorm, None for none.
    """
    if scale is not None:
        alive = scale.square() > 0
        sensitivity = torch.where(alive, sensitivity / torch.where(alive, scale.square(), 1), 0)
    mean = sensitivity.mean()
    if not mean > 0:
        return torch.ones_like(sensitivity)
    weights = (sensitivity / mean).clamp_min(FLOOR)
    return (weights / weights.mean()).sqrt()
