"""Kills a retraining at random moments and starts it again, until it ends: the same weights as one left alone?"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

NAME = "resume"
HELP = "kills a retraining at random moments: the same weights in the end?"
ORDER = 8

STEPS = 60


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    parser.add_argument("--kills", type=int, default=50, help="moments to kill at (%(default)s)")


class Noisy(Dataset):
    """Images whose augmentation draws from torch's global generator, as most do."""

    def __init__(self, seed: int, count: int = 96):
        generator = torch.Generator().manual_seed(seed)
        self.images = torch.randn(count, 1, 8, 8, generator=generator)
        self.labels = torch.randint(0, 3, (count,), generator=generator)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int):
        return self.images[index] + 0.1 * torch.randn(1, 8, 8), self.labels[index]


def network(seed: int) -> nn.Module:
    """A convolution, BatchNorm, dropout and two linear layers."""
    torch.manual_seed(seed)
    layers = [nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(72, 24), nn.ReLU(), nn.Dropout(0.3), nn.Linear(24, 3)).eval()


def work(checkpoint: str, result: str, pause: float = 0.0) -> None:
    """What a user's script does: zips, retrains with everything that has a state, writes the weights.

    Args:
        checkpoint: of the retraining.
        result: file for the weights, written when all is done.
        pause: seconds to wait in every step, so that there is time to be killed.
    """
    import mtzip

    torch.set_num_threads(1)
    data = {task: Noisy(seed) for seed, task in enumerate("ab")}
    zipped = mtzip.zip_networks(
        {task: network(seed) for seed, task in enumerate("ab")}, {task: set_.images for task, set_ in data.items()}
    )
    loaders = {
        "a": DataLoader(data["a"], 16, shuffle=True),
        "b": DataLoader(data["b"], 20, shuffle=True, generator=torch.Generator().manual_seed(1)),
    }
    mtzip.retrain(
        zipped,
        loaders,
        STEPS,
        weights="balanced",
        batchnorm="train",
        accumulate=2,
        distill="both",
        validate=lambda zipped: {t: float(F.cross_entropy(zipped[t](s.images), s.labels)) for t, s in data.items()},
        validate_every=7,
        checkpoint=checkpoint,
        checkpoint_every=3,
        log=lambda step, scalars: time.sleep(pause),
        progress=False,
    )
    part = f"{result}.part"
    torch.save(zipped.state_dict(), part)
    os.replace(part, result)


def digest(file: Path) -> str:
    """Of the weights in a result file, and their keys."""
    state = torch.load(file, weights_only=True)
    content = b"".join(key.encode() + tensor.contiguous().numpy().tobytes() for key, tensor in sorted(state.items()))
    return hashlib.sha256(content).hexdigest()


def started(folder: Path, pause: float) -> subprocess.Popen:
    """A process at :func:`work` in a folder."""
    arguments = [sys.executable, "-m", "bench.resume", str(folder / "run.ckpt"), str(folder / "weights.pt"), str(pause)]
    return subprocess.Popen(arguments, stderr=subprocess.PIPE, start_new_session=True)


def killed_until_done(folder: Path, kills: int, dice: random.Random, signals=(signal.SIGKILL,)) -> int:
    """Starts the work again and again, kills it at random moments ``kills`` times, then lets it end.

    Most kills come after a checkpoint of the process to be killed, so that they hit a retraining under way, in a step
    or while it writes; one in five comes at any time after its start.

    Returns:
        int: number of kills that hit a process at work.

    Raises:
        RuntimeError: a process that failed by itself.
    """
    hit, pause = 0, 0.02
    while True:
        process = started(folder, pause if hit < kills else 0.0)
        if hit < kills:
            if dice.random() < 0.8:
                _wait_for_step(folder, process)
                time.sleep(dice.uniform(0, 0.2 * STEPS * pause))
            else:
                time.sleep(dice.uniform(0, 8))
            chosen = dice.choice(signals)
            if process.poll() is None:
                process.send_signal(chosen)
                hit += 1
            error = process.communicate()[1]
            if process.returncode not in (0, -chosen, 128 + chosen):
                raise RuntimeError(f"a process ended with {process.returncode}: {error.decode()[-2000:]}")
            if process.returncode == 0 and hit < kills:
                return hit
            continue
        error = process.communicate()[1]
        if process.returncode:
            raise RuntimeError(f"a process ended with {process.returncode}: {error.decode()[-2000:]}")
        return hit


def _wait_for_step(folder: Path, process: subprocess.Popen) -> None:
    """Until the process has written a checkpoint of its own, or has ended."""
    file = folder / "run.ckpt"
    before = file.stat().st_mtime_ns if file.exists() else 0
    while process.poll() is None and (not file.exists() or file.stat().st_mtime_ns == before):
        time.sleep(0.002)


def run(options: argparse.Namespace) -> None:
    """Prints how many of the kills ended in the same weights."""
    dice, wanted = random.Random(0), min(options.kills, 5) if options.quick else options.kills
    with tempfile.TemporaryDirectory() as name:
        alone = Path(name) / "alone"
        alone.mkdir()
        killed_until_done(alone, 0, dice)
        expected = digest(alone / "weights.pt")
        kills, runs, same = 0, 0, 0
        while kills < wanted:
            folder = Path(name) / str(runs)
            folder.mkdir()
            kills += killed_until_done(folder, min(10, wanted - kills), dice)
            runs += 1
            same += digest(folder / "weights.pt") == expected
            print(f"  {kills} kills, {runs} runs, {same} with the weights of a run left alone", flush=True)
    print(f"resume: {kills} kills in {runs} runs; {same} of {runs} runs ended with the same weights, bit for bit")
    if same < runs:
        raise SystemExit(1)


if __name__ == "__main__":
    work(sys.argv[1], sys.argv[2], float(sys.argv[3]))
