"""Moments of a layer's input and target against dense float64 unfolding, in both spaces."""

from __future__ import annotations

import pytest
import torch
from nets import noise
from torch import nn
from torch.nn import functional as F

from mtzip.memory import MOMENT_SAMPLES, samples_for
from mtzip.merging.moments import Moment, View, collect, cross_moment, enough

LAYERS = {
    "linear": (nn.Linear(7, 5), (7,)),
    "linear on sequences": (nn.Linear(7, 5), (4, 7)),
    "conv1d": (nn.Conv1d(3, 5, 4, stride=2, padding=1, dilation=2), (3, 13)),
    "conv1d same": (nn.Conv1d(3, 5, 4, padding="same"), (3, 9)),
    "conv2d": (nn.Conv2d(2, 5, 3, padding=1), (2, 6, 5)),
    "conv2d strided": (nn.Conv2d(2, 5, (3, 2), stride=(2, 3), padding=(1, 0), dilation=(2, 1)), (2, 9, 8)),
    "conv2d same": (nn.Conv2d(2, 5, (4, 3), padding="same", dilation=(1, 2)), (2, 7, 6)),
    "conv2d valid": (nn.Conv2d(2, 5, 3, padding="valid"), (2, 6, 5)),
    "conv2d beyond the last stride": (nn.Conv2d(2, 5, 2, stride=3), (2, 7, 9)),
    "conv3d": (nn.Conv3d(2, 3, (2, 3, 2), stride=(1, 2, 1), padding=(0, 1, 1)), (2, 4, 5, 4)),
    "conv3d same": (nn.Conv3d(2, 3, 2, padding="same"), (2, 3, 4, 3)),
}


