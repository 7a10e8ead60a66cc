"""Weights that leaves keep between forward passes: reused, and never stale."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from handmade import ALL, BOTH, CONV, images, share_layer, small, zipped_pair, zipped_three
from torch import nn
from torch.nn import functional as F

from mtzip.network import assembly
from mtzip.network.zipped import ZippedNetwork


@pytest.fixture(autouse=True)
def _fresh():
    assembly._kept.clear()


@torch.no_grad()
def outputs(zipped: ZippedNetwork) -> dict[str, torch.Tensor]:
    return zipped(dict.fromkeys(zipped, images()))


@torch.no_grad()
def anew(zipped: ZippedNetwork) -> dict[str, torch.Tensor]:
    """What dense copies of the networks give, which are put together from the blocks as they are now."""
    with assembly.assembled_anew():
        return {task: zipped.extract(task)(images()) for task in zipped}


def assert_current(zipped: ZippedNetwork) -> None:
    got, expected = outputs(zipped), anew(zipped)
    for task in zipped:
        torch.testing.assert_close(got[task], expected[task], rtol=1e-5, atol=1e-6)


@pytest.fixture(name="assemblies")
def _assemblies(monkeypatch) -> list[int]:
    """How many weights have been assembled."""
    from mtzip.network.leaf import SharedLayer

    calls, real = [], SharedLayer.unscaled_weight
    monkeypatch.setattr(SharedLayer, "unscaled_weight", lambda self: (calls.append(1), real(self))[1])
    return calls


@pytest.mark.parametrize("make", [zipped_pair, zipped_three])
def test_a_weight_is_assembled_once_until_a_block_changes(make, assemblies):
    zipped = make().eval()
    first = outputs(zipped)
    once = len(assemblies)
    assert once == 2 * len(zipped)
    second = outputs(zipped)
    assert len(assemblies) == once
    assert all(torch.equal(first[task], second[task]) for task in zipped)
    with torch.no_grad():
        next(iter(zipped["a"].hidden.parameters())).add_(1.0)
    outputs(zipped)
    assert len(assemblies) == once + len(zipped)  # the block is every task's


def change_in_place(zipped):
    with torch.no_grad():
        for p in zipped.parameters():
            p.mul_(1.5)


def step(zipped):
    optimizer = torch.optim.AdamW(zipped.parameters(), 0.1)
    sum(output.square().sum() for output in zipped(images()).values()).backward()
    optimizer.step()


def load_state(zipped, assign=False):
    state = {key: value * 1.5 if value.is_floating_point() else value for key, value in zipped.state_dict().items()}
    zipped.load_state_dict(state, assign=assign)


def new_memory(zipped):
    for p in zipped.parameters():
        p.data = p.data * 1.5


def through_data(zipped):
    for p in zipped.parameters():
        p.data.mul_(1.5)
    zipped.eval()


def average_of_copies(zipped):
    other = copy.deepcopy(zipped)
    change_in_place(other)
    averaged = torch.optim.swa_utils.AveragedModel(zipped, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    averaged.update_parameters(zipped)
    outputs(averaged.module.eval())
    averaged.update_parameters(other)
    assert_current(averaged.module)


CHANGES = {
    "in place": change_in_place,
    "an optimiser's step": step,
    "load_state_dict": load_state,
    "load_state_dict, assigned": lambda zipped: load_state(zipped, True),
    "new memory": new_memory,
    "through .data, then eval()": through_data,
    "another type": lambda zipped: zipped.double().float(),
    "an average of copies": average_of_copies,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_nothing_stale_is_used(change):
    zipped = zipped_pair().eval()
    before = outputs(zipped)
    change(zipped)
    assert_current(zipped)
    after = outputs(zipped)
    assert change in (average_of_copies, CHANGES["another type"]) or not torch.allclose(before["a"], after["a"])


def test_training_and_gradients_are_as_without(assemblies):
    zipped, plain = zipped_pair().eval(), zipped_pair().eval()
    outputs(zipped)
    with assembly.assembled_anew():
        sum(output.square().sum() for output in plain(images()).values()).backward()
    for _ in range(2):
        before = len(assemblies)
        zipped.zero_grad()
        sum(output.square().sum() for output in zipped(images()).values()).backward()
        assert len(assemblies) > before
    for p, other in zip(zipped.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, other.grad)
    zipped.train()
    before = len(assemblies)
    outputs(zipped)
    assert len(assemblies) > before


def test_copies_and_pickles_do_not_take_it_along():
    zipped = zipped_pair().eval()
    empty = len(pickle.dumps(zipped))
    outputs(zipped)
    assert len(pickle.dumps(zipped)) == empty
    other = copy.deepcopy(zipped)
    change_in_place(other)
    assert_current(other)
    assert_current(zipped)
    assert not any("kept" in key for key in zipped.state_dict())


def test_a_network_that_is_gone_keeps_nothing():
    zipped = zipped_pair().eval()
    outputs(zipped)
    assert len(assembly._kept) == 4
    del zipped
    import gc

    gc.collect()
    assert not assembly._kept


def test_a_layer_shared_as_a_whole_keeps_nothing_of_its_size():
    networks = {"a": nn.Sequential(nn.Linear(64, 64)), "b": nn.Sequential(nn.Linear(64, 64))}
    share_layer(networks, "0", [(BOTH, 64)], [(BOTH, 64)], scaled=True)
    zipped = ZippedNetwork(networks, None).eval()
    with torch.no_grad():
        zipped["a"](torch.randn(2, 64))
    held = [x for _, values in assembly._kept.values() for x in values["operands"] if x is not None]
    own = {p.data_ptr() for p in zipped.parameters()}
    assert {x.data_ptr() for x in held if x.numel() > 64} <= own


def test_inference_mode_transforms_and_autocast():
    zipped = zipped_pair().eval()
    expected = anew(zipped)
    with torch.inference_mode():
        zipped(images())
    for task, output in outputs(zipped).items():
        torch.testing.assert_close(output, expected[task])
    state = {name: torch.stack([p.detach(), 2 * p.detach()]) for name, p in zipped["a"].named_parameters()}
    with torch.no_grad():
        x, network = images(), zipped["a"]
        both = torch.func.vmap(lambda p: torch.func.functional_call(network, p, x))(state)
        torch.testing.assert_close(both[0], expected["a"])
        with torch.autocast("cpu", torch.bfloat16):
            assert zipped["a"].hidden(torch.randn(3, 24)).dtype == torch.bfloat16
    assert_current(zipped)


def test_the_scale_of_a_whole_layer_is_applied_to_its_output():
    networks = {"a": small(3, 0), "b": small(4, 1)}
    share_layer(networks, "conv", CONV, [(BOTH, 2)])
    share_layer(networks, "hidden", ALL, [(BOTH, 24)], bias="private", scaled=True)
    layer = networks["b"].hidden.eval()
    x = torch.randn(5, 24)
    expected = F.linear(x, layer.unscaled_weight(), None) * layer.full_scale() + layer.bias
    torch.testing.assert_close(layer(x), expected)
