"""This library, its ablations, and the baselines, on the same networks with the same calibration images and steps.

Every method gives a :class:`mtzip.ZippedNetwork` to measure and to retrain in one way, whatever it shares: one trunk
trained from scratch is a zip of copies of an untrained network, separately pruned networks are a zip that shares none.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import mtzip
from mtzip.demo.train import evaluating

from .ablated import equal_rows, euclidean_pairs, moment_of_pixels
from .case import Case
from .pruning import pruned

Images = dict[str, Tensor]
#: What :func:`mtzip.retrain` is told to imitate outputs alone, whatever the recipe says.
OUTPUTS = {"distill": "outputs", "features_until": 1.0}


@dataclass(frozen=True)
class Method:
    """A way to come to one network from several.

    Args:
        make: from case, calibration images and seed to the network before retraining.
        retrain: what :func:`mtzip.retrain` is told beside data, steps, teachers and seed; called with the case.
        before: whether the network is worth measuring before retraining.
        labels: whether it cannot do without labels.
    """

    make: Callable[[Case, Images, int], mtzip.ZippedNetwork]
    retrain: Callable[[Case], dict[str, Any]] = field(default=lambda case: {})
    before: bool = True
    labels: bool = False


def zipped(
    without: Any = contextlib.nullcontext, **settings: Any
) -> Callable[[Case, Images, int], mtzip.ZippedNetwork]:
    """Zipping with settings of :func:`mtzip.zip_networks`, in a context of :mod:`bench.paper.ablated`."""

    def make(case: Case, images: Images, seed: int) -> mtzip.ZippedNetwork:
        usual = {"keep_zeros": case.keep_zeros, "reconstructions": case.reconstructions}
        with without():
            return mtzip.zip_networks(case.networks, images, share=case.share, **{**usual, **settings})

    return make


def planned(case: Case, images: Images, seed: int) -> mtzip.ZippedNetwork:
    """Zipping within a budget of as many parameters as the same share of every axis would store."""
    few = {task: x[:200] for task, x in images.items()}
    same = mtzip.zip_networks(case.networks, few, share=case.share).parameter_count()
    total = sum(p.numel() for network in case.networks.values() for p in network.parameters())
    return mtzip.zip_networks(case.networks, images, share=mtzip.Budget(parameters=same / total))


def one_after_another(case: Case, images: Images, seed: int) -> mtzip.ZippedNetwork:
    """The first two zipped with the library's own reconstructions, every other added with its own images alone."""
    names = list(case.networks)
    result = mtzip.zip_networks(
        {name: case.networks[name] for name in names[:2]},
        {name: images[name] for name in names[:2]},
        share=case.share,
        keep_moments=True,
    )
    for name in names[2:]:
        result = mtzip.add_network(result, name, case.networks[name], images[name], share=case.share)
    return result


def originals(case: Case, images: Images, seed: int) -> mtzip.ZippedNetwork:
    """The networks as they are."""
    return mtzip.zip_networks(case.networks, images, share=0)


def permuted(case: Case, images: Images, seed: int) -> mtzip.ZippedNetwork:
    """Permutation by correlation of activations, mean, BatchNorm re-estimated, heads refitted by least squares."""
    result = mtzip.zip_networks(case.networks, images, share=case.share, method="average", matching="activation")
    for task, network in case.networks.items():
        refit_head_(result[task], network, images[task])
    return result


def from_scratch(case: Case, images: Images, seed: int) -> mtzip.ZippedNetwork:
    """Untrained networks with one trunk in common, sharing as much as the zip; norms and heads are the tasks' own."""
    fresh = {}
    for task, network in case.networks.items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # the same trunk for all: a head is drawn last
            fresh[task] = copy.deepcopy(network)
            for module in fresh[task].modules():
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()
    few = {task: x[:200] for task, x in images.items()}
    return mtzip.zip_networks(fresh, few, share=case.share, method="average")


def pruned_apart(case: Case, images: Images, seed: int) -> mtzip.ZippedNetwork:
    """Each network pruned by magnitude, all together as large as their zip; nothing is shared."""
    few = {task: x[:200] for task, x in images.items()}
    size = mtzip.zip_networks(case.networks, few, share=case.share).parameter_count()
    return mtzip.zip_networks(pruned(case.networks, images, size), few, share=0)


