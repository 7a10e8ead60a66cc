"""The whole library on a GPU: what a zip on CUDA computes is what it computes on the CPU, and all of it stays there."""

from __future__ import annotations

import copy

import pytest
import torch
from nets import IMAGE, seeded
from zipping import KINDS, METHODS, errors, inputs, pair, some

import mtz_ext
import mtzip
from bench.zoo import ARCHITECTURES
from bench.zoo_copies import calibration, outputs, shuffled
from mtzip.inputs import as_batch

pytestmark = pytest.mark.skipif(
    not (mtz_ext.has_cuda and torch.cuda.is_available()), reason="needs a GPU and a build with CUDA"
)
CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def exact_products():
    """float32 products as exact as the CPU's, which results are compared with."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def on_gpu(networks: dict, data: dict) -> tuple[dict, dict]:
    """Copies of both there."""
    return {t: copy.deepcopy(net).to(CUDA) for t, net in networks.items()}, {t: x.to(CUDA) for t, x in data.items()}


def both(kind: str, **settings):
    """The zip of a pair on the CPU and on the GPU, with the GPU's networks and inputs."""
    make, shape = KINDS[kind]
    networks = pair(make)
    data = some(inputs(*shape), networks)
    there = on_gpu(networks, data)
    return mtzip.zip_networks(networks, data, **settings), mtzip.zip_networks(*there, **settings), *there


def assert_on_gpu(zipped) -> None:
    for name, tensor in zipped.state_dict().items():
        assert tensor.device == CUDA, name


def assert_same(cpu, gpu, data, bound: float = 2e-3) -> None:
    """Outputs agree; where two pairs cost nearly the same, rounding decides, so not every bit does."""
    for task in cpu:
        wanted, got = cpu[task](data[task].cpu()), gpu[task](data[task]).cpu()
        assert (got - wanted).square().mean().sqrt() <= bound * wanted.std(), task


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_a_zip_on_the_gpu_is_that_on_the_cpu(kind, method):
    cpu, gpu, _, data = both(kind, share=0.6, method=method, follow=False)
    assert_on_gpu(gpu)
    assert cpu.parameter_count() == gpu.parameter_count()
    assert_same(cpu, gpu, data)


@pytest.mark.parametrize(
    "settings",
    [
        {"matching": "greedy"},
        {"matching": "activation"},
        {"affine": False},
        {"reconstructions": 1},
        {"keep_zeros": True},
        {"keep_zeros": "count"},
        {"follow": True},
        {"follow": {"b": "a"}},
        {"share": 0},
        {"share": mtzip.Budget(parameters=0.8)},
        {"share": mtzip.Budget(error=0.05)},
        {"keep_moments": True},
        {"memory": "12MB"},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["mlp", "convolutions", "residual"])
def test_every_setting_works_on_the_gpu(kind, settings):
    cpu, gpu, networks, data = both(kind, **settings)
    assert_on_gpu(gpu)
    for task, error in errors(gpu, networks, data).items():
        assert error <= 1e-6 + 1.2 * errors(cpu, *(_cpu(networks), _cpu(data)))[task], task


def _cpu(values: dict) -> dict:
    return {task: copy.deepcopy(value).cpu() for task, value in values.items()}


@pytest.mark.parametrize("slots", ["all", "some"])
def test_three_networks_on_the_gpu(slots):
    make, shape = KINDS["convolutions"]
    networks = {task: seeded(make, seed) for seed, task in enumerate("abc")}
    there, data = on_gpu(networks, inputs(*shape))
    gpu = mtzip.zip_networks(there, data, share=0.7, slots=slots)
    assert_on_gpu(gpu)
    assert gpu.parameter_count() < sum(p.numel() for net in networks.values() for p in net.parameters())
    assert all(error < 1 for error in errors(gpu, there, data).values())


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)
def test_an_architecture_zips_with_a_shuffled_copy_on_the_gpu(architecture):
    batch = calibration(as_batch(architecture.example(True)))
    network = architecture.build(True)
    networks = {"a": network.to(CUDA), "b": shuffled(copy.deepcopy(network).cpu(), batch).to(CUDA)}
    batch = batch.to(CUDA)
    zipped = mtzip.zip_networks(networks, {task: [batch] for task in networks})
    assert_on_gpu(zipped)
    for task, net in networks.items():
        for got, wanted in zip(outputs(zipped[task], batch), outputs(net, batch), strict=True):
            assert (got - wanted).abs().max() <= 1e-3 * wanted.abs().max()


