"""The arrow rule: csrc <- mtz_ext <- python/mtzip <- bench, tests."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ABOVE = {
    "mtz_ext": {"mtzip", "bench", "tests"},
    "python/mtzip": {"bench", "tests", "_mtz_ext"},
    "bench": {"_mtz_ext"},
}


def imported(file: Path) -> set[str]:
    """Top-level names that a Python file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module.partition(".")[0])
    return names


@pytest.mark.parametrize("folder", ABOVE)
def test_python_imports_point_down(folder):
    for file in (ROOT / folder).rglob("*.py"):
        wrong = imported(file) & ABOVE[folder]
        # cases shared with the tests are the benchmarks' inputs; they import nothing but torch
        assert not wrong, f"{file.relative_to(ROOT)} imports {', '.join(sorted(wrong))}"


def test_native_code_knows_neither_torch_nor_python():
    files = [f for suffix in ("h", "cuh", "cpp", "cu") for f in (ROOT / "csrc").rglob(f"*.{suffix}")]
    assert len(files) > 10
    for file in files:
        included = re.findall(r'#\s*include\s*[<"]([^>"]+)[>"]', file.read_text())
        for header in included:
            assert not re.match(r"(torch|ATen|c10|caffe2)/", header), f"{file.relative_to(ROOT)} includes {header}"
            if file.name != "binding.cpp":
                assert not re.match(r"(pybind11/|Python\.h)", header), f"{file.relative_to(ROOT)} includes {header}"


def test_every_operator_has_its_stem_in_every_folder():
    headers = {f.stem for f in (ROOT / "csrc/include/mtz").glob("*.h")} - {"common"}
    assert headers == {"neuron_distances", "sherman_morrison", "match_neurons", "conv2d_second_moment"}
    for stem in headers:
        assert list((ROOT / "csrc/cpu").rglob(f"{stem}.cpp")), f"csrc/cpu has no {stem}.cpp"
        assert (ROOT / f"csrc/cuda/{stem}.cu").exists(), f"csrc/cuda has no {stem}.cu"
        for folder, name in (("mtz_ext/ops", f"{stem}.py"), ("tests", f"test_{stem}.py"), ("bench", f"{stem}.py")):
            assert (ROOT / folder / name).exists(), f"{folder} has no {name}"


_STAGES = {"memory", "distributed", "trace", "network", "prepare", "merging", "planning"}
#: What each part of python/mtzip may use of the others. Read downwards: nobody uses what stands below it, but for
#: ``zipped(x)``, which imports deploy when called.
USES = {
    "errors": set(),
    "precision": set(),
    "inputs": {"errors"},
    "distributed": {"inputs"},
    "trace": {"errors", "inputs"},
    "network": {"errors", "inputs", "deploy"},
    "memory": {"errors", "inputs", "trace"},
    "reports": {"memory"},
    "prepare": {"inputs", "trace", "memory"},
    "merging": {"memory", "distributed", "inputs", "reports", "trace", "network"},
    "planning": {"memory", "distributed", "inputs", "trace", "network", "prepare", "merging"},
    "arguments": {"errors", "network", "planning"},
    "within": {"reports", *_STAGES},
    "follow": {"errors", "reports", "within", *_STAGES},
    "zip": {
        "follow",
        "arguments",
        "errors",
        "inputs",
        "memory",
        "trace",
        "distributed",
        "network",
        "prepare",
        "merging",
        "planning",
        "precision",
        "within",
    },
    "adding": {"arguments", "errors", "inputs", "precision", "reports", "within", "zip", *_STAGES},
    "tradeoff": {"network", "planning", "zip"},
    "saving": {"inputs", "reports", "network"},
    "retraining": {"precision", "errors", "inputs", "distributed", "trace", "network", "saving"},
    "deploy": {"errors", "inputs", "trace", "network"},
}
#: What users call: these may use everything.
FACES = {"__init__", "cli", "demo", "files", "show"}


def relative_imports(file: Path) -> set[str]:
    """First names of what a file of python/mtzip imports from the package, as files of its top folder."""
    found = set()
    depth = len(file.relative_to(ROOT / "python/mtzip").parts)
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == depth:
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found |= {name.partition(".")[0] for name in names}
    return found


@pytest.mark.parametrize("part", USES)
def test_a_part_uses_only_what_stands_above_it(part):
    path = ROOT / "python/mtzip" / part
    files = list(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
    assert files
    for file in files:
        wrong = relative_imports(file) - USES[part] - {part}
        assert not wrong, f"{file.relative_to(ROOT)} imports {', '.join(sorted(wrong))}"


def test_every_part_has_its_place():
    found = {
        path.stem
        for path in (ROOT / "python/mtzip").iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert found == set(USES) | FACES


def test_kernels_stay_plain_cpp():
    """Launches through cudaLaunchKernelEx, intrinsics in one header: so that the host can run the same files."""
    for file in (ROOT / "csrc/cuda").iterdir():
        text = re.sub(r"//.*", "", file.read_text())
        assert "<<<" not in text, f"{file.name} launches with <<<>>>"
        if file.name != "intrinsics.cuh":
            found = re.findall(r"\basm\b|__sync\w+|__shfl\w*|__shared__|\batomic[A-Z]\w*", text)
            assert not found, f"{file.name} uses {found}: they belong to intrinsics.cuh and its twin in tests/cuda_host"
