"""The way into the native module: pointers, element types, threads or stream, workspace."""

from __future__ import annotations

import os

import torch  # first: the native module then shares torch's OpenMP threads instead of starting its own

try:
    import _mtz_ext as native
except ImportError as error:
    raise ImportError(
        "the native module _mtz_ext was not found or does not load; "
        f"build it with `pip install .` in the repository root ({error})"
    ) from error

_SCALARS = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}

if os.environ.get("MTZ_ISA") and os.environ["MTZ_ISA"] not in native.isas():
    raise ImportError(f"MTZ_ISA must be one of {', '.join(native.isas())} on this CPU, got {os.environ['MTZ_ISA']!r}")


def scalar(tensor: torch.Tensor) -> int:
    """The element type's number in mtz::Scalar."""
    return _SCALARS[tensor.dtype]


def call(name: str, tensor: torch.Tensor, *arguments: int) -> None:
    """Run native operator `name` where `tensor` lies, on the current stream or with torch's number of threads."""
    device = tensor.device
    if device.type == "cpu":
        _run(name, device, 0, torch.get_num_threads(), arguments)
    else:
        require_cuda(name, tensor)
        with torch.cuda.device(device):
            _run(name, device, 1, torch.cuda.current_stream(device).cuda_stream, arguments)


def _run(name: str, device: torch.device, backend: int, execution: int, arguments: tuple[int, ...]) -> None:
    size = getattr(native, name + "_workspace")(backend, execution, *arguments)
    workspace = torch.empty(size, dtype=torch.uint8, device=device) if size else None
    getattr(native, name)(backend, execution, workspace.data_ptr() if size else 0, *arguments)


def require_cuda(name: str, tensor: torch.Tensor) -> None:
    """Raise unless this build has CUDA kernels."""
    if tensor.device.type != "cuda":
        raise ValueError(f"{name}: tensors must be on a CPU or CUDA device, got {tensor.device}; move them with .cpu()")
    if not native.has_cuda:
        raise RuntimeError(
            f"{name}: tensors are on {tensor.device}, but mtz_ext was built without CUDA; "
            "move them with .cpu(), or put nvcc on PATH and reinstall (pip install . with CMAKE_ARGS=-DMTZ_CUDA=ON)"
        )
