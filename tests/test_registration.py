"""The operators as torch sees them: schemas, fakes, torch.compile; and the native module as Python finds it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import mtz_ext
from mtz_ext import _native
from tests import cases

ROOT = Path(__file__).parent.parent


def samples(device: str):
    """(operator, public call, arguments of the operator)."""
    a, b, f = (cases.randn(*s, seed=i, device=device) for i, s in enumerate([(2, 5, 4), (2, 3, 4), (4, 6)]))
    inverse, vectors = cases.damped_inverse(2, d=5).to(device), cases.randn(2, 3, 5, seed=1, device=device)
    weight = torch.full((), 0.5, dtype=torch.float64, device=device)
    x = cases.randn(2, 4, 6, 5, device=device)
    pairs = ([3, 3], [1, 1], [1, 1], [1, 1], [1, 1], 2)
    return [
        (torch.ops.mtz.neuron_distances.default, (a, b, None)),
        (torch.ops.mtz.neuron_distances.default, (a, b, f)),
        (torch.ops.mtz.neuron_distances.default, (a.mT.contiguous().mT.double(), b.double())),
        (torch.ops.mtz.sherman_morrison_.default, (inverse, vectors, weight, True)),
        (torch.ops.mtz.sherman_morrison_.default, (inverse, vectors, weight, False)),
        (torch.ops.mtz.match_neurons.default, (a[0], 3, "greedy")),
        (torch.ops.mtz.match_neurons.default, (a, 2, "optimal")),
        (torch.ops.mtz.match_neurons.default, (a[0], 3, "greedy", False)),
        (torch.ops.mtz.conv2d_second_moment.default, (x, *pairs)),
        (torch.ops.mtz.conv2d_second_moment.default, (x, *pairs, False)),
    ]


@pytest.mark.parametrize("index", range(10))
def test_opcheck(index, device):
    op, arguments = samples(device)[index]
    torch.library.opcheck(op, arguments)


def everything(a, b, f, inverse, vectors, x):
    distances = mtz_ext.neuron_distances(a, b, f)
    inverse = mtz_ext.sherman_morrison_(inverse.clone(), vectors, 0.5)
    moment = mtz_ext.conv2d_second_moment(x, 3, padding=1)
    return mtz_ext.match_neurons(distances, 2, "greedy"), mtz_ext.match_neurons(distances), inverse, moment, distances


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_into_one_graph(dynamic, device):
    compiled = torch.compile(everything, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n in (5, 7):
        inputs = (
            cases.randn(2, n, 4, device=device),
            cases.randn(2, 3, 4, seed=1, device=device),
            cases.randn(4, 6, seed=2, device=device),
            cases.damped_inverse(2, d=n).to(device),
            cases.randn(2, 3, n, seed=3, device=device),
            cases.randn(2, 4, n, 5, device=device),
        )
        for got, expected in zip(compiled(*inputs), everything(*inputs), strict=True):
            assert torch.equal(got, expected)


def test_shapes_on_meta_tensors():
    """Nothing is computed: the fakes alone."""
    a = torch.empty(2, 5, 4, device="meta")
    assert mtz_ext.neuron_distances(a, a[:, :3]).shape == (2, 5, 3)
    assert mtz_ext.match_neurons(a).shape == (2, 4, 2)
    assert mtz_ext.conv2d_second_moment(torch.empty(2, 4, 6, 5, device="meta"), (3, 2), groups=2).shape == (2, 12, 12)
    assert mtz_ext.sherman_morrison_(torch.empty(3, 3, device="meta"), torch.empty(2, 3, device="meta")).shape == (3, 3)


@pytest.mark.skipif(mtz_ext.has_cuda, reason="this build has CUDA")
def test_a_build_without_cuda_says_so_at_the_call():
    tensor = SimpleNamespace(device=torch.device("cuda", 0))
    with pytest.raises(RuntimeError, match=r"built without CUDA; move them with \.cpu\(\), or .* reinstall"):
        _native.call("neuron_distances", tensor)


def test_other_devices_are_refused():
    with pytest.raises(ValueError, match=r"must be on a CPU or CUDA device, got meta"):
        _native.require_cuda("neuron_distances", torch.empty(1, device="meta"))


def python(code: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_native_module_is_found_from_anywhere(tmp_path):
    """Also in the repository root, where the source folder mtz_ext hides an installed one."""
    for folder in (ROOT, tmp_path):
        done = python(
            "import mtz_ext, torch; print(mtz_ext.neuron_distances(torch.ones(1, 2), torch.zeros(1, 2)).item())", folder
        )
        assert done.stdout.strip() == "1.0", done.stderr


THREADS = """
import torch, mtz_ext
from tests import cases
a, b, f = cases.randn(70, 900), cases.randn(50, 900, seed=1), cases.randn(900, 300, seed=2)
x = cases.randn(6, 40, 9, 9)
inverse, vectors = torch.eye(300).repeat(2, 1, 1), cases.randn(2, 30, 300)
results = []
for threads in (2, 1, 3):
    torch.set_num_threads(threads)
    results.append([
        mtz_ext.neuron_distances(a, b), mtz_ext.neuron_distances(a, b, f), mtz_ext.conv2d_second_moment(x, 3, 1, 1),
        mtz_ext.sherman_morrison_(inverse.clone(), vectors), mtz_ext.match_neurons(mtz_ext.neuron_distances(a, b), 40),
    ])
print(all(torch.equal(u, v) for other in results[1:] for u, v in zip(results[0], other)))
"""


def test_torch_set_num_threads_does_not_change_results():
    done = python(THREADS, ROOT)
    assert done.stdout.strip() == "True", done.stderr


def test_instruction_set_from_the_environment(tmp_path):
    for name in _native.native.isas():
        done = python("import mtz_ext._native as n; print(n.native.isa())", tmp_path, MTZ_ISA=name)
        assert done.stdout.strip() == name, done.stderr
    done = python("import mtz_ext", tmp_path, MTZ_ISA="sse9")
    assert "MTZ_ISA must be one of" in done.stderr and "got 'sse9'" in done.stderr


def test_native_module_needs_no_torch(tmp_path):
    done = python("import _mtz_ext, sys; print('torch' in sys.modules, _mtz_ext.isa() in _mtz_ext.isas())", tmp_path)
    assert done.stdout.split() == ["False", "True"], done.stderr