def batches(data: dict, labels: bool = True) -> dict:
    """Loaders on the CPU, as a DataLoader gives them."""
    return {
        task: [(x, torch.arange(len(x)) % 3) if labels else x for x in value.cpu().split(50)]
        for task, value in data.items()
    }


@pytest.mark.parametrize(
    "settings", [{}, {"distill": "both"}, {"batchnorm": "train"}, {"autocast": torch.bfloat16}], ids=str
)
@pytest.mark.parametrize("kind", ["mlp", "convolutions", "residual"])
def test_retraining_on_the_gpu_lowers_the_loss(kind, settings):
    _, gpu, _, data = both(kind, share=0.6)
    history = mtzip.retrain(gpu, batches(data, False), steps=12, seed=0, **settings)
    assert_on_gpu(gpu)
    totals = [row.total for row in history]
    assert sum(totals[-4:]) < sum(totals[:4]) * 1.05
    assert all(torch.isfinite(tensor.double()).all() for tensor in gpu.state_dict().values())


def test_retraining_with_labels_gives_the_same_twice():
    _, gpu, _, data = both("convolutions", share=0.6)
    other = copy.deepcopy(gpu)
    for zipped in (gpu, other):
        mtzip.retrain(zipped, batches(data), steps=5, seed=3)
    for name, tensor in gpu.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], tensor)


def test_saved_on_the_gpu_loads_on_either(tmp_path):
    _, gpu, networks, data = both("residual", share=0.6)
    mtzip.save(gpu, tmp_path / "z.safetensors")
    there = mtzip.load(tmp_path / "z.safetensors", {t: copy.deepcopy(net) for t, net in networks.items()})
    assert_on_gpu(there)
    here = mtzip.load(tmp_path / "z.safetensors", _cpu(networks))
    for task in gpu:
        assert torch.equal(there[task](data[task]), gpu[task](data[task]))
        assert here[task](data[task].cpu()).device.type == "cpu"


def test_moved_to_the_cpu_and_back_it_computes_the_same():
    _, gpu, _, data = both("convolutions", share=0.6)
    expected = {task: gpu[task](x) for task, x in data.items()}
    gpu.cpu()
    for task, x in data.items():
        assert gpu[task](x.cpu()).device.type == "cpu"
    gpu.to(CUDA)
    assert_on_gpu(gpu)
    for task, x in data.items():
        assert torch.equal(gpu[task](x), expected[task])


def test_extracted_exported_and_called_together(tmp_path):
    _, gpu, _, data = both("convolutions", share=0.6)
    for task, x in data.items():
        torch.testing.assert_close(gpu.extract(task)(x), gpu[task](x))
    for task, y in gpu(data).items():
        torch.testing.assert_close(y, gpu[task](data[task]))
    mtzip.export_onnx(gpu, tmp_path / "z.onnx")
    assert (tmp_path / "z.onnx").stat().st_size > 0


def test_a_network_is_added_on_the_gpu():
    make, shape = KINDS["convolutions"]
    networks = {task: seeded(make, seed) for seed, task in enumerate("abc")}
    there, data = on_gpu(networks, inputs(*shape))
    first = {task: there[task] for task in "ab"}
    zipped = mtzip.zip_networks(first, some(data, first), share=0.6, keep_moments=True)
    added = mtzip.add_network(zipped, "c", there["c"], data["c"])
    assert_on_gpu(added)
    assert set(added) == set("abc")
    assert errors(added, {"c": there["c"]}, data)["c"] < 1


def test_half_precision_networks_zip_on_the_gpu():
    make, shape = KINDS["convolutions"]
    there, data = on_gpu(pair(make), some(inputs(*shape), {"a": 0, "b": 0}))
    for dtype in (torch.float16, torch.bfloat16):
        low = {task: copy.deepcopy(net).to(dtype) for task, net in there.items()}
        zipped = mtzip.zip_networks(low, {task: x.to(dtype) for task, x in data.items()}, share=0.6)
        for task in zipped:
            assert zipped[task](data[task].to(dtype)).isfinite().all()


def test_image_inputs_of_the_cpu_are_moved():
    make, shape = KINDS["convolutions"]
    assert shape == IMAGE
    there, _ = on_gpu(pair(make), {})
    zipped = mtzip.zip_networks(there, some(inputs(*shape), there), share=0.6)
    assert_on_gpu(zipped)
