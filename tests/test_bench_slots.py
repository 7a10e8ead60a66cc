"""What ``python -m bench slots`` measures, on networks of a few neurons."""

from __future__ import annotations

import pytest
import torch
from nets import mlp, noise, seeded

from bench.slots import measure, total_difference, write_csv
from bench.zip import Pair
from mtzip.demo.tasks import Task
from mtzip.reports.report import AxisReport, Report, SharedBy


def test_differences_are_relative_to_all_neurons():
    half = AxisReport("half", {"a": 4, "b": 4, "c": 2}, 2, 0.3, [SharedBy(("a", "b"), 1), SharedBy(("a", "b", "c"), 1)])
    unmeasured = AxisReport("none", {"a": 4, "b": 4}, 1, None, [SharedBy(("a", "b"), 1)])
    report = Report(("a", "b", "c"), "refit", [half, unmeasured])
    assert total_difference(report) == pytest.approx(0.3 * 5 / 10)


def test_both_ways_store_alike(tmp_path):
    images, labels = noise(1200, 6), torch.arange(1200) % 3
    tasks = {name: Task(name, images, labels, images[:100], labels[:100], 3) for name in "abc"}
    triple = Pair("small", {name: seeded(lambda: mlp(hidden=(8, 6)), at) for at, name in enumerate("abc")}, tasks)
    rows = list(measure(triple))
    assert [(row.share, row.slots) for row in rows] == [(s, way) for s in (0.5, 0.8, 0.9) for way in ("all", "some")]
    for common, some in zip(rows[::2], rows[1::2], strict=True):
        assert some.stored == pytest.approx(
            common.stored, abs=0.04
        )  # but for private scales, many beside so few weights
    assert sum(row.difference for row in rows[1::2]) < sum(row.difference for row in rows[::2])
    write_csv(rows, str(tmp_path / "slots.csv"))
    assert len((tmp_path / "slots.csv").read_text().splitlines()) == len(rows) + 1
