"""``zipped(x)``: what tasks compute alike is computed once, and the results are those of the tasks in turn."""

from __future__ import annotations

import copy
import pickle
from collections import Counter

import pytest
import torch
from nets import Functional, Residual, mlp, noise, seeded
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import mtzip
from mtzip.network.zipped import ZippedNetwork


class Counted(TorchDispatchMode):
    """Counts convolutions and products."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def counted(zipped: ZippedNetwork, x: torch.Tensor) -> tuple[dict[str, torch.Tensor], int]:
    """Outputs on ``x``, and how many products and convolutions they took; the graph is made before."""
    zipped(x)  # traces, and runs in turn to compare
    with Counted() as mode:
        outputs = zipped(x)
    return outputs, sum(mode.calls[name] for name in ("convolution", "addmm", "mm"))


@torch.no_grad()
def in_turn(zipped: ZippedNetwork, x: torch.Tensor) -> dict[str, torch.Tensor]:
    return {task: zipped[task](x) for task in zipped}


def assert_in_turn(zipped: ZippedNetwork, x: torch.Tensor, exactly: bool = True) -> None:
    """Twice: the first call with a batch size compares, the second runs the graph."""
    for _ in range(2):
        with torch.no_grad():
            outputs = zipped(x)
        for task, expected in in_turn(zipped, x).items():
            if exactly:
                assert torch.equal(outputs[task], expected)
            else:
                torch.testing.assert_close(outputs[task], expected, rtol=1e-6, atol=1e-6)


def zipped_mlp(tasks: str = "ab", share: float = 1.0, **options) -> ZippedNetwork:
    """Tasks of one trunk: two hidden layers, shared without private scales unless told otherwise."""
    networks = {task: seeded(lambda at=at: mlp(6, (8, 5), 3 + at), at) for at, task in enumerate(tasks)}
    inputs = {task: noise(64, 6, seed=at) for at, task in enumerate(tasks)}
    return mtzip.zip_networks(networks, inputs, share=share, **{"affine": False, **options})


@pytest.mark.parametrize("tasks", ["ab", "abc"])
def test_a_shared_trunk_runs_once(tasks):
    zipped = zipped_mlp(tasks)
    outputs, products = counted(zipped, noise(4, 6))
    assert products == 2 + len(tasks)
    for task, expected in in_turn(zipped, noise(4, 6)).items():
        assert torch.equal(outputs[task], expected)
    for batch in (1, 2, 9):
        assert_in_turn(zipped, noise(batch, 6, seed=batch))


def test_private_scales_leave_the_first_product_common():
    """Alone, a small layer has its scales folded into its weight: equal but for the order of two products."""
    assert counted(zipped_mlp(affine=True), noise(4, 6))[1] == 5
    assert_in_turn(zipped_mlp(affine=True), noise(4, 6), exactly=False)


def test_a_half_shared_trunk_has_nothing_in_common_and_runs_in_turn():
    zipped = zipped_mlp(share=0.5)
    assert counted(zipped, noise(4, 6))[1] == 6
    assert_in_turn(zipped, noise(4, 6))


@pytest.mark.parametrize(
    ("make", "products"), [(lambda: Functional(batchnorm=False), 5), (Functional, 7), (Residual, 12)]
)
def test_convolutions(make, products):
    """With a private BatchNorm behind the first convolution that one alone is common; in Residual it is too little."""
    networks = {task: seeded(make, at) for at, task in enumerate("ab")}
    inputs = {task: noise(64, 2, 8, 8, seed=at) for at, task in enumerate("ab")}
    zipped = mtzip.zip_networks(networks, inputs, affine=False)
    assert counted(zipped, noise(3, 2, 8, 8))[1] == products
    assert_in_turn(zipped, noise(5, 2, 8, 8, seed=4))


def test_gradients_training_and_compilation_go_task_by_task():
    zipped = zipped_mlp()
    x = noise(4, 6)
    with Counted() as mode:
        outputs = zipped(x)
    assert mode.calls["addmm"] == 6
    assert outputs["a"].requires_grad
    with torch.no_grad(), Counted() as mode:
        zipped.train()(x)
    assert mode.calls["addmm"] == 6


def change_block(zipped):
    with torch.no_grad():
        next(zipped.parameters()).add_(0.5)


def load_state(zipped):
    zipped.load_state_dict({key: 2 * value for key, value in zipped.state_dict().items()}, assign=True)


def new_memory(zipped):
    for p in zipped.parameters():
        p.data = p.data * 2


def another_head(zipped):
    zipped["b"][4] = nn.Linear(5, 4)


def another_layer(zipped):
    zipped["b"][1] = nn.Tanh()


def another_setting(zipped):
    for network in zipped.networks.values():
        network[1].negative_slope = 0.5


def a_hook(zipped):
    zipped["a"][0].register_forward_hook(lambda module, args, output: output + 1)


def a_parameter_of_its_own(zipped):
    layer = zipped["b"][2]
    name = next(name for name in layer._parameters if name.startswith("weight"))
    layer._parameters[name] = nn.Parameter(layer._parameters[name].detach() * 2)


CHANGES = [
    change_block,
    load_state,
    new_memory,
    another_head,
    another_layer,
    another_setting,
    a_hook,
    a_parameter_of_its_own,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_network_changed_after_it_was_traced(change):
    def make():
        return nn.Sequential(nn.Linear(6, 8), nn.LeakyReLU(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3))

    networks = {task: seeded(make, at) for at, task in enumerate("ab")}
    inputs = {task: noise(64, 6, seed=at) for at, task in enumerate("ab")}
    zipped, x = mtzip.zip_networks(networks, inputs, affine=False), noise(4, 6)
    before, products = counted(zipped, x)
    assert products == 4
    change(zipped)
    assert_in_turn(zipped, x)
    with torch.no_grad():
        after = zipped(x)
    assert any(not torch.equal(before[task], after[task]) for task in "ab")


def test_a_network_that_changes_at_every_call_is_not_traced_for_ever(monkeypatch):
    from mtzip.deploy import together

    class Counter_(nn.Module):
        def __init__(self):
            super().__init__()
            self.calls, self.first, self.head = 0, nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x):
            self.calls = self.calls + 1
            return self.head(torch.relu(self.first(x)))

    networks = {task: seeded(Counter_, at) for at, task in enumerate("ab")}
    zipped = mtzip.zip_networks(networks, {task: noise(32, 6) for task in "ab"}, affine=False)
    traced, real = [], together.exported
    monkeypatch.setattr(together, "exported", lambda *args: (traced.append(1), real(*args))[1])
    for at in range(30):
        zipped["a"].calls = at  # what a call in turn would do
        assert_in_turn(zipped, noise(4, 6, seed=at))
    assert len(traced) <= together.MOST


def test_inputs_that_are_no_plain_batch_go_task_by_task():
    zipped = zipped_mlp()
    with torch.no_grad():
        assert zipped(noise(6))["a"].shape == (3,)
        assert zipped(noise(0, 6))["a"].shape == (0, 3)
        with torch.autocast("cpu", torch.bfloat16):
            for task, output in zipped(noise(4, 6)).items():
                assert torch.equal(output, zipped[task](noise(4, 6)))
    with torch.inference_mode():
        outputs = zipped(noise(4, 6))
    for task, expected in in_turn(zipped, noise(4, 6)).items():
        assert torch.equal(outputs[task], expected)


def test_a_forward_that_fixes_the_batch_or_branches_on_values():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x):
            x = torch.relu(self.first(x))
            return self.head(x.flip(0) if x.shape[0] == 4 else x)

    networks = {task: seeded(Fixed, at) for at, task in enumerate("ab")}
    zipped = mtzip.zip_networks(networks, {task: noise(32, 6) for task in "ab"}, affine=False)
    for batch in (5, 4, 1, 4, 7):
        assert_in_turn(zipped, noise(batch, 6, seed=batch))


def test_copies_and_pickles_trace_for_themselves():
    zipped, x = zipped_mlp(), noise(4, 6)
    counted(zipped, x)
    for other in (copy.deepcopy(zipped), pickle.loads(pickle.dumps(zipped))):
        change_block(other)
        assert_in_turn(other, x)
    assert_in_turn(zipped, x)
