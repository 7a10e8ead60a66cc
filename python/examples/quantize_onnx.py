"""From two trained networks to one ONNX file in int8: zipped, exported, quantised by onnxruntime.

Weights of 8 bits and the sharing of neurons are savings of two kinds, and they multiply. Layers are shared as a whole
here: their weights then lie in the file as they are used, which is where a quantiser looks for them.
"""

from __future__ import annotations

import numpy as np
import onnxruntime
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from plain_pytorch import train
from tasks import arguments, datasets, networks, report
from torch.utils.data import DataLoader

import mtzip


class Inputs(CalibrationDataReader):
    """Batches of training images of all tasks, by the names of the graph's inputs."""

    def __init__(self, data, count: int = 10, size: int = 64):
        images = {task: set_.tensors[0].numpy() for task, set_ in data.items()}
        self.batches = iter([{t: x[at * size : (at + 1) * size] for t, x in images.items()} for at in range(count)])

    def get_next(self):
        """The next batch; None when there are no more."""
        return next(self.batches, None)


def errors(file, data) -> dict[str, float]:
    """Task to test error in per cent of an ONNX file."""
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    batches = {task: set_.tensors[0].numpy() for task, set_ in data.items()}
    found = session.run([f"{task}.output" for task in data], batches)
    wrong = {t: np.mean(y.argmax(1) != data[t].tensors[1].numpy()) for t, y in zip(data, found, strict=True)}
    return {task: 100 * float(part) for task, part in wrong.items()}


def main():
    options = arguments(__doc__)
    training, testing = datasets(options.data)
    loaders = {task: DataLoader(data, 64, shuffle=True) for task, data in training.items()}
    models = networks(training)
    train(models, loaders, options.epochs, 2e-3)
    before = report(models, testing)
    zipped = mtzip.zip_networks(models, loaders, samples=2000)
    report(zipped, testing)

    apart = 4 * zipped.report.parameters_before
    rows = [("originals, float32 weights", apart, before)]
    full, small = options.output / "zipped.onnx", options.output / "zipped-int8.onnx"
    mtzip.export_onnx(zipped, full)
    rows.append(("zipped, float32", full.stat().st_size, errors(full, testing)))
    # The preparation that onnxruntime recommends here would store what a task's layers share once a task.
    quantize_static(full, small, Inputs(training), per_channel=True, weight_type=QuantType.QInt8)
    rows.append(("zipped, int8", small.stat().st_size, errors(small, testing)))

    print(f"\n{'':28}{'bytes':>10}{'':>8}" + "".join(f"{f'{task}, error %':>18}" for task in testing))
    for what, size, found in rows:
        print(f"{what:28}{size:10,}{size / apart:8.0%}" + "".join(f"{found[task]:18.2f}" for task in testing))
    return zipped, rows


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
