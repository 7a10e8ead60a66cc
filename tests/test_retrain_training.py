"""What training scripts do: accumulation, mixed precision, compiled steps, activation checkpointing, EMA, freezing.

Both in :func:`mtzip.retrain` and in loops that users write around the zipped network.
"""

from __future__ import annotations

import copy

import pytest
import torch
from handmade import Small, images, zipped_pair
from retraining import assert_same, inputs, labelled, weights_of
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from mtzip.network.zipped import ZippedNetwork
from mtzip.retraining.retrain import retrain


def batches(count: int) -> dict[str, list[torch.Tensor]]:
    return {task: list(x.split(count)) for task, x in inputs(24).items()}


def sgd(parameters):
    return torch.optim.SGD(parameters, 0.05)


def gradients(zipped: ZippedNetwork, data) -> dict[str, torch.Tensor]:
    """Of the summed cross entropy."""
    zipped.zero_grad()
    sum(F.cross_entropy(zipped[task](x).float(), y) for task, (x, y) in data.items()).backward()
    return {name: parameter.grad.clone() for name, parameter in zipped.named_parameters()}


# -- accumulation ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distill", ["outputs", "both"])
def test_accumulated_batches_equal_the_large_batch(distill):
    large, small = zipped_pair(dtype=torch.float64), zipped_pair(dtype=torch.float64)
    arguments = {"steps": 4, "optimizer": sgd, "distill": distill}
    for network, count, accumulate in ((large, 12, 1), (small, 4, 3)):
        data = {task: list(x.double().split(count)) for task, x in inputs(24).items()}
        network.orders = {task: {"norm": torch.arange(6), "hidden": torch.arange(5)} for task in network}
        history = retrain(network, data, accumulate=accumulate, **arguments)
        assert len(history) == 4
    for key, value in large.state_dict().items():
        torch.testing.assert_close(small.state_dict()[key], value, rtol=1e-10, atol=1e-12)


# -- precision -------------------------------------------------------------------------------------------------


def test_autocast_trains_float32_weights_near_the_full_precision():
    full, mixed = zipped_pair(), zipped_pair()
    a = retrain(full, inputs(), 60, lr=1e-2)
    b = retrain(mixed, inputs(), 60, lr=1e-2, autocast=torch.bfloat16)
    assert all(parameter.dtype == torch.float32 for parameter in mixed.parameters())
    assert any(not torch.equal(x, y) for x, y in zip(full.parameters(), mixed.parameters(), strict=True))
    assert b[-1].total == pytest.approx(a[-1].total, rel=0.3, abs=0.01)


def test_a_bfloat16_network_is_retrained_in_its_type():
    zipped = zipped_pair(dtype=torch.bfloat16)
    data = {task: x.bfloat16() for task, x in inputs().items()}
    history = retrain(zipped, data, 80, lr=1e-2)
    assert all(parameter.dtype == torch.bfloat16 for parameter in zipped.parameters())
    assert history[-1].total < 0.3 * history[0].total


def test_shared_leaves_stay_in_the_type_of_autocast():
    zipped = zipped_pair()
    types = []
    zipped["a"].hidden.register_forward_hook(lambda module, args, output: types.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        zipped["a"](images())
    assert types == [torch.bfloat16]


# -- torch.compile ---------------------------------------------------------------------------------------------


def test_a_compiled_training_step_has_no_graph_break_and_the_same_gradients():
    torch._dynamo.reset()
    zipped, data = zipped_pair(), labelled(16)
    expected = gradients(zipped, data)
    compiled = {task: torch.compile(zipped[task], fullgraph=True, backend="aot_eager") for task in zipped}
    zipped.zero_grad()
    sum(F.cross_entropy(compiled[task](x), y) for task, (x, y) in data.items()).backward()
    for name, parameter in zipped.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)


def test_all_tasks_compile_as_one_graph():
    torch._dynamo.reset()
    zipped, x = zipped_pair(), images()
    explained = torch._dynamo.explain(zipped)({"a": x, "b": x})
    assert explained.graph_break_count == 0
    compiled = torch.compile(zipped, fullgraph=True, backend="aot_eager")({"a": x, "b": x})
    for task, output in zipped({"a": x, "b": x}).items():
        torch.testing.assert_close(compiled[task], output)


# -- activation checkpointing ----------------------------------------------------------------------------------


