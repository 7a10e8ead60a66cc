"""Time of a retraining step against a step of training the original networks on the same batches."""

from __future__ import annotations

import argparse
import copy
import csv
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mtzip
from bench.networks import CaffeLeNet5, CifarResNet
from mtzip.demo.networks import LeNet300100

NAME = "retrain"
HELP = "time of a retraining step against training the originals"
ORDER = 7

BATCH = 128
WARM = 2  # steps that do not count
ROUNDS = 3


def vgg(classes: int) -> nn.Sequential:
    """VGG-16 with BatchNorm at a quarter of the width, for CIFAR's images."""
    layers: list[nn.Module] = []
    inputs = 3
    for width in (16, 16, 0, 32, 32, 0, 64, 64, 64, 0, 128, 128, 128, 0, 128, 128, 128, 0):
        if not width:
            layers.append(nn.MaxPool2d(2))
            continue
        layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        inputs = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128, 128), nn.ReLU(inplace=True), nn.Linear(128, classes))


#: Name to network and the shape of its images.
CASES: dict[str, tuple[Callable[[int], nn.Module], tuple[int, ...]]] = {
    "LeNet-300-100": (LeNet300100, (1, 28, 28)),
    "LeNet-5": (CaffeLeNet5, (1, 28, 28)),
    "VGG-16/4": (vgg, (3, 32, 32)),
    "ResNet-20": (lambda classes: CifarResNet(3, classes), (3, 32, 32)),
}
SHARES = (1.0, 0.5)


def originals_step(networks: dict[str, nn.Module], batches: dict[str, list], steps: int) -> float:
    """Seconds a step of a plain loop: every network its own Adam and cross entropy, one batch of each a step."""
    networks = {task: copy.deepcopy(network).train() for task, network in networks.items()}
    optimizers = {task: torch.optim.Adam(network.parameters(), 3e-4) for task, network in networks.items()}
    seconds = []
    for step in range(steps + WARM):
        start = time.perf_counter()
        for task, network in networks.items():
            images, labels = batches[task][step % len(batches[task])]
            optimizers[task].zero_grad()
            F.cross_entropy(network(images), labels).backward()
            optimizers[task].step()
        _wait(images)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[WARM:])


def retrain_step(zipped: mtzip.ZippedNetwork, batches: dict[str, list], steps: int, **arguments) -> float:
    """Seconds a step of :func:`mtzip.retrain`."""
    zipped = copy.deepcopy(zipped)
    history = mtzip.retrain(zipped, batches, steps + WARM, progress=False, **arguments)
    times = [row.seconds for row in history]
    return statistics.median(after - before for before, after in zip(times[WARM - 1 :], times[WARM:], strict=False))


def _wait(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize()


def measured(name: str, options: argparse.Namespace) -> list[dict[str, object]]:
    """Rows of one network: milliseconds a step, and their ratio to training the originals."""
    make, shape = CASES[name]
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    networks = {task: make(10).to(options.device).eval() for task in "ab"}
    images = {task: torch.randn(4 * BATCH, *shape, generator=generator).to(options.device) for task in "ab"}
    labels = torch.randint(0, 10, (BATCH,), generator=generator).to(options.device)
    labelled = {task: [(x, labels) for x in images[task].split(BATCH)] for task in images}
    unlabelled = {task: list(x.split(BATCH)) for task, x in images.items()}
    steps = 10 if options.quick else 30
    ways: dict[str, Callable[[], float]] = {"originals, labels": lambda: originals_step(networks, labelled, steps)}
    for share in SHARES:
        zipped = mtzip.zip_networks(networks, {task: x[:BATCH] for task, x in images.items()}, share=share)
        ways |= {
            f"zipped {share:.0%}, labels": lambda z=zipped: retrain_step(z, labelled, steps, teachers={}),
            f"zipped {share:.0%}, distilled": lambda z=zipped: retrain_step(z, unlabelled, steps),
            f"zipped {share:.0%}, both": lambda z=zipped: retrain_step(z, labelled, steps),
            f"zipped {share:.0%}, distilled, in memory": lambda z=zipped: retrain_step(z, images, steps),
        }
    found: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(ROUNDS):  # in turn, so that a noisy minute favours none
        for way, call in ways.items():
            found[way].append(call())
    base = min(found["originals, labels"])
    return [
        {"network": name, "way": way, "milliseconds": 1e3 * min(times), "ratio": min(times) / base}
        for way, times in found.items()
    ]


def run(options: argparse.Namespace) -> None:
    """Prints a row a way; the best of a few medians each."""
    rows = []
    print(f"retrain: {BATCH} images a task and step, two tasks; ratio to training the originals, must be at most 1.3")
    for name in CASES:
        for row in measured(name, options):
            print(
                f"  {row['network']:14} {row['way']:32} {row['milliseconds']:8.2f} ms {row['ratio']:6.2f}", flush=True
            )
            rows.append(row)
    if options.csv:
        with open(options.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
