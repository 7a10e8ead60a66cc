"""The example of int8: sizes, errors, and shared weights stored once in 8 bits."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch

onnx = pytest.importorskip("onnx")
for package in ("onnxscript", "onnxruntime", "sklearn"):
    pytest.importorskip(package)

SCRIPT = Path(__file__).parent.parent / "python/examples/quantize_onnx.py"


@pytest.mark.filterwarnings("ignore")
def test_zipped_and_quantised(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    monkeypatch.setattr(sys, "argv", [SCRIPT.name, "--output", str(tmp_path), "--epochs", "8"])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        zipped, rows = runpy.run_path(str(SCRIPT), run_name="example")["main"]()
    (_, before, originals), (_, full, zipped_errors), (_, small, quantised) = rows
    assert full < 0.65 * before
    assert small < 0.4 * before
    for task in zipped:
        assert abs(quantised[task] - zipped_errors[task]) < 2
        assert quantised[task] < originals[task] + 3
    weights = {item.name: item for item in onnx.load(tmp_path / "zipped-int8.onnx").graph.initializer}
    shared = [key for key in zipped.state_dict() if key.startswith("shared.") and "weight" in key]
    assert len(shared) == 3
    for key in shared:
        assert key not in weights
        assert weights[f"{key}_quantized"].data_type == onnx.TensorProto.INT8
        assert tuple(weights[f"{key}_quantized"].dims) == tuple(zipped.state_dict()[key].shape)
    assert "zipped, int8" in capsys.readouterr().out