class Checkpointed(Small):
    """Recomputes its trunk in the backward pass, dropout in it."""

    def trunk(self, x):
        x = F.dropout(torch.relu(self.norm(self.conv(x))), 0.5, self.training)
        return torch.relu(self.hidden(torch.flatten(x, 1)))

    def forward(self, x):
        return self.head(checkpoint(self.trunk, x, use_reentrant=False) if self.saves else self.trunk(x))


@pytest.mark.parametrize("training", [False, True])
def test_checkpointed_activations_give_the_same_gradients(training):
    data, found = labelled(16), []
    for saves in (False, True):
        zipped = zipped_pair()
        for task in zipped:
            zipped[task].__class__ = Checkpointed
            zipped[task].saves = saves
            zipped[task].norm.track_running_stats = training
        zipped.train(training)
        torch.manual_seed(0)
        found.append(gradients(zipped, data))
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient)


def test_checkpointed_activations_are_retrained():
    zipped, plain = zipped_pair(), zipped_pair()
    for task in zipped:
        zipped[task].__class__, zipped[task].saves = Checkpointed, True
    retrain(zipped, inputs(), 4)
    retrain(plain, inputs(), 4)
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(zipped.state_dict()[key], value, rtol=1e-5, atol=1e-6)


# -- copies ----------------------------------------------------------------------------------------------------


def test_ema_copies_keep_the_sharing_and_average_every_weight_once():
    zipped = zipped_pair()
    average = AveragedModel(zipped, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    assert average.module["a"].conv._parameters.keys() == zipped["a"].conv._parameters.keys()
    average.update_parameters(zipped)  # the first update copies
    expected = weights_of(zipped)

    def update(*_):
        average.update_parameters(zipped)
        for name, value in zipped.state_dict().items():
            expected[name] = (expected[name] + value) / 2 if value.is_floating_point() else value

    retrain(zipped, inputs(), 3, lr=1e-2, log=update)
    assert len(list(average.module.parameters())) == len(list(zipped.parameters()))
    shared = [average.module[task].hidden.weight_rows_0_1_columns_0_1 for task in "ab"]
    assert shared[0] is shared[1]
    for name, value in average.module.state_dict().items():
        torch.testing.assert_close(value, expected[name])
    outputs = average({"a": images(), "b": images()})
    assert torch.equal(outputs["a"], average.module["a"](images()))


def test_a_deep_copy_is_trained_apart():
    zipped = zipped_pair()
    twin, before = copy.deepcopy(zipped), weights_of(zipped)
    retrain(twin, inputs(), 3)
    assert_same(weights_of(zipped), before)
    retrain(zipped, inputs(), 3)
    assert_same(weights_of(zipped), weights_of(twin))


# -- freezing --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [None, "balanced"])
def test_frozen_layers_stay_frozen_through_decay_and_accumulation(weights):
    zipped = zipped_pair()
    zipped["a"].conv.requires_grad_(False)
    zipped["b"].head.requires_grad_(False)
    frozen = {name: p.clone() for name, p in zipped.named_parameters() if not p.requires_grad}
    decay = lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1)  # noqa: E731
    retrain(zipped, inputs(), 3, optimizer=decay, accumulate=2, weights=weights, autocast=torch.bfloat16)
    after = dict(zipped.named_parameters())
    assert len(frozen) > 3
    assert_same({name: after[name] for name in frozen}, frozen)
    assert not any(after[name].requires_grad for name in frozen)


def test_a_users_loop_trains_every_shared_weight_with_both_tasks():
    """The optimiser sees each weight once, and its gradient is the sum over the tasks."""
    zipped, data = zipped_pair(), labelled(16)
    both = gradients(zipped, data)
    alone = [gradients_of_one(zipped, task, data[task]) for task in zipped]
    for name, gradient in both.items():
        torch.testing.assert_close(gradient, sum(found[name] for found in alone), rtol=1e-4, atol=1e-6)
    assert sum(all(found[name].any() for found in alone) for name in both) >= 2
    held = torch.optim.SGD(zipped.parameters(), 0.1).param_groups[0]["params"]
    assert sum(parameter.numel() for parameter in held) == zipped.parameter_count()


def gradients_of_one(zipped, task, data):
    zipped.zero_grad()
    F.cross_entropy(zipped[task](data[0]), data[1]).backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in zipped.named_parameters()}


def test_gradient_clipping_and_other_modules_beside_it():
    zipped = zipped_pair()
    model = nn.ModuleDict({"zipped": zipped, "extra": nn.Linear(3, 2)})
    loss = model["extra"](model["zipped"]["a"](images())).square().sum()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    assert norm > 1e-3
    total = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    assert float(total) == pytest.approx(1e-3, rel=1e-3)
