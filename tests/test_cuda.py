"""What only a GPU can show: streams, graphs, devices. The operators' own tests run on every device present."""

from __future__ import annotations

import pytest
import torch

import mtz_ext
from tests import cases

pytestmark = pytest.mark.skipif(
    not (mtz_ext.has_cuda and torch.cuda.is_available()), reason="needs a GPU and a build with CUDA"
)


def update(inverse, vectors):
    return mtz_ext.sherman_morrison_(inverse, vectors, check=False)


@pytest.mark.parametrize("d", [64, 500])
def test_updates_without_a_check_are_captured_in_a_graph(d):
    inverse, vectors = cases.damped_inverse(3, d=d).cuda(), cases.randn(3, 70, d, seed=1, device="cuda")
    expected = update(inverse.clone(), vectors)
    captured, stream = inverse.clone(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        update(captured.clone(), vectors)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        update(captured, vectors)
    for _ in range(2):
        captured.copy_(inverse)
        graph.replay()
        assert torch.equal(captured, expected)


def test_distances_are_captured_in_a_graph():
    a, b = cases.randn(40, 1200, device="cuda"), cases.randn(50, 1200, seed=1, device="cuda")
    expected = mtz_ext.neuron_distances(a, b)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = mtz_ext.neuron_distances(a, b)
    got.zero_()
    graph.replay()
    assert torch.equal(got, expected)


@pytest.mark.parametrize("channels", [8, 64], ids=["patches", "shifts"])
def test_moments_without_a_check_are_captured_in_a_graph(channels):
    x = cases.randn(3, channels, 9, 7, device="cuda")
    expected = mtz_ext.conv2d_second_moment(x, 3, padding=1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = mtz_ext.conv2d_second_moment(x, 3, padding=1, check=False)
    got.zero_()
    graph.replay()
    assert torch.equal(got, expected)
    x[2, 3, 8, 6] = torch.nan
    graph.replay()
    assert got.isnan().all()


def test_greedy_matching_without_a_check_is_captured_in_a_graph():
    """Its launch is cooperative, which graphs take as an attribute of the node."""
    distances = cases.randn(2, 300, 200, device="cuda")
    expected = mtz_ext.match_neurons(distances, 150, "greedy")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = mtz_ext.match_neurons(distances, 150, "greedy", check=False)
    got.zero_()
    graph.replay()
    assert torch.equal(got, expected)


def test_nothing_synchronises_without_a_check():
    a, x = cases.randn(40, 300, device="cuda"), cases.randn(3, 20, 300, device="cuda")
    inverse, images = cases.damped_inverse(3, d=300).cuda(), cases.randn(2, 64, 9, 9, device="cuda")
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        mtz_ext.neuron_distances(a, a)
        mtz_ext.neuron_distances(a, a, a.mT)
        update(inverse, x)
        update(inverse, x.half())
        mtz_ext.match_neurons(a, 7, "greedy", check=False)
        mtz_ext.conv2d_second_moment(images, 3, check=False)
    finally:
        torch.cuda.set_sync_debug_mode(before)


def test_kernels_run_on_the_current_stream():
    """The stream is kept busy, then writes the input: a kernel on another stream would see the old one."""
    a, b = cases.randn(64, 576, device="cuda"), cases.randn(64, 576, seed=1, device="cuda")
    expected, late = mtz_ext.neuron_distances(a, b), torch.zeros_like(a)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        late.copy_(a)
        got = mtz_ext.neuron_distances(late, b)
    stream.synchronize()
    assert torch.equal(got, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_of_another_device_than_the_current():
    a = cases.randn(19, 50, device="cuda:1")
    got = mtz_ext.neuron_distances(a, a)
    assert got.device == a.device and torch.cuda.current_device() == 0
    assert torch.equal(got.cpu(), mtz_ext.neuron_distances(a.to("cuda:0"), a.to("cuda:0")).cpu())
