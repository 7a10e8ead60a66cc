"""Weights that leaves keep between forward passes: reused, and never stale."""

from __future__ import annotations

import copy
import pickle
from contextlib import nullcontext

import pytest
import torch
from handmade import ALL, BOTH, CONV, images, share_layer, small, zipped_pair, zipped_three
from torch import nn
from torch.nn import functional as F

import mtzip
from mtzip.network import assembly, leaf
from mtzip.network.layout import Layout, Run
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


class OwnLinear(nn.Linear):
    """A layer class of the user's."""


@pytest.mark.parametrize("layer", [nn.Linear, OwnLinear])
def test_nothing_stale_is_used_after_retraining(layer):
    """The default optimiser is a fused one, whose steps no version counter shows: the mode is what tells."""
    data = {task: torch.randn(50, 6, generator=torch.Generator().manual_seed(seed)) for seed, task in enumerate("ab")}
    networks = {task: nn.Sequential(layer(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval() for task in data}
    zipped = mtzip.zip_networks(networks, data, 0.5)
    with torch.no_grad():
        before = zipped["a"](data["a"])
    mtzip.retrain(zipped, data, 3, lr=0.1, progress=False)
    with torch.no_grad():
        after = zipped["a"](data["a"])
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, zipped.extract("a")(data["a"]), rtol=1e-5, atol=1e-6)


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


def test_a_large_layer_shared_as_a_whole_keeps_nothing_of_its_size(monkeypatch):
    monkeypatch.setattr(leaf, "SMALL", 64)
    networks = {"a": nn.Sequential(nn.Linear(64, 64)), "b": nn.Sequential(nn.Linear(64, 64))}
    share_layer(networks, "0", [(BOTH, 64)], [(BOTH, 64)], scaled=True)
    zipped = ZippedNetwork(networks, None).eval()
    with torch.no_grad():
        zipped["a"](torch.randn(2, 64))
    held = [x for _, values in assembly._kept.values() for x in values["operands"] if x is not None]
    own = {p.data_ptr() for p in zipped.parameters()}
    assert {x.data_ptr() for x in held if x.numel() > 64} <= own


@pytest.fixture(name="halves")
def _halves() -> ZippedNetwork:
    """Linear layers of both tasks whose rows and columns lie in several runs, with private scales."""
    networks = {task: nn.Sequential(nn.Linear(12, 20)) for task in "ab"}
    rows = {task: [(BOTH, 5), ((own,), 7), (BOTH, 8)] for own, task in enumerate("ab")}
    columns = {task: [((own,), 3), (BOTH, 4), ((own,), 5)] for own, task in enumerate("ab")}
    shared: dict[str, nn.Parameter] = {}
    for own, task in enumerate("ab"):
        layout = Layout(
            own,
            tuple(Run(*run) for run in rows[task]),
            tuple(Run(*run) for run in columns[task]),
            (Run((own,), 20),),
            scaled=13,
        )
        sizes = {**layout.weight_blocks(), **layout.bias_blocks(), "scale": (13,)}
        blocks = {}
        for name, size in sizes.items():
            values = torch.randn(size, generator=torch.Generator().manual_seed(len(name) + own))
            parameter = nn.Parameter(values)
            tied = name != "scale" and layout.block_tasks()[name] == {0, 1}
            blocks[name] = shared.setdefault(name, parameter) if tied else parameter
        networks[task][0] = leaf.SharedLinear.wrap(networks[task][0], layout, blocks)
    return ZippedNetwork(networks, None).eval()


@pytest.mark.parametrize("shape", [(6, 12), (12,), (2, 3, 12), (0, 12)])
def test_a_large_linear_layer_is_applied_block_by_block(halves, monkeypatch, assemblies, shape):
    x = torch.randn(shape)
    expected = {task: F.linear(x, halves[task][0].weight, halves[task][0].bias).detach() for task in "ab"}
    assembled = len(assemblies)
    monkeypatch.setattr(leaf, "SMALL", 64)
    for around in (nullcontext, assembly.assembled_anew):
        for task in "ab":
            with torch.no_grad(), around():
                for _ in range(2):
                    torch.testing.assert_close(halves[task](x), expected[task])
    assert len(assemblies) == assembled
    assert all(v is None or v.numel() <= 20 for _, kept in assembly._kept.values() for v in kept["operands"])
    with torch.no_grad():
        halves["a"][0].scale.mul_(2.0)
        layer = halves["a"][0]
        torch.testing.assert_close(halves["a"](x), F.linear(x, layer.weight, layer.bias))
    halves["a"](x).sum().backward()
    assert all(p.grad is not None for p in halves["a"].parameters())


def test_block_by_block_under_autocast(halves, monkeypatch):
    monkeypatch.setattr(leaf, "SMALL", 64)
    x = torch.randn(6, 12)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        output = halves["a"](x)
    assert output.dtype == torch.bfloat16
    expected = F.linear(x, halves["a"][0].weight, halves["a"][0].bias)
    torch.testing.assert_close(output.float(), expected, rtol=0.02, atol=0.1)  # three roundings to 8 bits


def test_a_small_layer_with_a_scale_is_one_operator():
    networks = {task: nn.Sequential(nn.Linear(64, 64)) for task in "ab"}
    share_layer(networks, "0", [(BOTH, 64)], [(BOTH, 64)], scaled=True)
    zipped = ZippedNetwork(networks, None).eval()
    x = torch.randn(2, 64)
    with torch.no_grad():
        zipped["a"](x)
        with torch.profiler.profile() as profile:
            got = zipped["a"](x)
    called = {event.key for event in profile.key_averages()}
    assert "aten::addmm" in called and not called & {"aten::mul", "aten::mul_", "aten::add", "aten::add_"}
    torch.testing.assert_close(got, zipped["a"](x).detach())


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
