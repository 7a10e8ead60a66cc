"""The example scripts run on real data, and zipping adds few lines to them."""

from __future__ import annotations

import ast
import gzip
import importlib.util
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

from mtzip.network.zipped import ZippedNetwork

FOLDER = Path(__file__).parent.parent / "python/examples"
#: Script to the packages it needs beside torch.
SCRIPTS = {
    "plain_pytorch": (),
    "pytorch_lightning": ("lightning",),
    "huggingface_trainer": ("transformers", "accelerate"),
    "huggingface_accelerate": ("accelerate",),
}
MARK = re.compile(r"\s+# zip$", re.MULTILINE)

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("sklearn") is None, reason="needs scikit-learn: pip install '.[demo]'"),
    pytest.mark.filterwarnings("ignore"),  # of the trainers
]


def needs(script: str) -> None:
    missing = [name for name in SCRIPTS[script] if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}: pip install '.[examples]'")


def run(path: Path, monkeypatch, output: Path, *options: str):
    """The models and errors that a script's main returns."""
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setattr(sys, "argv", [path.name, "--output", str(output), *options])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return runpy.run_path(str(path), run_name="example")["main"]()


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_zips_two_trained_networks(script, monkeypatch, tmp_path):
    needs(script)
    zipped, (before, after) = run(FOLDER / f"{script}.py", monkeypatch, tmp_path, "--epochs", "8")
    assert isinstance(zipped, ZippedNetwork)
    assert zipped.parameter_count() < 0.6 * zipped.report.parameters_before
    # 8 epochs leave 2 to 5 %, where guessing is 90 and 50 %; half of the parameters may cost 3 more.
    for task, error in before.items():
        assert error < 8
        assert after[task] < error + 3


@pytest.mark.parametrize("script", SCRIPTS)
def test_few_lines_are_added_and_without_them_it_is_a_script_of_its_own(script, monkeypatch, tmp_path):
    needs(script)
    text = (FOLDER / f"{script}.py").read_text()
    marked = [line for line in text.splitlines() if MARK.search(line)]
    assert 1 <= len(marked) <= 3
    for line in marked:  # each is a whole statement
        ast.parse(line.strip())
    rest = "\n".join(line for line in text.splitlines() if line not in marked)
    assert "mtzip" not in rest
    (tmp_path / f"{script}.py").write_text(rest)
    models, errors = run(tmp_path / f"{script}.py", monkeypatch, tmp_path, "--epochs", "1")
    assert not isinstance(models, ZippedNetwork)
    assert errors[0] == errors[1]


def test_every_script_is_listed():
    found = {path.stem for path in FOLDER.glob("*.py")} - {"tasks", "quantize_onnx"}
    assert found == set(SCRIPTS)


def write_idx(path: Path, values: torch.Tensor) -> None:
    """An idx file of bytes, as MNIST has them."""
    path.parent.mkdir(exist_ok=True)
    head = bytes([0, 0, 8, values.dim()]) + b"".join(size.to_bytes(4, "big") for size in values.shape)
    path.write_bytes(gzip.compress(head + values.to(torch.uint8).numpy().tobytes()))


def test_data_of_the_user(monkeypatch, tmp_path):
    generator = torch.Generator().manual_seed(0)
    for name in ("mnist", "fashion-mnist"):
        for part, count in (("train", 300), ("t10k", 100)):
            labels = torch.randint(0, 10, (count,), generator=generator)
            images = torch.randint(0, 60, (count, 28, 28), generator=generator)
            images[torch.arange(count), 2 * labels] = 250  # a bright row says the class
            write_idx(tmp_path / name / f"{part}-images-idx3-ubyte.gz", images)
            write_idx(tmp_path / name / f"{part}-labels-idx1-ubyte.gz", labels)
    zipped, errors = run(FOLDER / "plain_pytorch.py", monkeypatch, tmp_path, "--data", str(tmp_path), "--epochs", "12")
    assert zipped.tasks == ("mnist", "fashion")
    assert all(error[task] < 20 for error in errors for task in zipped)
