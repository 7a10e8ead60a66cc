"""The documentation: every code block of README and docs/ runs, tables are those of result files, the site builds."""

from __future__ import annotations

import csv
import importlib.util
import os
import re
import shlex
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from mtzip.cli import main

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md")) + [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
FENCE = re.compile(r"^```(\w*)[^\S\n]*(.*?)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

#: What pages take for granted: the user's modules, and what is in the working directory.
NETS = """
import torch
from torch import nn


class LeNet(nn.Module):
    def __init__(self, classes=10):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, padding=1)
        self.fc1 = nn.Linear(8 * 16, 64)
        self.head = nn.Linear(64, classes)

    def forward(self, x):
        x = torch.max_pool2d(torch.relu(self.conv1(x)), 2).flatten(1)
        return self.head(torch.relu(self.fc1(x)))


def clothes():
    return LeNet(4)
"""
PROJECT = """
import torch
from nets import LeNet, clothes


def trained_networks():
    torch.manual_seed(0)
    return {"digits": LeNet().eval(), "clothes": clothes().eval()}


def labelled_images():
    torch.manual_seed(1)
    return {"digits": (torch.rand(200, 1, 8, 8), torch.randint(0, 10, (200,))),
            "clothes": (torch.rand(200, 1, 8, 8), torch.randint(0, 4, (200,)))}
"""
PRELUDE = """
import numpy as np
import torch
from torch.utils.data import DataLoader, TensorDataset
import mtzip
from nets import LeNet
from project import labelled_images, trained_networks

net_a, net_b = trained_networks().values()
(images_a, labels_a), (images_b, labels_b) = labelled_images().values()
loader_a, loader_b = (DataLoader(TensorDataset(*data), 50) for data in labelled_images().values())
test_a, test_b = (images_a[:50], labels_a[:50]), (images_b[:50], labels_b[:50])
zipped = mtzip.zip_networks({"digits": net_a, "clothes": net_b}, {"digits": images_a, "clothes": images_b}).eval()

def error_of(zipped):
    return {"digits": (zipped["digits"](images_a).argmax(1) != labels_a).float().mean().item()}
"""
#: Read, not imported: some benchmarks import half of what there is.
BENCHMARKS = {
    name for path in (ROOT / "bench").glob("*.py") for name in re.findall(r'^NAME.*?"(\w+)"', path.read_text(), re.M)
}

#: Command lines of pages to what the example's networks need: there are ten digits, and four kinds of clothes here.
NAMES = {"clothes=nets:LeNet": "clothes=nets:clothes"}


@dataclass(frozen=True)
class Block:
    """A fenced block of a page: its language, the file it is to be (or ""), its text, the line it stands on."""

    language: str
    title: str
    text: str
    line: int


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        title = re.search(r'title="([^"]+)"', match[2])
        line = text.count("\n", 0, match.start()) + 2
        found.append(Block(match[1], title[1] if title else "", match[3], line))
    return found


def commands(text: str) -> list[list[str]]:
    """The commands of a shell block, continued lines joined and comments left out."""
    lines = text.replace("\\\n", " ").splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A user's working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets.py").write_text(NETS)
    (tmp_path / "project.py").write_text(PROJECT)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    for name in ("nets", "project"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield tmp_path
    for name in ("nets", "project"):
        sys.modules.pop(name, None)


def user(folder: Path) -> dict[str, object]:
    """The namespace of a page, and the files its commands read."""
    import numpy as np

    namespace: dict[str, object] = {"__name__": "page"}
    exec(PRELUDE, namespace)
    for task, network, images in (
        ("digits", namespace["net_a"], namespace["images_a"]),
        ("clothes", namespace["net_b"], namespace["images_b"]),
    ):
        torch.save(network.state_dict(), folder / f"{task}.pt")
        np.save(folder / f"{task}.npy", images.numpy())
    return namespace


def run_shell(words: list[str], folder: Path) -> None:
    """Runs what is quick; of the rest sees that what it names is there."""
    if words[0] == "mtzip":
        assert main([NAMES.get(word, word) for word in words[1:]]) == 0, shlex.join(words)
    elif words[0] == "torchrun":
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *words[1:]]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-3000:]
    elif words[:3] == ["python", "-m", "bench"]:
        names = [word for word in words[3:4] if not word.startswith("-")]
        assert not set(names) - BENCHMARKS, f"python -m bench has no {names}"
    elif words[:2] == ["python", "-m"] and words[2].startswith("bench."):
        path = ROOT / words[2].replace(".", "/")
        assert path.is_dir() or path.with_suffix(".py").is_file(), words
    elif words[0] == "python":
        assert (ROOT / words[1]).is_file(), f"there is no {words[1]}"
    elif words[0] == "make":
        target = words[1]
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), f"make has no {target}"
    elif words[:2] == ["pip", "install"]:
        extras = re.findall(r"[\w]+", words[2].partition("[")[2])
        known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert not set(extras) - set(known), f"pyproject.toml has no extra among {extras}"
    elif words[0] == ".ci/run":
        assert os.access(ROOT / words[0], os.X_OK)
    else:
        assert words[0] == "mkdocs", f"no test for the command {shlex.join(words)}"


