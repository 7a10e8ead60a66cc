"""What a zipped network costs on the device: time of one task and of all, size of the ONNX file, memory of a process.

python -m bench deploy [--quick] [--csv FILE]

Weights and images are random: only times and sizes are measured.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import multiprocessing
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import mtzip
from mtzip.demo.networks import LeNet5, LeNet300100
from mtzip.network.assembly import assembled_anew

from .networks import CifarResNet, Vgg16
from .timer import measure
from .zip import Row, table, write_csv

NAME = "deploy"
HELP = "inference of a zipped network, one task and all; ONNX file size; memory of serving"
ORDER = 7
NONE = float("inf")  # nothing is asked of a row that is there to be seen

IMAGE, DIGIT = (3, 32, 32), (1, 28, 28)
#: Name to (network, shape of its input).
NETWORKS: Mapping[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "LeNet-300-100": (LeNet300100, DIGIT),
    "LeNet-5": (LeNet5, DIGIT),
    "ResNet-20": (partial(CifarResNet, 3), IMAGE),
    "VGG-16, quarter width": (partial(Vgg16, width=16), IMAGE),
}


WIDTH = 1024


def wide() -> nn.Module:
    """Eight linear layers of 4 MB: enough for a process to show them."""
    layers = [layer for _ in range(8) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(WIDTH, 10))


def pair(make: Callable[[], nn.Module]) -> dict[str, nn.Module]:
    """Two networks of random weights."""
    networks = {}
    for seed, task in enumerate("ab"):
        torch.manual_seed(seed)
        networks[task] = make().eval()
    return networks


def noise(count: int, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Normal numbers."""
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def zipped_pair(networks: Mapping[str, nn.Module], shape: tuple[int, ...], share: float = 1.0, **options):
    """The two zipped on random inputs."""
    inputs = {task: noise(64, shape, seed) for seed, task in enumerate(networks)}
    return mtzip.zip_networks(networks, inputs, share=share, **options).eval()


@torch.no_grad()
def _ratio(ways: Mapping[str, Callable[[], object]], budget: float) -> tuple[float, str]:
    """Time of the second way over that of the first, and both. Their fastest tenth: what others do adds to the rest."""
    times = measure(ways, budget=budget)
    fast = {}
    for name, timing in times.items():
        ordered = sorted(timing.seconds)
        fast[name] = ordered[len(ordered) // 10]
    first, second = fast.values()
    return second / first, ", ".join(f"{name} {1e3 * value:.3f} ms" for name, value in fast.items())


def _one_task(quick: bool) -> Iterator[Row]:
    for name, (make, shape) in list(NETWORKS.items())[: 2 if quick else None]:
        networks = pair(make)
        for share in (1.0, 0.5):
            zipped = zipped_pair(networks, shape, share)
            for batch in (1, 32):
                x = noise(batch, shape)
                ways = {"original": lambda n=networks, x=x: n["a"](x), "zipped": lambda z=zipped, x=x: z["a"](x)}
                value, detail = _ratio(ways, 0.5 if quick else 2.0)
                yield Row(f"{name}, {share:.0%}", f"one task / original, batch {batch}", value, 1.1, 1.0, detail)


def _all_tasks(quick: bool) -> Iterator[Row]:
    for name, (make, shape) in list(NETWORKS.items())[: 2 if quick else None]:
        networks = pair(make)
        normed = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in networks["a"].modules())
        for affine in (False, True):
            if normed and affine:
                continue
            zipped = zipped_pair(networks, shape, affine=affine)
            # A private scale or BatchNorm behind every layer: the weights are shared, what they compute is not.
            same = not affine and not normed
            kind = "same function" if same else "private BatchNorm" if normed else "private scales"
            must, aim = (0.65, 0.52) if same else (NONE, NONE)
            for batch in (1, 32):
                x = noise(batch, shape)
                ways = {
                    "originals": lambda n=networks, x=x: [network(x) for network in n.values()],
                    "zipped(x)": lambda z=zipped, x=x: z(x),
                }
                with torch.no_grad():
                    for _ in range(2):
                        zipped(x)
                    together = zipped(x)
                    error = max(float((together[t] - zipped[t](x)).abs().max()) for t in zipped)
                value, detail = _ratio(ways, 0.5 if quick else 2.0)
                what = f"all tasks / originals, batch {batch}"
                yield Row(f"{name}, trunk of {kind}", what, value, must, aim, f"{detail}, differs by {error:.0e}")


