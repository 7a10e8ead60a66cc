"""conv2d_second_moment: the layer-wise second moment of a convolution's input, without storing its patches."""

from __future__ import annotations

import torch

from mtz_ext import _checks, _native
from mtz_ext._library import register

_NAME = "conv2d_second_moment"
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

Pair = int | tuple[int, int]


def conv2d_second_moment(
    x: torch.Tensor,
    kernel_size: Pair,
    stride: Pair = 1,
    padding: Pair | str = 0,
    dilation: Pair = 1,
    groups: int = 1,
    check: bool = True,
) -> torch.Tensor:
    """Sum of p p^T over all patches p that a convolution sees.

    Parameters
    ----------
    x : [N, C, H, W]
        The convolution's input.
    kernel_size, stride, padding, dilation, groups
        As in torch.nn.functional.conv2d; padding may be "same" or "valid". Padding is with zeros.
    check : bool
        Raise if `x` has NaN or Inf. This waits for the device; with False nothing does (and a CUDA graph can capture
        the call), and such an input makes NaN of the whole result.

    Returns
    -------
    [groups, C / groups * ky * kx, C / groups * ky * kx]
        One symmetric matrix a group, rows and columns in the order of ``weight.flatten(1)``. A sum, not a mean:
        divide by N and the number of output positions for E[p p^T]. float32 for float16 and bfloat16.

    Notes
    -----
    Equivalent to ``u = F.unfold(x, ...); (u @ u.mT).sum(0)`` for one group. The block of kernel offsets u and v is a
    correlation of the image with itself at shift v - u, up to border rows and columns, so a 3x3 kernel of stride 1
    takes 13 products of C x C instead of 81, and no patches are stored; then the border strips are subtracted. Exact;
    in float32 right to 1e-6 of the largest element.

    Raises
    ------
    ValueError
        Shapes do not fit, the kernel is larger than the padded image, or, with `check`, `x` has NaN or Inf.
    TypeError
        Not a floating point tensor.
    """
    _checks.no_gradient(_NAME, x=x)
    _checks.tensor_of(_NAME, "x", x, _DTYPES, 4)
    kernel = _pair("kernel_size", kernel_size, 1)
    step = _pair("stride", stride, 1)
    spread = _pair("dilation", dilation, 1)
    before, after = _padding(padding, kernel, step, spread)
    return _op(x, kernel, step, before, after, spread, groups, check)


def _pair(name: str, value: Pair, least: int) -> list[int]:
    pair = [value, value] if isinstance(value, int) else list(value)
    if len(pair) != 2 or any(not isinstance(v, int) or v < least for v in pair):
        raise ValueError(f"{_NAME}: {name} must be an int >= {least} or two of them (y, x), got {value!r}")
    return pair


def _padding(
    padding: Pair | str, kernel: list[int], stride: list[int], dilation: list[int]
) -> tuple[list[int], list[int]]:
    """(top, left), (bottom, right)."""
    if not isinstance(padding, str):
        pair = _pair("padding", padding, 0)
        return pair, pair
    if padding == "valid":
        return [0, 0], [0, 0]
    if padding != "same":
        raise ValueError(f'{_NAME}: padding must be an int, two of them, "same" or "valid", got {padding!r}')
    if stride != [1, 1]:
        raise ValueError(f'{_NAME}: padding="same" needs stride 1, got {stride}')
    total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    return [t // 2 for t in total], [t - t // 2 for t in total]


def _output(
    x: torch.Tensor,
    kernel: list[int],
    stride: list[int],
    before: list[int],
    after: list[int],
    dilation: list[int],
    groups: int,
) -> list[int]:
    """Check everything; the number of output positions (y, x)."""
    _checks.tensor_of(_NAME, "x", x, _DTYPES, 4)
    if x.dim() != 4:
        raise ValueError(f"{_NAME}: x must have shape [N, C, H, W], got {_checks.shape(x)}")
    if groups < 1 or x.shape[1] % groups:
        raise ValueError(f"{_NAME}: groups must divide the {x.shape[1]} channels of x {_checks.shape(x)}, got {groups}")
    for name, pair, least in (
        ("kernel_size", kernel, 1),
        ("stride", stride, 1),
        ("dilation", dilation, 1),
        ("padding", before, 0),
        ("padding", after, 0),
    ):
        if len(pair) != 2 or min(pair) < least:
            raise ValueError(f"{_NAME}: {name} must be two numbers >= {least}, got {pair}")
    output = []
    for size, k, s, p, q, d in zip(x.shape[2:], kernel, stride, before, after, dilation, strict=True):
        if size + p + q < d * (k - 1) + 1:
            raise ValueError(
                f"{_NAME}: kernel_size {kernel} with dilation {dilation} must fit into the padded image, "
                f"got x {_checks.shape(x)} with padding {before}"
            )
        output.append((size + p + q - d * (k - 1) - 1) // s + 1)
    return output


def _size(x: torch.Tensor, kernel: list[int], groups: int) -> list[int]:
    side = x.shape[1] // groups * kernel[0] * kernel[1]
    return [groups, side, side]


def _result_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _implementation(
    x: torch.Tensor,
    kernel: list[int],
    stride: list[int],
    before: list[int],
    after: list[int],
    dilation: list[int],
    groups: int,
    check: bool = True,
) -> torch.Tensor:
    output = _output(x, kernel, stride, before, after, dilation, groups)
    out = torch.empty(_size(x, kernel, groups), dtype=_result_dtype(x), device=x.device)
    status = torch.empty(1, dtype=torch.int32, device=x.device)
    x = x.detach()
    if x.device.type == "cpu" and x.dtype in (torch.float16, torch.bfloat16):
        x = x.float()
    _native.call(
        _NAME,
        x,
        *(_native.scalar(x), _native.scalar(out), *x.shape, groups, *kernel, *stride, *dilation, *before, *output),
        *(x.data_ptr(), *x.stride(), out.data_ptr(), status.data_ptr()),
    )
    if not check:
        return out if x.device.type == "cuda" or not status.item() else out.fill_(torch.nan)
    if status.item():
        index = (~torch.isfinite(x)).nonzero()[0].tolist()
        raise ValueError(f"{_NAME}: x must be finite, got {float(x[tuple(index)])} at {index}")
    return out


def _fake(
    x: torch.Tensor,
    kernel: list[int],
    stride: list[int],
    before: list[int],
    after: list[int],
    dilation: list[int],
    groups: int,
    check: bool = True,
) -> torch.Tensor:
    _output(x, kernel, stride, before, after, dilation, groups)
    return x.new_empty(_size(x, kernel, groups), dtype=_result_dtype(x))


_op = register(
    f"{_NAME}(Tensor x, int[] kernel_size, int[] stride, int[] padding_before, int[] padding_after, int[] dilation, "
    "int groups, bool check=True) -> Tensor",
    _implementation,
    _fake,
)
