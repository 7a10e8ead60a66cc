"""SOAP: Adam where there is no basis, the same in any coordinates, fewer steps than Adam, and a state that lasts."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from handmade import zipped_pair
from hypothesis import given, settings
from hypothesis import strategies as st
from retraining import Killed, assert_same, distance, inputs, weights_of

from mtzip.retraining.retrain import retrain
from mtzip.retraining.soap import Soap


def descended(weight: torch.Tensor, gradient_of, steps: int, make) -> torch.Tensor:
    """``weight`` after so many steps of an optimiser along the given gradients."""
    weight = weight.clone().requires_grad_()
    optimizer = make([weight])
    for step in range(steps):
        weight.grad = gradient_of(weight.detach(), step)
        optimizer.step()
    return weight.detach()


@pytest.mark.parametrize("shape", [(7,), (3, 5), (4, 2, 3, 3)])
def test_without_a_basis_it_is_adam_after_the_looks(shape):
    torch.manual_seed(0)
    start, gradients = torch.randn(shape, dtype=torch.float64), torch.randn(12, *shape, dtype=torch.float64)
    ours = descended(start, lambda _, step: gradients[step], 12, lambda p: Soap(p, 0.1, eps=0, look=4, most=0))
    adam = torch.optim.Adam
    theirs = descended(start, lambda _, step: gradients[step + 4], 8, lambda p: adam(p, 0.1, betas=(0.9, 0.99), eps=0))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_looks_move_nothing():
    torch.manual_seed(0)
    start = torch.randn(3, 5)
    assert torch.equal(descended(start, lambda w, _: torch.randn(3, 5), 6, lambda p: Soap(p, look=6)), start)
    assert not torch.equal(descended(start, lambda w, _: torch.randn(3, 5), 7, lambda p: Soap(p, look=6)), start)


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 6), columns=st.integers(1, 6), seed=st.integers(0, 1000))
def test_coordinates_do_not_matter(rows, columns, seed):
    """W -> U W V^T with orthogonal U, V takes every gradient and every step along."""
    torch.manual_seed(seed)
    left, right = (torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0] for n in (rows, columns))
    start = torch.randn(rows, columns, dtype=torch.float64)
    target, data = torch.randn(20, rows, columns, dtype=torch.float64), torch.randn(20, 6, columns, dtype=torch.float64)

    def gradient(weight, step):
        return (weight - target[step]) @ data[step].T @ data[step]

    def turned(weight, step):
        return left @ gradient(left.T @ weight @ right, step) @ right.T

    make = partial(Soap, lr=0.05, look=10)
    ours = descended(start, gradient, 20, make)
    there = descended(left @ start @ right.T, turned, 20, make)
    torch.testing.assert_close(left @ ours @ right.T, there, rtol=1e-6, atol=1e-6)


def test_a_wide_convolution_has_bases_of_channels_and_of_pixels():
    """Turned along rows, channels and pixels, each by itself, every step turns along; the columns are too many."""
    torch.manual_seed(0)
    turns = [torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0] for n in (4, 5, 6)]
    start, target = torch.randn(4, 5, 2, 3, dtype=torch.float64), torch.randn(20, 4, 5, 2, 3, dtype=torch.float64)

    def along(weight, turns):
        return torch.einsum("ra,cb,pd,abd->rcp", *turns, weight.flatten(2)).reshape(weight.shape)

    def gradient(weight, step):
        return weight - target[step]

    def turned(weight, step):
        return along(gradient(along(weight, [turn.T for turn in turns]), step), turns)

    make = partial(Soap, lr=0.05, look=10, most=29)
    ours = descended(start, gradient, 20, make)
    torch.testing.assert_close(
        along(ours, turns), descended(along(start, turns), turned, 20, make), rtol=1e-6, atol=1e-6
    )
    whole = descended(start, gradient, 20, partial(Soap, lr=0.05, look=10))  # 30 columns
    assert (ours - whole).abs().max() > 1e-3


def test_gradients_that_are_zero_leave_the_weight_as_it_is():
    start = torch.randn(3, 5)
    assert torch.equal(descended(start, lambda w, _: torch.zeros(3, 5), 5, lambda p: Soap(p, look=2)), start)


def test_it_comes_further_than_adam_in_as_many_steps():
    """Least squares on inputs whose directions differ by a hundred and lie across all coordinates."""
    torch.manual_seed(0)
    turn = torch.linalg.qr(torch.randn(30, 30))[0]
    data = torch.randn(4000, 30) * torch.logspace(0, -2, 30) @ turn
    target = torch.randn(8, 30)

    def gradient(weight, step):
        x = data[40 * step : 40 * step + 40]
        return (weight - target) @ x.T @ x / 40

    def left(make) -> float:
        return float(((descended(torch.zeros(8, 30), gradient, 100, make) - target) @ data.T).square().mean())

    adam = min(left(lambda p, lr=lr: torch.optim.Adam(p, lr)) for lr in (0.01, 0.03, 0.1))
    assert min(left(lambda p, lr=lr: Soap(p, lr, look=10)) for lr in (0.01, 0.03, 0.1)) < 0.5 * adam


def test_retrain_takes_it_by_name():
    zipped, data = zipped_pair(), inputs()
    before = distance(zipped, data)
    history = retrain(zipped, data, 30, optimizer="soap", lr=3e-3)
    assert [step.lr for step in history][:2] == [0, 0] and max(step.lr for step in history) == 3e-3
    assert distance(zipped, data) < 0.9 * before
    assert len(retrain(zipped, data, 1, optimizer="soap")) == 1
    with pytest.raises(ValueError, match="must be 'soap', an optimizer or a function"):
        retrain(zipped, data, 1, optimizer="sopa")


@pytest.mark.parametrize("kill", [2, 6])
def test_a_killed_run_goes_on_from_its_looks_and_its_basis(tmp_path, kill):
    call = {"steps": 40, "optimizer": "soap"}
    alone, killed = zipped_pair(), zipped_pair()
    retrain(alone, inputs(), **call)

    def log(step, _):
        if step == kill:
            raise Killed

    with pytest.raises(Killed):
        retrain(copy.deepcopy(killed), inputs(), checkpoint=tmp_path / "c", checkpoint_every=1, log=log, **call)
    retrain(killed, inputs(), checkpoint=tmp_path / "c", **call)
    assert_same(weights_of(killed), weights_of(alone))


def test_half_precision_keeps_its_state_through_a_file():
    torch.manual_seed(0)
    start, gradients = torch.randn(6, 5).bfloat16(), torch.randn(9, 6, 5).bfloat16()
    through = start.clone().requires_grad_()
    first, second = (Soap([through], 0.1, look=3) for _ in range(2))
    for step, gradient in enumerate(gradients):
        through.grad = gradient
        if step == 5:
            second.load_state_dict(copy.deepcopy(first.state_dict()))
        (first if step < 5 else second).step()
    straight = descended(start, lambda _, step: gradients[step], 9, lambda p: Soap(p, 0.1, look=3))
    assert torch.equal(through.detach(), straight)


@pytest.mark.parametrize("wrong", [{"look": 0}, {"look": 1.5}, {"lr": -1.0}, {"lr": float("nan")}])
def test_settings_are_checked(wrong):
    with pytest.raises(ValueError, match="must be a"):
        Soap([torch.zeros(2, requires_grad=True)], **wrong)
