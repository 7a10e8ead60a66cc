"""Zips in which a task takes another's trunk over, where that keeps its outputs better than merging does."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import nn

from .errors import unknown_task
from .network.zipped import ZippedNetwork
from .planning.budget import Budget
from .planning.follow import Followers
from .prepare import Prepared
from .reports.report import Report
from .trace.alike import is_head
from .trace.export import evaluation_copy
from .within import output_errors

#: Relative output error of a zip, mean of the tasks, from which it is looked whether one may follow another.
WORTH = 0.01

#: Makes a zip of prepared networks.
Zip = Callable[[Prepared, Mapping[str, nn.Module]], ZippedNetwork]


def check_follow(follow: bool | Mapping[str, str], networks: Mapping[str, nn.Module], method: str) -> None:
    """``follow`` of :func:`mtzip.zip_networks`.

    Raises:
        TypeError, ValueError: neither a bool nor a mapping of tasks that lead nowhere but to leaders; another method.
        KeyError: a task that there is none of.
    """
    if isinstance(follow, bool):
        return
    if not isinstance(follow, Mapping):
        raise TypeError(
            f"follow must be True, False or a mapping from task to the task it follows, got {type(follow).__name__}; "
            "write {'b': 'a'}"
        )
    for task in (*follow, *follow.values()):
        if task not in networks:
            raise unknown_task("follow", task, networks)
    for task, leader in follow.items():
        if leader in follow:
            raise ValueError(
                f"follow[{task!r}] must be a task that follows none, got {leader!r}, which follows {follow[leader]!r}; "
                "let both follow the same one"
            )
    if follow and method != "refit":
        raise ValueError(f"follow needs method='refit', whose least squares fit the heads, got method={method!r}")


def zip_following(
    zip_: Zip, prepared: Prepared, networks: Mapping[str, nn.Module], follow: bool | Mapping[str, str], share: object
) -> ZippedNetwork:
    """The zip in which tasks follow others as ``follow`` says; True for where that is better.

    Args:
        zip_: makes a zip.
        prepared, networks: what it makes it of.
        follow: task to the one it follows, or whether to look for such.
        share: of :func:`mtzip.zip_networks`.

    Raises:
        ValueError: a task that cannot follow the one it should; says why.
    """
    tasks = list(prepared.tasks)
    followers = Followers(prepared.analyses, prepared.chunks)
    if isinstance(follow, Mapping):
        chosen = {tasks.index(task): tasks.index(leader) for task, leader in follow.items()}
        for task, leader in chosen.items():
            try:
                followers.error(task, leader)
            except ValueError as error:
                raise ValueError(f"follow: {tasks[task]!r} cannot follow {tasks[leader]!r}: {error}") from None
        return _zip(zip_, prepared, networks, followers, chosen)
    start = time.perf_counter()
    merged = zip_(prepared, networks)
    if not follow or merged.parameter_count() >= merged.report.parameters_before:
        return merged
    before = time.perf_counter()
    result = _better(zip_, prepared, networks, followers, merged, share)
    # What the zip that is kept took itself is under "zip".
    spent = before if result is merged else start + result.report.seconds["zip"]
    result.report.seconds["follow"] = time.perf_counter() - spent
    return result


def _better(
    zip_: Zip,
    prepared: Prepared,
    networks: Mapping[str, nn.Module],
    followers: Followers,
    merged: ZippedNetwork,
    share: object,
) -> ZippedNetwork:
    """The merged zip, or one in which tasks follow others, whose outputs are nearer or which stores less."""
    count = len(prepared.tasks)
    exact = share.error if isinstance(share, Budget) else None
    if exact is None:
        allowed = _head_errors(merged.report, prepared)
        if sum(allowed.values()) <= WORTH * count:
            return merged
    else:
        allowed = dict.fromkeys(range(count), exact * count / 2)
    chosen = followers.best(allowed)
    if not chosen:
        return merged
    found = _zip(zip_, prepared, networks, followers, chosen)
    if exact is not None:
        return min(merged, found, key=ZippedNetwork.parameter_count)
    for result in (merged, found):
        result.report.output_error = output_errors(result, prepared)
    return min(merged, found, key=lambda result: sum(result.report.output_error.values()))


def _zip(
    zip_: Zip,
    prepared: Prepared,
    networks: Mapping[str, nn.Module],
    followers: Followers,
    chosen: Mapping[int, int],
) -> ZippedNetwork:
    """A zip of networks of which some have another's trunk."""
    tasks, analyses, networks = list(prepared.tasks), list(prepared.analyses), dict(networks)
    for task, leader in chosen.items():
        name = tasks[task]
        networks[name] = followers.network(task, leader, networks[name])
        analyses[task] = analyses[task].of(evaluation_copy(networks[name]))
    result = zip_(replace(prepared, analyses=analyses, sensitivities=[]), networks)
    result.report.follows = {tasks[task]: tasks[leader] for task, leader in chosen.items()}
    for task in result.report.follows:
        result.orders.pop(task, None)  # its neurons are not its original's
    return result


def _head_errors(report: Report, prepared: Prepared) -> dict[int, float]:
    """Task to the relative error of what its heads put out, mean of them; 0 for heads that were left as they are."""
    found = {}
    for task, (name, analysis) in enumerate(zip(prepared.tasks, prepared.analyses, strict=True)):
        heads = {layer.name for layer in analysis.layers.values() if is_head(analysis, layer)}
        errors = [
            layer.error[name]
            for layer in report.layers
            if set(layer.error) == {name} and layer.name.removesuffix(f" ({name})") in heads
        ]
        found[task] = sum(errors) / len(errors) if errors else 0.0
    return found
