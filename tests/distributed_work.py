"""What each of two processes does in test_distributed.py; started as a script, with torchrun's environment."""

from __future__ import annotations

import datetime
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parent))

from handmade import zipped_pair
from nets import Functional, Residual, mlp, noise, seeded
from retraining import labelled

import mtzip
from mtzip.network.zipped import ZippedNetwork
from mtzip.retraining.retrain import retrain

STEPS = 5

#: Errors that zips may have, and that one process's part of the inputs would choose another zip for.
BUDGETS = (0.005, 0.05)


def batches(rank: int, size: int) -> dict[str, list]:
    """Batches of 12 samples a task, of which a process takes every ``size``-th sample."""
    data = labelled(24)
    return {
        task: [(a[rank::size], b[rank::size]) for a, b in zip(x.split(12), y.split(12), strict=True)]
        for task, (x, y) in data.items()
    }


def sgd(parameters):
    return torch.optim.SGD(parameters, 5e-4, momentum=0.9)


def retrained(rank: int, size: int, **arguments) -> dict[str, torch.Tensor]:
    """Weights after retraining with teachers and labels."""
    zipped = zipped_pair()
    if rank:  # what the processes begin with must not matter but for the first one's
        for parameter in zipped.parameters():
            parameter.data.add_(1.0)
    orders = {"norm": torch.arange(6), "hidden": torch.arange(5)}
    zipped.orders = dict.fromkeys("ab", orders)
    retrain(zipped, batches(rank, size), STEPS, optimizer=sgd, **arguments)
    return dict(zipped.state_dict())


def looped(model, zipped: ZippedNetwork, rank: int, size: int, optimizer=None) -> None:
    """A user's loop: one batch of every task a step, one backward pass of the summed loss."""
    optimizer = optimizer or sgd(model.parameters())
    data = batches(rank, size)
    for step in range(STEPS):
        optimizer.zero_grad()
        outputs = model({task: data[task][step % 2][0] for task in data})
        sum(F.cross_entropy(outputs[task], data[task][step % 2][1]) for task in data).backward()
        optimizer.step()


def in_ddp(rank: int, size: int, **arguments) -> dict[str, torch.Tensor]:
    zipped = zipped_pair()
    looped(DistributedDataParallel(zipped, **arguments), zipped, rank, size)
    return dict(zipped.state_dict())


def in_fsdp(rank: int, size: int) -> dict[str, torch.Tensor]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    zipped = zipped_pair()
    fully_shard(zipped, mesh=init_device_mesh("cpu", (size,)))
    held = sum(parameter.to_local().numel() for parameter in zipped.parameters())
    assert held < 0.7 * zipped_pair().parameter_count(), held
    looped(zipped, zipped, rank, size)
    return {
        key: value.full_tensor() if hasattr(value, "full_tensor") else value
        for key, value in zipped.state_dict().items()
    }


#: Name to network of so many classes, shape of its inputs and number of samples a task; sample space and feature space.
ZIPPED = {
    "mlp": (lambda classes: mlp(6, (12, 9), classes), (6,), 600),
    "few samples": (lambda classes: mlp(40, (50, 60), classes, norm=True), (40,), 48),
    "convolutions": (lambda classes: Functional(classes=classes), (2, 8, 8), 400),
    "residual": (lambda classes: Residual(classes=classes), (2, 8, 8), 200),
}


def zipped_together(name: str, rank: int, size: int, **arguments) -> dict[str, torch.Tensor]:
    """What a zip of two networks puts out for some inputs, and its weights; each process with its part of the data."""
    make, shape, count = ZIPPED[name]
    # In float64, where sums in another order differ by 1e-16; float32 networks come within 2e-5.
    networks = {task: seeded(lambda: make(3), seed).double() for seed, task in enumerate("ab")}
    data = {task: noise(count, *shape, seed=seed, dtype=torch.float64) for seed, task in enumerate("ab", start=5)}
    inputs = {task: x[rank::size] for task, x in data.items()}
    zipped = mtzip.zip_networks(networks, inputs, **arguments)
    with torch.no_grad():
        outputs = {
            f"outputs of {task}": zipped[task](noise(64, *shape, seed=9, dtype=torch.float64)) for task in zipped
        }
    errors = torch.tensor([list(layer.error.values()) for layer in zipped.report.layers if len(layer.error) == 2])
    return outputs | dict(zipped.state_dict()) | {"errors": errors}


