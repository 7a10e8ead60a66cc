"""Devices, instruction sets and comparisons for all tests."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bench.data import has_shared, shared_folder
from mtz_ext import has_cuda
from mtz_ext._native import native
from tests.cuda_host import host

DEVICES = ["cpu"] + (["cuda"] if has_cuda and torch.cuda.is_available() else [])


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Without the shared data and weights, tests marked ``shared`` are skipped; under CI=true they fail."""
    if item.get_closest_marker("shared") and not has_shared():
        reason = f"needs the data and weights of {shared_folder()}; set MTZ_SHARED to their folder"
        if os.environ.get("CI") == "true":
            pytest.fail(f"{reason} (skipped where CI is not true)", pytrace=False)
        pytest.skip(reason)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Every device present: the same test body on all of them."""
    return request.param


@pytest.fixture(params=native.isas())
def isa(request: pytest.FixtureRequest):
    """Every CPU instruction set this machine runs, in turn."""
    before = native.isa()
    native.use_isa(request.param)
    yield request.param
    native.use_isa(before)


@pytest.fixture(scope="session")
def driver() -> Path:
    """The program that runs the CUDA kernels on the host."""
    return host.build()


@pytest.fixture
def same_on_any_threads(monkeypatch: pytest.MonkeyPatch):
    """Checks that a function's result is the same, bit for bit, on 1, 2, 3 and 5 threads.

    By what mtz_ext reads, not by torch.set_num_threads: torch 2.13's LU factorisation gives wrong results in a process
    that has called that twice. test_registration calls it, in a process of its own.
    """

    def check(function: Callable[[], torch.Tensor]) -> None:
        results = []
        for threads in (1, 2, 3, 5):
            monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
            results.append((threads, function()))
        monkeypatch.undo()
        for threads, result in results[1:]:
            assert torch.equal(result, results[0][1]), f"{threads} threads give another result than one"

    return check


@pytest.fixture(scope="session")
def assert_within():
    """assert_within(got, expected, bound, scale=|expected|): |got - expected| <= bound * scale everywhere."""
    return _assert_within


def _assert_within(got: torch.Tensor, expected: torch.Tensor, bound: float, scale: torch.Tensor | None = None) -> None:
    assert got.shape == expected.shape, f"shape {list(got.shape)}, expected {list(expected.shape)}"
    got, expected = got.detach().cpu().double(), expected.detach().cpu().double()
    if not expected.numel():
        return
    scale = expected.abs() if scale is None else scale.cpu().double().expand_as(expected)
    error = (got - expected).abs()
    ratio = torch.where(error == 0, 0.0, error / scale)
    worst = int(torch.where(ratio.isnan(), torch.inf, ratio).argmax())
    index = [int(i) for i in torch.unravel_index(torch.tensor(worst), expected.shape)]
    assert ratio.flatten()[worst] <= bound, (
        f"at {index}: got {got.flatten()[worst]:.9g}, expected {expected.flatten()[worst]:.9g}, "
        f"error / scale {ratio.flatten()[worst]:.3g} > {bound:.3g}; "
        f"{int((ratio > bound).sum())} of {ratio.numel()} elements are off"
    )
