"""An ONNX model to a file that is there whole or not at all, and its outputs against torch's."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch

from ..errors import ZipError
from .calls import Calls
from .onnx_model import input_names, output_names

LARGEST = 2**31 - 2**24  # bytes of weights in one file: protobuf stops at 2**31, and the graph needs a few
_CLOSE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def write(model: ir.Model, path: str | os.PathLike, check: Callable[[Path], None] | None = None) -> None:
    """Writes ``model`` beside ``path`` and renames it; weights of more than ``LARGEST`` bytes go to ``<path>.data``.

    Args:
        model: its values of weights are read while it is written.
        path: the file; what was there is replaced.
        check: looks at the file before it gets its name.

    Raises:
        OSError: the file cannot be written.
    """
    path = Path(path)
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        part, data = folder / path.name, folder / f"{path.name}.data"
        ir.save(model, part, external_data=data.name if size > LARGEST else None)
        if check is not None:
            check(part)
        for file in (data, part):  # the graph last: while it is the old one the old weights are there
            if file.exists():
                with open(file, "rb+") as written:
                    os.fsync(written.fileno())
                os.replace(file, path.parent / file.name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def compare(path: Path, calls: Calls, same_input: bool) -> None:
    """Runs the file with onnxruntime on the examples; nothing without onnxruntime, or where it lacks an operator.

    Raises:
        ZipError: its outputs are not the network's.
    """
    try:
        import onnxruntime as ort
    except ImportError:
        return
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # its copies of weights
    try:
        session = ort.InferenceSession(path, options, ["CPUExecutionProvider"])
    except ort.capi.onnxruntime_pybind11_state.NotImplemented:  # a kernel for this type
        return
    inputs = [calls.inputs[0]] * len(calls.tasks) if same_input else calls.inputs
    named = zip(input_names(calls, same_input), inputs, strict=True)
    feeds = {name: x.cpu().numpy() for names, own in named for name, x in zip(names, own, strict=True)}
    with torch.no_grad():
        results = calls(calls.tensors, inputs)
    for task, names, values in zip(calls.tasks, output_names(calls), results, strict=True):
        for name, value, got in zip(names, values, session.run(names, feeds), strict=True):
            expected = value.detach().cpu().double().numpy()
            bound = _CLOSE.get(value.dtype, 0.0) * np.abs(expected).max(initial=1.0)
            error = np.abs(got.astype(np.float64) - expected).max(initial=0.0)
            if not error <= bound:
                raise ZipError(
                    f"task {task!r}: output {name!r} of the ONNX graph must be that of the network within "
                    f"{bound:.1g}, got an error of {error:.2g}; the network may depend on the batch size or on random "
                    "numbers"
                )
