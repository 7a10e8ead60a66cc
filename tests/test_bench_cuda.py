"""The benchmarks' way on a GPU, on a machine without one: tensors stay on the CPU, events are a clock."""

from __future__ import annotations

import argparse
import time

import pytest
import torch
from torch.overrides import TorchFunctionMode

from bench import conv2d_second_moment, match_neurons, neuron_distances, sherman_morrison, timer


class OnCpu(TorchFunctionMode):
    """What is asked of a CUDA device is done on the CPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):

        def there(value: object) -> bool:
            return isinstance(value, str) and value.startswith("cuda")

        args = tuple("cpu" if there(value) else value for value in args)
        kwargs = {name: "cpu" if there(value) else value for name, value in (kwargs or {}).items()}
        return function(*args, **kwargs)


class Clock:
    def __init__(self, enable_timing: bool):
        assert enable_timing

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Clock) -> float:
        return max(end.at - self.at, 1e-9) * 1e3


@pytest.fixture
def options(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Clock)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a clock")
    monkeypatch.setattr(timer, "MOST_RUNS", 1)
    monkeypatch.setattr(timer, "FLUSHED", 1 << 10)
    monkeypatch.setattr(timer, "ceiling", lambda device: timer.Ceiling(10.0, 100.0))
    return argparse.Namespace(device="cuda", quick=True, csv=None)


def test_every_row_that_is_asked_of_a_gpu_is_there(options, monkeypatch):
    for name in ("SHAPES", "LARGER"):
        small = [(batch[:0], d // 16, k // 16, *asked) for batch, d, k, *asked in getattr(sherman_morrison, name)]
        monkeypatch.setattr(sherman_morrison, name, small)
    options.quick = False
    monkeypatch.setattr(neuron_distances, "SHAPES", [(40, 30)])
    monkeypatch.setattr(conv2d_second_moment, "SHAPES", [(2, 4, 6, 3, 1, 1)])
    with OnCpu():
        distances, updates = neuron_distances.run(options), sherman_morrison.run(options)
        moments = conv2d_second_moment.run(options)
    asked = {(row.case, row.way): row for row in (*distances, *updates, *moments) if row.target}
    shares = [row for (_, way), row in asked.items() if way == "mtz_ext"]
    assert [row.target for row in shares] == ["share must 60 %, aim 85 %", *["share must 70 %, aim 90 %"] * 3]
    exact, *large = shares
    assert exact.share == pytest.approx(exact.gflops / 50), (
        "half of a product's rate is all that exact differences allow"
    )
    assert all(row.share == pytest.approx(row.gflops / 100) for row in large), "of a product, not of bandwidth"
    ratios = {row.target for (_, way), row in asked.items() if way in ("Woodbury", "cdist, exact", "unfold + product")}
    assert ratios == {"ratio must 10, aim 30", "ratio must 5, aim 20", "ratio must 3, aim 6"}


def test_greedy_matching_alone_is_timed(options):
    with OnCpu():
        rows = match_neurons.run(options)
    assert {row.case for row in rows} == {"greedy, 512 x 512 uniform", "greedy, 512 x 512 neurons"}