def view_of(layer: nn.Module) -> View:
    if isinstance(layer, nn.Linear):
        return View("linear")
    space = layer.weight.dim() - 2
    total = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    settings = {"stride": layer.stride, "dilation": layer.dilation, "padding": layer.padding}
    if isinstance(layer.padding, str):
        total = total if layer.padding == "same" else [0] * space
        settings |= {"padding": tuple(t // 2 for t in total), "total_padding": total}
    return View(f"conv{space}d", layer.kernel_size, settings)


def unfolded(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Positions x columns in float64, from the layer's own forward with one-hot weights."""
    x = x.double()
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, x.shape[-1])
    columns = layer.weight[0].numel()
    one_hot = torch.eye(columns, dtype=torch.float64).view(columns, *layer.weight.shape[1:])
    function = getattr(F, f"conv{layer.weight.dim() - 2}d")
    out = function(x, one_hot, None, layer.stride, layer.padding, layer.dilation)
    return out.movedim(1, -1).reshape(-1, columns)


def rows_of(layer: nn.Module, z: torch.Tensor) -> torch.Tensor:
    return (
        z.double().reshape(-1, z.shape[-1])
        if isinstance(layer, nn.Linear)
        else z.double().movedim(1, -1).flatten(0, -2)
    )


def chunks(shape, count: int, dtype=torch.float32) -> list[torch.Tensor]:
    x = noise(count, *shape, dtype=torch.float64) + 0.7
    return [part.to(dtype) for part in x.split([count // 3, count - count // 3])]


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_moments_of_every_kind_of_layer(name, dtype, assert_within):
    layer, shape = LAYERS[name]
    layer = layer.to(dtype)
    inputs = chunks(shape, 40, dtype)
    with torch.no_grad():
        targets = [layer(x) for x in inputs]
    view = view_of(layer)
    moment, target = collect(view, inputs, targets)
    x, z = (torch.cat(parts) for parts in ([unfolded(layer, x) for x in inputs], [rows_of(layer, z) for z in targets]))
    assert moment.count == len(x) == sum(view.positions(x) for x in inputs)
    assert x.shape[1] == view.columns(inputs[0])
    assert moment.samples is None
    centred, target_centred = x - x.mean(0), z - z.mean(0)
    bound = 2e-6 if dtype == torch.float32 else 1e-12
    covariance = centred.T @ centred / len(x)
    assert_within(moment.mean, x.mean(0), bound, torch.ones(()))
    assert_within(moment.covariance, covariance, bound, torch.ones(()))
    assert_within(target.mean, z.mean(0), bound, torch.ones(()))
    assert_within(target.variance, target_centred.square().mean(0), bound, torch.ones(()))
    assert_within(target.cross, centred.T @ target_centred / len(x), bound, torch.ones(()))
    for part, expected in zip(inputs, targets, strict=True):
        got = view.unfold(part) @ layer.weight.flatten(1).T + layer.bias
        torch.testing.assert_close(got.double(), rows_of(layer, expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in LAYERS if name not in ("linear on sequences", "conv2d same")])
def test_few_positions_are_kept_as_samples(name, assert_within):
    """The same numbers from the sample matrix; nothing columns x columns."""
    layer, shape = LAYERS[name]
    layer = layer.double()
    space = layer.weight.dim() - 2
    if space > 0:  # one or a few positions an image
        shape = (shape[0], *[d * (k - 1) + 1 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)])
        if layer.padding != "same" and layer.padding != "valid":
            shape = (shape[0], *[max(size - 2 * p, 1) for size, p in zip(shape[1:], layer.padding, strict=True)])
    x = noise(2 if space else 5, *shape, dtype=torch.float64) + 0.3
    if "same" in name:
        x = x[:1]
    with torch.no_grad():
        z = layer(x)
    moment, target = collect(
        view_of(layer), [x[:1], x[1:]] if len(x) > 1 else [x], z.split([1, len(x) - 1] if len(x) > 1 else 1)
    )
    dense, rows = unfolded(layer, x), rows_of(layer, z)
    assert len(dense) < dense.shape[1]
    assert moment.covariance is None
    assert moment.samples.shape == dense.shape
    centred = dense - dense.mean(0)
    one = torch.ones(())
    assert_within(moment.samples.T @ moment.samples, centred.T @ centred / len(dense), 1e-12, one)
    every = torch.arange(rows.shape[1])
    assert_within(cross_moment(moment, target, every), centred.T @ (rows - rows.mean(0)) / len(dense), 1e-12, one)
    assert_within(target.variance, rows.var(0, correction=0), 1e-12, one)


def both_spaces(n: int = 6, d: int = 9) -> tuple[Moment, Moment, torch.Tensor]:
    x = noise(n, d, dtype=torch.float64) + 1
    centred = (x - x.mean(0)) / n**0.5
    return Moment(n, x.mean(0), samples=centred), Moment(n, x.mean(0), covariance=centred.T @ centred), x


def test_both_spaces_answer_alike(assert_within):
    samples, features, x = both_spaces()
    rows = noise(4, 9, seed=1, dtype=torch.float64)
    for moment in (samples, features):
        assert_within(moment.times(rows), features.covariance @ rows.T, 1e-12, torch.ones(()))
        assert_within(moment.variance(rows), (x @ rows.T).var(0, correction=0), 1e-12)
        assert_within(moment.diagonal(), x.var(0, correction=0), 1e-12)
        columns = torch.tensor([5, 0, 7])
        chosen = moment.select(columns)
        assert_within(chosen.variance(rows[:, :3]), (x[:, columns] @ rows[:, :3].T).var(0, correction=0), 1e-12)
        assert_within(chosen.mean, x[:, columns].mean(0), 1e-12)


@pytest.mark.parametrize("bias", [False, True])
def test_raw_is_the_second_moment_about_zero(bias, assert_within):
    samples, features, x = both_spaces()
    x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1) if bias else x
    expected = x.T @ x / len(x)
    assert_within(features.raw(bias).covariance, expected, 1e-12, torch.ones(()))
    raw = samples.raw(bias)
    assert_within(raw.samples.T @ raw.samples, expected, 1e-12, torch.ones(()))
    assert not raw.mean.any()


def test_scaled_target(assert_within):
    layer = nn.Linear(4, 3).double()
    x = noise(50, 4, dtype=torch.float64)
    z = layer(x).detach()
    scale, shift = torch.tensor([2.0, -0.5, 0.0]).double(), torch.tensor([1.0, 0.0, 3.0]).double()
    _, target = collect(View("linear"), [x], [z])
    _, expected = collect(View("linear"), [x], [z * scale + shift])
    got = target.scaled(scale, shift)
    for name in ("mean", "variance", "cross"):
        assert_within(getattr(got, name), getattr(expected, name), 1e-12, torch.ones(()))


def test_digits_survive_beside_large_means(assert_within):
    """float32 inputs around 10,000: the covariance is that of what float32 can hold."""
    x = noise(300, 5) + torch.tensor([0, 10, 100, 1e3, 1e4])
    layer = nn.Linear(5, 4)
    z = layer(x).detach()
    moment, target = collect(View("linear"), [x[:100], x[100:]], [z[:100], z[100:]])
    xd, zd = x.double() - x.double().mean(0), z.double() - z.double().mean(0)
    assert_within(moment.covariance, xd.T @ xd / 300, 1e-5, torch.ones(()))
    assert_within(target.cross, xd.T @ zd / 300, 1e-3, torch.ones(()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_accumulated_in_float32(dtype, assert_within):
    x = (noise(3000, 5) + 2).to(dtype)
    moment, _ = collect(View("linear"), [x])
    expected = x.double() - x.double().mean(0)
    assert_within(moment.covariance, expected.T @ expected / len(x), 1e-5, torch.ones(()))


def test_a_constant_column_has_no_variance():
    x = noise(64, 3)
    x[:, 1] = -0.4
    moment, _ = collect(View("linear"), [x])
    assert moment.diagonal()[1] == pytest.approx(0, abs=1e-12)
    assert moment.raw(False).diagonal()[1] == pytest.approx(0.16, rel=1e-5)


def test_enough_samples():
    view = View("conv2d", (3, 3), {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1)})
    inputs = [torch.zeros(8, 4, 6, 6)] * 5  # 16 positions an image, 36 columns
    assert enough(view, inputs, 1, 2) == [3]
    assert enough(view, inputs, 0, 10) == [8, 2]
    assert enough(view, inputs, 1000, 1) == [8] * 5


def test_fewer_samples_are_enough_where_positions_are_many():
    """Images of 32 x 32 as ever; at 224 x 224 the first layers of VGG-16 take 64, the last all that columns ask for."""
    of = {(27, 32): 256, (576, 32): 256, (4608, 2): 73_728, (576, 90): 256, (576, 224): 64, (1152, 112): 167}
    of |= {(2304, 56): 256, (4608, 28): 377, (4608, 14): 1505}
    assert {(columns, side): samples_for(columns, side**2, *MOMENT_SAMPLES) for columns, side in of} == of


def test_enough_takes_as_many_as_that():
    view = View("conv2d", (3, 3), {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1)})
    inputs = [torch.zeros(1, device="meta").expand(50, 64, 224, 224)] * 6
    assert enough(view, inputs, *MOMENT_SAMPLES) == [50, 14]