def within_budget(rank: int, size: int, error: float) -> dict[str, torch.Tensor]:
    """What a zip to a budget of error stores and measures, each process with inputs of another size."""
    networks = {task: seeded(lambda: mlp(6, (12, 9), 3), seed).double() for seed, task in enumerate("ab")}
    inputs = {}
    for seed, task in enumerate("ab", start=5):
        inputs[task] = noise(400, 6, seed=seed, dtype=torch.float64)
        inputs[task][1::2] *= 0.1  # those of the second process of two
    zipped = mtzip.zip_networks(
        networks, {task: x[rank::size] for task, x in inputs.items()}, mtzip.Budget(error=error)
    )
    measured = torch.tensor(list(zipped.report.output_error.values()), dtype=torch.float64)
    return {"output errors": measured, "stored": torch.tensor(zipped.report.parameters_after)}


def refused(rank: int, size: int) -> list[str]:
    """Messages where the processes do not have the same networks, or arguments."""
    messages = []
    for seed, share in ((rank, 1.0), (0, 0.5 + 0.1 * rank)):
        networks = {task: seeded(lambda: mlp(6, (8, 7), 3), seed + at) for at, task in enumerate("ab")}
        try:
            mtzip.zip_networks(networks, {task: noise(64, 6) for task in networks}, share=share)
        except ValueError as error:
            messages.append(str(error))
    return messages


class Stopped(Exception):
    pass


def resumed(rank: int, size: int, path: Path) -> dict[str, torch.Tensor]:
    """Interrupted behind a checkpoint in all processes, and called again."""

    def log(step, _):
        if step == 3:
            raise Stopped

    arguments = {"checkpoint": path, "checkpoint_every": 2, "dropout": True, "weights": "balanced"}
    try:
        retrained(rank, size, log=log, **arguments)
    except Stopped:
        return retrained(rank, size, **arguments)
    raise AssertionError("it was not stopped")


def failed(rank: int, size: int) -> str:
    """The message where one process has a batch that is not finite."""
    zipped, data = zipped_pair(), batches(rank, size)
    if rank == 1:
        data["b"][1][0][0] = float("nan")
    try:
        retrain(zipped, data, STEPS)
    except FloatingPointError as error:
        return str(error)
    return "nothing"


def everything(rank: int, size: int, folder: Path) -> dict[str, object]:
    """All that is compared with one process."""
    return {
        **{f"zip {name}": zipped_together(name, rank, size) for name in ZIPPED},
        "zip by activation": zipped_together("residual", rank, size, matching="activation", reconstructions=1),
        "zip mtz": zipped_together("mlp", rank, size, method="mtz", share=0.5),
        "zip following": zipped_together("residual", rank, size, follow={"b": "a"}),
        "zip alone": zipped_together("mlp", 0, 1, distributed=False),
        "budget": {error: within_budget(rank, size, error) for error in BUDGETS},
        "refused": refused(rank, size),
        "retrained": retrained(rank, size),
        "features": retrained(rank, size, distill="both"),
        "ddp": in_ddp(rank, size),
        "ddp static": in_ddp(rank, size, static_graph=True),
        "fsdp": in_fsdp(rank, size),
        "uninterrupted": retrained(rank, size, dropout=True, weights="balanced"),
        "resumed": resumed(rank, size, folder / "run.ckpt"),
        "alone": retrained(0, 1, distributed=False),
        "failed": failed(rank, size),
        "validated": retrain(
            zipped_pair(), batches(rank, size), 4, validate=lambda zipped: float(rank), validate_every=2
        ).validations,
    }


def lose_a_process(rank: int, how: str) -> None:
    """Retrains until the second process dies, or stands still."""

    def log(step, _):
        if step == 2 and rank == 1:
            if how == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)

    retrain(zipped_pair(), batches(rank, 2), 50, log=log)


def main() -> None:
    what, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=8 if what == "hangs" else 60))
    rank, size = dist.get_rank(), dist.get_world_size()
    if what == "everything":
        found = everything(rank, size, folder)
        torch.save(found, folder / f"{rank}.pt")
        dist.barrier()
    else:
        lose_a_process(rank, what)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