def needs(page: Path) -> None:
    """Skips a page whose blocks need packages that are not installed."""
    text = "\n".join(block.text for block in blocks(page))
    wanted = {"onnxruntime": "export_onnx|onnxruntime", "lightning": "import lightning", "matplotlib": r"\.plot\("}
    for module, pattern in wanted.items():
        if re.search(pattern, text) and importlib.util.find_spec(module) is None:
            pytest.skip(f"{page.name} needs {module}: pip install '.[test,onnx,plot]'")


@pytest.mark.filterwarnings("ignore")  # of the libraries that pages show
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_of_a_page_runs(page, folder, capsys):
    needs(page)
    found = blocks(page)
    if not found:
        assert page.name == "design.md"
        return
    namespace: dict[str, object] | None = None
    with torch.random.fork_rng():
        for block in found:
            where = f"{page.name}:{block.line}"
            assert block.language in ("python", "sh", ""), f"{where}: {block.language} blocks are not run by this test"
            if namespace is None and (block.language == "python" or "mtzip " in block.text):
                namespace = user(folder)
            if block.language == "sh":
                for words in commands(block.text):
                    run_shell(words, folder)
            elif block.title:
                (folder / block.title).write_text(block.text)
            elif block.language == "python":
                # Line numbers of the page in the traceback.
                exec(compile("\n" * (block.line - 1) + block.text, str(page), "exec"), namespace)


def test_blocks_that_fail_are_seen(folder, tmp_path):
    """The runner itself: an assertion, an unknown file, target and benchmark are failures."""
    page = tmp_path / "page.md"
    page.write_text("```python\nx = 1\n```\ntext\n\n```sh\nmtzip show \\\n  nothing.safetensors  # comment\n```\n")
    assert [(b.language, b.line) for b in blocks(page)] == [("python", 2), ("sh", 7)]
    assert commands(blocks(page)[1].text) == [["mtzip", "show", "nothing.safetensors"]]
    for words in (
        ["mtzip", "show", "nothing.safetensors"],
        ["python", "-m", "bench", "nothing"],
        ["python", "python/examples/nothing.py"],
        ["make", "nothing"],
        ["pip", "install", ".[nothing]"],
        ["unheard-of"],
    ):
        with pytest.raises(AssertionError):
            run_shell(words, folder)


def hooks():
    """docs/hooks.py as a module."""
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs/hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("file", sorted((ROOT / "bench/results").rglob("*.csv")), ids=lambda file: file.stem)
def test_tables_show_every_row_of_the_result_files(file):
    name = file.relative_to(ROOT / "bench/results").with_suffix("").as_posix()
    module = hooks()
    with file.open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    if not any(columns <= rows[0].keys() for columns in module.DRAWN):
        assert not any(f"table: {name} " in page.read_text() for page in PAGES)
        return
    lines = module.table_of(name).splitlines()
    assert len(lines) == len(rows) + 2
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1  # as many cells in every line
    for row, line in zip(rows, lines[2:], strict=True):
        known = ("way", "architecture", "work", "method", "kernel", "networks")
        key = next(name for name in known if name in row)
        assert row[key] in line
        if "microseconds" in row:
            assert f"{float(row['microseconds']):,.0f}" in line


@pytest.mark.parametrize("marker", ["table: none/such", "files: none/such"])
def test_markers_that_lead_nowhere_stop_the_build(marker):
    with pytest.raises(ValueError, match="none/such"):
        hooks().on_page_markdown(f"<!-- {marker} -->")


def test_the_design_lists_every_file():
    page = hooks().on_page_markdown((ROOT / "docs/design.md").read_text())
    for folder in ("mtz_ext", "python/mtzip"):
        for path in (ROOT / folder).rglob("*.py"):
            assert f"`{path.name}`" in page, f"docs/design.md has no <!-- files: {path.parent.relative_to(ROOT)} -->"


@pytest.mark.skipif(
    importlib.util.find_spec("material") is None or importlib.util.find_spec("latex2mathml") is None,
    reason="needs MkDocs: pip install '.[docs]'",
)
def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    method = (tmp_path / "site/method/index.html").read_text()
    assert method.count("<math") > 50
    assert "arithmatex" not in re.sub(r'<div class="arithmatex"><math', "", method)  # no formula is left as it was
    for page in (tmp_path / "site").rglob("*.html"):
        for formula in re.findall(r"<math.*?</math>", page.read_text(), re.DOTALL):
            assert "\\" not in formula, f"{page.parent.name}: a command that is not known in {formula}"
    built = "\n".join(path.read_text() for path in (tmp_path / "site").rglob("*.html"))
    assert "<!-- table" not in built and "<!-- files" not in built
    assert not re.findall(
        r'(?:src|href)="https?://(?!squidfunk|www\.mkdocs)[^"]*\.(?:js|css)', built
    )  # nothing fetched
