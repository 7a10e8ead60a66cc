"""Small convolutions as products: the same values and gradients as convolutions, and only where they are meant."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bench.convolutions import CpuConvolutions


def autocast(half: bool = True):
    return torch.autocast("cpu", torch.bfloat16, enabled=half)


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (4, 3)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("half", [True, False])
def test_values_and_gradients_are_those_of_the_convolution(size, bias, half):
    torch.manual_seed(0)
    layer = nn.Conv2d(5, 7, 3, padding=1, bias=bias)
    x = torch.randn(6, 5, *size, requires_grad=True)
    weight = torch.randn(6, 7, *size)

    def found(mode: bool) -> list[torch.Tensor]:
        inputs = [x, *layer.parameters()]
        if not mode:
            y = F.conv2d(x.double(), layer.weight.double(), layer.bias.double() if bias else None, padding=1)
            return [y, *torch.autograd.grad((y * weight).sum(), inputs)]
        with CpuConvolutions(), autocast(half):
            y = layer(x)
            assert "Product" in type(y.grad_fn).__name__
        return [y, *torch.autograd.grad((y * weight).sum(), inputs)]

    for ours, exact in zip(found(True), found(False), strict=True):
        assert (ours - exact).norm() <= (2**-7 if half else 1e-6) * exact.norm()  # rounding of bfloat16 or float32


@pytest.mark.parametrize(
    "layer, size",
    [
        (nn.Conv2d(4, 4, 3, padding=1), 5),  # many pixels
        (nn.Conv2d(4, 4, 3), 4),
        (nn.Conv2d(4, 4, 3, padding=1, stride=2), 4),
        (nn.Conv2d(4, 4, 3, padding=1, groups=2), 4),
        (nn.Conv2d(4, 4, 1), 4),
    ],
)
def test_other_convolutions_stay_what_they_are(layer, size):
    x = torch.randn(2, 4, size, size)
    with CpuConvolutions(), autocast():
        inside = layer(x)
    with autocast():
        outside = layer(x)
    assert "Product" not in type(inside.grad_fn).__name__
    torch.testing.assert_close(inside, outside, rtol=2**-7, atol=2**-7)


def test_float32_stays_float32():
    layer, x = nn.Conv2d(4, 4, 3, padding=1), torch.randn(2, 4, 2, 2)
    with CpuConvolutions():
        inside = layer(x)
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, layer(x))


@pytest.mark.parametrize(
    "call",
    [
        lambda x, w: F.conv2d(x, w, padding=1),
        lambda x, w: F.conv2d(x[0], w, None, 1, 1),
        lambda x, w: F.conv2d(input=x, weight=w, padding=1),
    ],
)
def test_other_ways_to_call_it(call):
    x, weight = torch.randn(2, 4, 2, 2), torch.randn(4, 4, 3, 3)
    with CpuConvolutions():
        inside = call(x, weight)
    torch.testing.assert_close(inside, call(x, weight))