@torch.no_grad()
def refit_head_(network: nn.Module, original: nn.Module, images: Tensor) -> None:
    """Fits the last linear layer of ``network`` by ridge regression to what ``original`` puts out on ``images``.

    Raises:
        ValueError: that layer shares weights with another task.
    """
    path = [path for path, module in original.named_modules() if isinstance(module, nn.Linear)][-1]
    head, read = network.get_submodule(path), []
    if type(head) is not nn.Linear:
        raise ValueError(f"{path} must be private to refit it for one task, got {type(head).__name__}; share less")
    handle = head.register_forward_pre_hook(lambda _, arguments: read.append(arguments[0].double()))
    with evaluating(network), evaluating(original):
        targets = torch.cat([original(x).double() for x in images.split(500)])
        for x in images.split(500):
            network(x)
    handle.remove()
    x = torch.cat(read)
    mean, middle = x.mean(0), targets.mean(0)
    moment = (x - mean).T @ (x - mean) / len(x)
    moment.diagonal().add_(1e-3 * moment.diagonal().mean() + 1e-12)
    weight = torch.linalg.solve(moment, (x - mean).T @ (targets - middle) / len(x)).T
    head.weight.copy_(weight)
    head.bias.copy_(middle - weight @ mean)


def _scratch_recipe(case: Case) -> dict[str, Any]:
    def optimizer(parameters):
        return torch.optim.SGD(parameters, lr=case.rate, momentum=0.9, weight_decay=5e-4, nesterov=True)

    def scheduler(optimizer):
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, case.rate, total_steps=case.steps + 1, pct_start=0.2)

    return {"optimizer": optimizer, "scheduler": scheduler, "batchnorm": "train", "lr": None, **OUTPUTS}


METHODS: dict[str, Method] = {
    "originals": Method(originals, before=True),
    "mtzip": Method(zipped()),
    "merged": Method(zipped(follow=False)),
    "average": Method(zipped(method="average")),
    "zeros counted": Method(zipped(keep_zeros="count")),
    "zeros lost": Method(zipped(keep_zeros=False)),
    "permuted": Method(permuted),
    "from scratch": Method(from_scratch, _scratch_recipe, before=False, labels=True),
    "pruned": Method(pruned_apart, lambda case: OUTPUTS),  # no layer is shared
    # Ablations: one idea changed at a time.
    "no refit": Method(zipped(method="mtz")),
    "no refit, pixel moments": Method(zipped(moment_of_pixels, method="mtz")),
    "Euclidean pairs": Method(zipped(euclidean_pairs)),
    "rows count alike": Method(zipped(equal_rows)),
    "greedy": Method(zipped(matching="greedy")),
    "by activations": Method(zipped(matching="activation")),
    "no affine": Method(zipped(affine=False)),
    "damping 1e-3": Method(zipped(damping=1e-3)),
    "damping 1e-1": Method(zipped(damping=1e-1)),
    "no substitution": Method(zipped(reconstructions=0)),
    "no distillation": Method(zipped(), lambda case: {"teachers": {}, **OUTPUTS}, labels=True),
    "features too": Method(zipped(), lambda case: {"distill": "both"}),
    "outputs only": Method(zipped(), lambda case: OUTPUTS),
}
#: A trunk merged of all tasks', whatever would be better.
MERGED = "merged"
#: For a part of the neurons only: everything shared leaves nothing to plan.
PLANNING = ("mtzip", "planned")
METHODS["planned"] = Method(planned)
CHAIN = "one after another"
METHODS[CHAIN] = Method(one_after_another)
ZEROS = ("zeros counted", "zeros lost")
#: Differ from the default in retraining alone.
RETRAINING = ("no distillation", "features too", "outputs only")
BASELINES = ("originals", "mtzip", "average", "permuted", "from scratch", "pruned")
ABLATIONS = tuple(name for name in METHODS if name not in (*BASELINES, *PLANNING, *ZEROS, MERGED, CHAIN))
#: For cases that zip without it.
METHODS["substitution"] = Method(zipped(reconstructions=1))
#: What is imitated, and the ablation that changes nothing where it is.
_IDLE = {"outputs": "outputs only", "both": "features too"}


def ablations_of(recipe: Mapping[str, Any]) -> tuple[str, ...]:
    """The ablations that differ from a recipe of retraining."""
    return tuple(name for name in ABLATIONS if name != _IDLE[recipe.get("distill", "outputs")])