def _sizes(quick: bool) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        for name, (make, shape) in list(NETWORKS.items())[: 2 if quick else None]:
            for share in (1.0, 0.5):
                zipped = zipped_pair(pair(make), shape, share)
                mtzip.export_onnx(zipped, Path(folder) / "z.onnx")
                size, stored = (Path(folder) / "z.onnx").stat().st_size, 4 * zipped.parameter_count()
                detail = f"{size:,} bytes, {stored:,} of parameters"
                yield Row(
                    f"{name}, {share:.0%}", "ONNX file above parameters, %", 100 * (size / stored - 1), 2, 2, detail
                )


def _memory() -> Iterator[Row]:
    """Of a process that has answered both tasks, above one that has only imported its libraries."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        networks = pair(wide)
        torch.save({task: network.state_dict() for task, network in networks.items()}, folder / "originals.pt")
        for share in (1.0, 0.5):
            zipped = zipped_pair(networks, (WIDTH,), share, matching="greedy")
            mtzip.save(zipped, folder / f"{share}.safetensors")
            mtzip.export_onnx(zipped, folder / f"{share}.onnx")
        apart = zipped_pair(networks, (WIDTH,), 0.0)
        mtzip.export_onnx(apart, folder / "originals.onnx")
        for kind in ("torch", "onnxruntime"):
            base = _in_process(folder, kind, "originals")
            for share in (1.0, 0.5):
                ways = {"": f"{share}", ", assembled at every call": f"{share} anew"}
                for how, what in ways.items():
                    value = _in_process(folder, kind, what)
                    detail = f"{value:.0f} MB, originals {base:.0f} MB"
                    yield Row(
                        f"two MLPs of 34 MB, {share:.0%}",
                        f"memory / originals, {kind}{how}",
                        value / base,
                        NONE,
                        NONE,
                        detail,
                    )


def _in_process(folder: Path, kind: str, what: str) -> float:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_serve, (folder, kind, what))


def _serve(folder: Path, kind: str, what: str) -> float:
    """Megabytes that a process of its own takes to answer both tasks."""
    torch.set_grad_enabled(False)
    inputs = {task: noise(2, (WIDTH,)) for task in "ab"}
    if kind == "onnxruntime":
        import onnxruntime

        before = _megabytes()
        options, disabled = onnxruntime.SessionOptions(), []
        if "anew" in what:  # no copy of a weight for every layer that uses it
            options.add_session_config_entry("session.disable_prepacking", "1")
            disabled = ["ConstantFolding"]
        file = folder / f"{what.split()[0]}.onnx"
        session = onnxruntime.InferenceSession(file, options, ["CPUExecutionProvider"], disabled_optimizers=disabled)
        session.run(None, {task: x.numpy() for task, x in inputs.items()})
        return _megabytes() - before
    nn.Linear(WIDTH, 10)(inputs["a"])  # the library's own buffers
    before = _megabytes()
    if what == "originals":
        states = torch.load(folder / "originals.pt", weights_only=True)
        with torch.device("meta"):
            networks = {task: wide().eval() for task in states}
        for task, state in states.items():
            networks[task].load_state_dict(state, assign=True)
        del states
    else:
        with torch.device("meta"):
            instances = {task: wide().eval() for task in inputs}
        networks = mtzip.load(folder / f"{what.split()[0]}.safetensors", instances)
    with assembled_anew() if "anew" in what else contextlib.nullcontext():
        for task, x in inputs.items():
            networks[task](x)
    gc.collect()
    return _megabytes() - before


def _megabytes() -> float:
    """Resident memory of this process that is its own."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024
    raise OSError("/proc/self/status must say RssAnon, as it does on Linux")


def run(options: argparse.Namespace) -> list[Row]:
    """Measures, prints every row as it is known and the table at the end."""
    rows = []
    parts = [_one_task(options.quick), _all_tasks(options.quick), _sizes(options.quick)]
    for part in [*parts, *([] if options.quick else [_memory()])]:
        for row in part:
            rows.append(row)
            print(f"{row.work}, {row.measure}: {row.value:.3f} ({row.verdict}); {row.detail}", flush=True)
    print(f"\n{table(rows)}")
    if options.csv:
        write_csv(rows, options.csv)
    return rows
