"""Programs of zipped networks: torch.export, torch.compile without a graph break, AOTInductor."""

from __future__ import annotations

import shutil

import pytest
import torch
from handmade import images, zipped_pair, zipped_three
from nets import mlp, noise, seeded

import mtzip


@pytest.mark.parametrize("make", [zipped_pair, zipped_three])
def test_torch_export_takes_the_network_and_what_is_extracted(make, tmp_path):
    zipped = make().eval()
    free = torch.export.Dim.DYNAMIC
    sizes = ({task: {0: free} for task in zipped},)
    program = torch.export.export(zipped, ({task: images(count=2) for task in zipped},), dynamic_shapes=sizes)
    inputs = {task: images(at, 3 + at) for at, task in enumerate(zipped)}
    got = program.module()(inputs)
    for task, x in inputs.items():
        assert torch.equal(got[task], zipped[task](x))
        alone = torch.export.export(zipped.extract(task), (images(count=2),), dynamic_shapes=({0: free},))
        torch.testing.assert_close(alone.module()(x), zipped[task](x))
    torch.export.save(program, tmp_path / "z.pt2")
    assert torch.equal(torch.export.load(tmp_path / "z.pt2").module()(inputs)["a"], got["a"])


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_torch_compile_meets_no_graph_break(mode):
    """``fullgraph=True`` raises at the first one; gradients arrive at the blocks."""
    zipped, plain = zipped_three(), zipped_three()
    getattr(zipped, mode)(), getattr(plain, mode)()
    inputs = {task: images(at, 4) for at, task in enumerate(zipped)}
    compiled = torch.compile(zipped, fullgraph=True, backend="aot_eager")
    for given in (inputs, images(3, 4)):
        got, expected = compiled(given), plain(given)
        for task in zipped:
            torch.testing.assert_close(got[task], expected[task])
    sum(output.square().sum() for output in got.values()).backward()
    sum(output.square().sum() for output in expected.values()).backward()
    for (name, p), other in zip(zipped.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, other.grad, msg=name)


@pytest.mark.skipif(shutil.which("c++") is None, reason="AOTInductor needs a C++ compiler")
def test_aotinductor_stores_shared_weights_once(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    networks = {task: seeded(lambda: mlp(1000, (1024,)), at) for at, task in enumerate("ab")}
    inputs = {task: noise(8, 1000, seed=at) for at, task in enumerate("ab")}
    zipped = mtzip.zip_networks(networks, inputs)
    free = torch.export.Dim.DYNAMIC
    example = {task: x[:2] for task, x in inputs.items()}
    program = torch.export.export(zipped, (example,), dynamic_shapes=({task: {0: free} for task in "ab"},))
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "z.pt2"))
    size = 4 * zipped.parameter_count()
    assert size < (tmp_path / "z.pt2").stat().st_size < 1.7 * size  # twice as much and its code otherwise
    runner = torch._inductor.aoti_load_package(package)
    x = {task: noise(5 + at, 1000, seed=7) for at, task in enumerate("ab")}
    for task, got in runner(x).items():
        torch.testing.assert_close(got, zipped[task](x[task]).detach(), rtol=1e-5, atol=1e-5)
