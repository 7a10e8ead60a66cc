"""Retraining: that it learns, what it leaves as it was, and numbers that are none."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from handmade import images, small, zipped_pair, zipped_three
from retraining import assert_same, distance, inputs, labelled, weights_of
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from mtzip.retraining.optimizers import gentle
from mtzip.retraining.retrain import retrain
from mtzip.zip import zip_networks

# -- it learns ---------------------------------------------------------------------------------------------------------


def test_distils_from_the_originals_without_labels():
    zipped = zipped_pair()
    before = distance(zipped, inputs())
    history = retrain(zipped, inputs(), 150, lr=1e-2, batch_size=32)
    assert distance(zipped, inputs()) < 0.2 * before
    assert len(history) == 150
    assert history[-1].total < 0.2 * history[0].total


def test_learns_labels_without_teachers():
    zipped = zipped_pair()
    data = labelled()

    def error():
        return sum(float((zipped[t](x).argmax(1) != y).float().mean()) for t, (x, y) in data.items())

    before = error()
    retrain(zipped, data, 100, teachers={}, lr=2e-2)
    assert error() < 0.5 * before


def test_labels_and_teachers_are_added_up():
    zipped, data = zipped_pair(), labelled(16)
    history = retrain(zipped, data, 1, batch_size=16, weights={"b": 0.5})
    zipped = zipped_pair()
    for task, factor in (("a", 1.0), ("b", 0.5)):
        x, y = data[task]
        assert history[0].weights[task] == factor
        with torch.no_grad():
            out, wanted = zipped[task](x), zipped.originals[task](x)
            spread = (wanted - wanted.mean(0)).square().mean()
            expected = F.cross_entropy(out, y) + F.mse_loss(out, wanted) / spread
        assert history[0].losses[task] == pytest.approx(float(expected), rel=1e-5)
    assert history[0].total == history[0].losses["a"] + 0.5 * history[0].losses["b"]


def test_users_loss_gets_output_and_targets():
    seen = []

    def loss(output, targets):
        seen.append((output.shape, targets.shape))
        return (output.sum(1) - targets).square().mean()

    data = {task: (x, torch.ones(len(x))) for task, x in inputs(8).items()}
    retrain(zipped_pair(), data, 1, loss={"a": loss, "b": loss}, batch_size=8, teachers={})
    assert seen == [((8, 3), (8,)), ((8, 4), (8,))]


def test_one_step_is_one_step_of_the_summed_loss():
    zipped, reference, data = zipped_pair(), zipped_pair(), labelled(16)
    retrain(zipped, data, 1, teachers={}, optimizer=lambda p: torch.optim.SGD(p, lr=0.1), batch_size=16)
    reference.train()
    for network in reference.networks.values():
        network.norm.eval()
    sum(F.cross_entropy(reference[t](x), y) for t, (x, y) in data.items()).backward()
    torch.optim.SGD(reference.parameters(), lr=0.1).step()
    for key, value in reference.state_dict().items():
        torch.testing.assert_close(zipped.state_dict()[key], value, rtol=1e-5, atol=1e-6)


def test_three_tasks_with_teachers_of_the_user():
    zipped = zipped_three()
    teachers = {name: small(3 + i, i) for i, name in enumerate("abc")}
    data = {task: images(i, 32) for i, task in enumerate("abc")}
    history = retrain(zipped, data, 60, teachers=teachers, lr=1e-2)
    assert history.tasks == ("a", "b", "c")
    assert history[-1].total < 0.5 * history[0].total


# -- what it leaves as it was ------------------------------------------------------------------------------------------


def test_every_module_keeps_its_mode_and_gradients_are_gone():
    zipped = zipped_pair()
    zipped.train()
    zipped["a"].norm.eval()
    zipped["b"].eval()
    zipped.originals["a"].train()
    found = {module: module.training for module in (*zipped.modules(), *zipped.originals["a"].modules())}
    modes = []
    for arguments in ({}, {"dropout": True}, {"teachers": {}}):
        log = lambda *_: modes.append((zipped["b"].training, zipped["b"].norm.training))  # noqa: E731
        retrain(zipped, labelled(8), 1, log=log, **arguments)
    assert modes == [(False, False), (True, False), (True, False)]
    assert all(module.training == training for module, training in found.items())
    with pytest.raises(ZeroDivisionError):
        retrain(zipped, inputs(8), 1, log=lambda *_: 1 / 0)
    assert all(module.training == training for module, training in found.items())
    assert all(p.grad is None for p in zipped.parameters())


def test_teachers_never_change():
    zipped = zipped_pair()
    before = {task: copy.deepcopy(network.state_dict()) for task, network in zipped.originals.items()}
    retrain(zipped, inputs(8), 3, batchnorm="train")
    for task, network in zipped.originals.items():
        assert_same(network.state_dict(), before[task])


@pytest.mark.parametrize(("batchnorm", "moves"), [("frozen", False), ("train", True)])
def test_batchnorm_statistics(batchnorm, moves):
    zipped = zipped_pair()
    mean, gamma = zipped["a"].norm.running_mean.clone(), zipped["a"].norm.weight.detach().clone()
    retrain(zipped, inputs(16), 3, batchnorm=batchnorm)
    assert torch.equal(zipped["a"].norm.running_mean, mean) != moves
    assert not torch.equal(zipped["a"].norm.weight, gamma)


def test_frozen_parameters_stay():
    zipped = zipped_pair()
    zipped["a"].conv.requires_grad_(False)  # the shared filters too
    before = weights_of(zipped)
    retrain(zipped, inputs(16), 3)
    for key, value in zipped.state_dict().items():
        frozen = "norm.running" in key or "num_batches" in key or (".conv." in key and "networks.b" not in key)
        assert torch.equal(value, before[key]) == frozen, key
    zipped.requires_grad_(False)
    with pytest.raises(ValueError, match="requires_grad=True, got none"):
        retrain(zipped, inputs(), 1)


def test_a_task_with_nothing_to_train_rides_along():
    zipped = zipped_pair()
    zipped["a"].requires_grad_(False)
    assert len(retrain(zipped, inputs(8), 2)) == 2


def test_same_seed_same_weights_and_the_callers_generator_is_not_disturbed():
    runs = []
    for seed in (3, 3, 4):
        zipped = zipped_pair()
        zipped["a"].head = nn.Sequential(nn.Dropout(0.5), zipped["a"].head)
        loaders = {t: DataLoader(TensorDataset(x), 4, shuffle=True) for t, x in inputs().items()}
        torch.manual_seed(len(runs))
        state = torch.get_rng_state()
        retrain(zipped, loaders, 6, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        runs.append(weights_of(zipped))
    assert_same(runs[0], runs[1])
    assert any(not torch.equal(runs[0][key], runs[2][key]) for key in runs[0])
    torch.manual_seed(0)
    state = torch.get_rng_state()
    retrain(zipped_pair(), inputs(), 1, seed=None)
    assert not torch.equal(torch.get_rng_state(), state)


def test_works_where_the_caller_has_switched_gradients_off():
    zipped = zipped_pair()
    before = weights_of(zipped)
    with torch.no_grad():
        retrain(zipped, inputs(8), 1)
    assert any(not torch.equal(value, before[key]) for key, value in zipped.state_dict().items())


# -- numbers that are none ---------------------------------------------------------------------------------------------


def test_a_batch_with_nan_stops_with_step_and_task_and_good_weights():
    bad = [images(i, 8) for i in range(4)]
    bad[2][3, 0, 0, 0] = math.nan
    zipped, seen = zipped_pair(), []
    with pytest.raises(FloatingPointError, match=r"step 2, task 'b': the loss is nan; the batch holds NaN or Inf"):
        retrain(zipped, {"a": images(), "b": bad}, 4, log=lambda step, _: seen.append(step))
    assert seen == [1, 2]
    reference = zipped_pair()
    retrain(reference, {"a": images(), "b": bad}, 1, scheduler=lambda o: _like(o, 4))
    assert_same(weights_of(zipped), weights_of(reference))  # the last weights at which every loss was finite


def _like(optimizer, steps):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: gentle(step, steps))


def test_divergence_stops_with_good_weights():
    zipped = zipped_pair()
    with pytest.raises(FloatingPointError, match=r"task '[ab]': .* lower the learning rate"):
        retrain(zipped, inputs(), 20, optimizer=lambda p: torch.optim.SGD(p, lr=1e12))
    assert all(torch.isfinite(tensor).all() for tensor in zipped.state_dict().values())


def test_divergence_in_the_last_step_too():
    class Breaks(torch.optim.SGD):
        def step(self):
            self.param_groups[0]["params"][0].data.fill_(math.inf)

    zipped = zipped_pair()
    before = weights_of(zipped)
    with pytest.raises(FloatingPointError, match="step 0: the weights"):
        retrain(zipped, inputs(), 1, optimizer=lambda p: Breaks(p, lr=0.1))
    assert_same(weights_of(zipped), before)


def test_a_gradient_that_is_not_finite():
    def loss(output, _):
        return (output.sum() * 0).sqrt()  # 0 with a gradient of 0 * inf

    zipped = zipped_pair()
    before = weights_of(zipped)
    with pytest.raises(FloatingPointError, match="step 0, task 'a': a gradient is not finite"):
        retrain(zipped, labelled(8), 2, loss=loss, teachers={})
    assert_same(weights_of(zipped), before)


@pytest.mark.parametrize("when", ["log", "step"])
def test_interrupt_leaves_finite_weights_and_is_passed_on(when):
    class Interrupted(torch.optim.SGD):
        def step(self):
            self.param_groups[0]["params"][0].data.fill_(math.nan)
            raise KeyboardInterrupt

    def log(step, _):
        if step == 2:
            raise KeyboardInterrupt

    zipped = zipped_pair()
    before = weights_of(zipped)
    arguments = {"log": log} if when == "log" else {"optimizer": lambda p: Interrupted(p, lr=0.1)}
    with pytest.raises(KeyboardInterrupt):
        retrain(zipped, inputs(), 3, **arguments)
    after = weights_of(zipped)
    assert all(torch.isfinite(tensor).all() for tensor in after.values())
    assert any(not torch.equal(after[key], before[key]) for key in after) == (when == "log")


# -- after a real zip --------------------------------------------------------------------------------------------------


def test_a_zip_is_retrained():
    data = inputs(256)
    zipped = zip_networks({"a": small(3, 0), "b": small(4, 1)}, data)
    before = distance(zipped, data)
    history = retrain(zipped, data, 100)
    assert distance(zipped, data) < 0.9 * before
    assert history[-1].total < history[0].total
    assert not any(module.training for module in zipped.modules())
