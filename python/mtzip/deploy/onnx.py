"""``export_onnx``: a zipped network as one ONNX file, every shared tensor stored once."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import unknown_task
from ..network.zipped import ZippedNetwork
from .calls import Calls


def export_onnx(
    zipped: ZippedNetwork,
    path: str | os.PathLike,
    tasks: Sequence[str] | None = None,
    *,
    example: Mapping[str, Any] | None = None,
    same_input: bool = False,
    opset: int | None = None,
    check: bool = True,
) -> None:
    """Writes ``zipped`` as an ONNX file: one graph, an input and an output a task, shared weights once.

    Task ``a`` has the input ``a`` (``a.<argument>`` where its forward takes several) and the output ``a.output``
    (``a.<field>`` where it returns several; with ``outputs=`` of the zip, what that selects); every task's batch size
    is free of the others'. Weights carry the keys of ``zipped.state_dict()``; a BatchNorm's four vectors are stored as
    the factor and the shift they amount to, under the keys of its weight and bias. The networks are exported as they
    compute in evaluation mode. The file is written beside ``path`` and renamed.

    onnxruntime copies weights when it loads a file: it assembles partly shared layers, and packs a shared weight once
    for every layer that uses it. Where memory matters more than the first milliseconds, create the session with
    ``disabled_optimizers=["ConstantFolding"]`` and the session configuration entry ``session.disable_prepacking`` "1".

    Args:
        zipped: the network; not changed.
        path: the file. Weights of more than 2 GB go into ``<path>.data`` beside it, which has to stay there.
        tasks: names of the tasks to export, None for all.
        example: task to a batch of inputs, two samples or more. Needed only where none is remembered: after
            :func:`mtzip.zip_networks` and :func:`mtzip.load` it is.
        same_input: one input, called ``input``, that all tasks see; what they compute alike is computed once.
        opset: version of ONNX' operators, None for the exporter's own.
        check: run the graph on the example with onnxruntime, if that is installed, and compare with the network.

    Raises:
        ImportError: onnx or onnxscript is not installed.
        KeyError: no such task.
        ValueError: no example input; inputs of the tasks that differ in form with ``same_input``.
        ZipError: a network cannot be exported, or onnxruntime computes something else.
        OSError: the file cannot be written.
    """
    try:
        import onnx_ir  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError("export_onnx needs more: pip install 'mtzip[onnx]'") from error
    from .onnx_file import compare, write
    from .onnx_model import model_of

    calls = Calls(zipped, _checked(zipped, tasks, example), example, zipped.outputs)
    model = model_of(calls, same_input, opset)
    write(model, path, (lambda file: compare(file, calls, same_input)) if check else None)


def _checked(zipped: ZippedNetwork, tasks: Sequence[str] | None, example: Mapping[str, Any] | None) -> list[str]:
    """The tasks to export, after a look at the arguments."""
    if not isinstance(zipped, ZippedNetwork):
        raise TypeError(f"zipped must be a ZippedNetwork, got {type(zipped).__name__}")
    if isinstance(tasks, str):
        raise TypeError(f"tasks must be a list of names, got the text {tasks!r}; pass [{tasks!r}]")
    if example is not None and not isinstance(example, Mapping):
        raise TypeError(f"example must map tasks to inputs, got {type(example).__name__}")
    chosen = list(dict.fromkeys(zipped.tasks if tasks is None else tasks))
    if not chosen:
        raise ValueError("tasks must name at least one task, got none; None exports all")
    for name in (*chosen, *(example or ())):
        if name not in zipped:
            raise unknown_task("task", name, zipped.tasks)
    return chosen
