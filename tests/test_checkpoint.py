"""Retraining goes on from its checkpoint: after any kill the same weights."""

from __future__ import annotations

import random
import signal
import threading

import numpy as np
import pytest
import torch
from handmade import images
from retraining import Killed, assert_same, inputs, labelled, weights_of, with_dropout
from torch.utils.data import DataLoader, Dataset, TensorDataset, WeightedRandomSampler

from bench import resume as script
from mtzip.network.zipped import ZippedNetwork
from mtzip.retraining.retrain import retrain


def killed_and_resumed(make, path, kills=(5, 6, 11), **arguments) -> ZippedNetwork:
    """A retraining of ``make()``'s network and loaders that dies after each of these steps and is called again."""
    for kill in (*kills, None):
        zipped, loaders = make()
        arguments = {"steps": 14, "checkpoint": path, "checkpoint_every": 4, "dropout": True} | arguments

        def log(step, _, kill=kill):
            if step == kill:
                raise Killed

        if kill is None:
            history = retrain(zipped, loaders, log=log, **arguments)
            assert [row.step for row in history] == list(range(len(history)))
            return zipped
        with pytest.raises(Killed):
            retrain(zipped, loaders, log=log, **arguments)


def left_alone(make, **arguments) -> ZippedNetwork:
    zipped, loaders = make()
    retrain(zipped, loaders, **({"steps": 14, "dropout": True} | arguments))
    return zipped


# -- killed for real -------------------------------------------------------------------------------------------


def test_killed_at_random_moments_it_ends_with_the_same_weights(tmp_path):
    dice = random.Random(1)
    signals = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM)
    for name, kills in (("alone", 0), ("killed", 4)):
        (tmp_path / name).mkdir()
        script.killed_until_done(tmp_path / name, kills, dice, signals)
    expected = script.digest(tmp_path / "alone/weights.pt")
    assert script.digest(tmp_path / "killed/weights.pt") == expected
    assert sorted(file.name for file in (tmp_path / "killed").iterdir()) == ["run.ckpt", "weights.pt"]


# -- every kind of state ---------------------------------------------------------------------------------------


class Augmented(Dataset):
    """Noise from every global generator there is."""

    def __init__(self, seed: int):
        self.images = images(seed, 22)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index] + 0.1 * torch.randn(()) + 0.1 * random.random() + 0.1 * float(np.random.rand())


def loaders_of_tensors():
    return {task: images(seed, 22) for seed, task in enumerate("ab")}


def shuffled_loaders():
    return {task: DataLoader(TensorDataset(images(seed, 22)), 6, shuffle=True) for seed, task in enumerate("ab")}


def loaders_with_a_generator():
    generator = torch.Generator().manual_seed(3)
    return {
        "a": DataLoader(images(0, 22), 6, shuffle=True, generator=generator),
        "b": DataLoader(images(1, 22), 5, sampler=WeightedRandomSampler(torch.arange(1.0, 23), 17)),
    }


def augmented_loaders():
    random.seed(5)
    np.random.seed(5)
    return {task: DataLoader(Augmented(seed), 6, shuffle=True) for seed, task in enumerate("ab")}


def lists_and_a_generator():
    return {"a": list(images(0, 20).split(5)), "b": (images(seed, 5) for seed in range(100))}


def worker_loaders():
    return {"a": DataLoader(images(0, 22), 6, shuffle=True, num_workers=1), "b": images(1, 30)}


@pytest.mark.parametrize(
    "loaders",
    [
        loaders_of_tensors,
        shuffled_loaders,
        loaders_with_a_generator,
        augmented_loaders,
        lists_and_a_generator,
        worker_loaders,
    ],
)
def test_loaders_go_on_where_they_were(loaders, tmp_path):

    def make():
        return (with_dropout(), loaders())

    resumed = killed_and_resumed(make, tmp_path / "run.ckpt", batch_size=8)
    assert_same(weights_of(resumed), weights_of(left_alone(make, batch_size=8)))


@pytest.mark.parametrize(
    "arguments",
    [
        {"weights": "balanced", "accumulate": 2},
        {"batchnorm": "train", "weights": {"a": 0.5}},
        {"validate": lambda zipped: {t: float((zipped[t](x) - 1).square().mean()) for t, x in inputs(8).items()}},
        {"validate": lambda zipped: float(zipped["a"].hidden.bias.sum()), "validate_every": 3, "patience": 2},
        {"optimizer": lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9)},
        {
            "optimizer": lambda p: torch.optim.AdamW(p, 1e-2, amsgrad=True),
            "scheduler": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 1e-2, total_steps=20),
        },
        {
            "optimizer": lambda p: torch.optim.RMSprop(p, 1e-2),
            "scheduler": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=1),
        },
        {"autocast": torch.bfloat16},
        {"distillation": "kl", "seed": 3, "kills": (4, 4, 14)},
    ],
    ids=lambda arguments: "-".join(arguments),
)
def test_every_state_goes_on(arguments, tmp_path):

    def make():
        return (with_dropout(), labelled(22))

    resumed = killed_and_resumed(make, tmp_path / "run.ckpt", **{"batch_size": 8} | arguments)
    arguments = {key: value for key, value in arguments.items() if key != "kills"}
    assert_same(weights_of(resumed), weights_of(left_alone(make, **{"batch_size": 8} | arguments)))


def test_the_callers_generators_go_on_too_without_a_seed(tmp_path):
    def make():
        torch.manual_seed(11)
        return with_dropout(), inputs(22)

    resumed = killed_and_resumed(make, tmp_path / "run.ckpt", batch_size=8, seed=None)
    after = torch.get_rng_state()
    assert_same(weights_of(resumed), weights_of(left_alone(make, batch_size=8, seed=None)))
    assert torch.equal(torch.get_rng_state(), after)


def test_history_goes_on_and_a_finished_run_is_not_run_again(tmp_path):

    def make():
        return (with_dropout(), inputs(22))

    steps = []
    arguments = {
        "steps": 14,
        "checkpoint": tmp_path / "run.ckpt",
        "validate": lambda zipped: float(zipped["a"].norm.weight.sum()),
        "validate_every": 5,
    }
    first = retrain(*make(), log=lambda step, _: steps.append(step), **arguments)
    assert steps == list(range(15))
    zipped, data = make()
    again = retrain(zipped, data, log=lambda step, _: steps.append(step), **arguments)
    assert steps == list(range(15))
    assert again == first
    assert [validation.step for validation in again.validations] == [0, 5, 10, 14]
    reference, data = make()
    retrain(reference, data, 14, validate=arguments["validate"], validate_every=5)
    assert_same(weights_of(zipped), weights_of(reference))


# -- SIGTERM ---------------------------------------------------------------------------------------------------


def test_sigterm_writes_and_ends_with_143(tmp_path):
    path = tmp_path / "run.ckpt"
    before = signal.getsignal(signal.SIGTERM)

    def log(step, _):
        if step == 3:
            signal.raise_signal(signal.SIGTERM)

    def make():
        return (with_dropout(), inputs(22))

    with pytest.raises(SystemExit) as caught:
        retrain(*make(), 14, checkpoint=path, log=log, dropout=True)
    assert caught.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before
    assert path.exists()
    zipped, data = make()
    history = retrain(zipped, data, 14, checkpoint=path, dropout=True)
    assert len(history) == 14
    assert_same(weights_of(zipped), weights_of(left_alone(make)))


def test_the_users_handler_has_its_way(tmp_path):
    seen = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append(path.exists()))
    path = tmp_path / "run.ckpt"
    try:
        log = lambda step, _: signal.raise_signal(signal.SIGTERM) if step == 3 else None  # noqa: E731
        assert len(retrain(with_dropout(), inputs(22), 8, checkpoint=path, log=log)) == 8
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [True]


def test_works_in_a_thread_where_signals_cannot_be_handled(tmp_path):
    done = []
    worker = threading.Thread(
        target=lambda: done.append(retrain(with_dropout(), inputs(8), 2, checkpoint=tmp_path / "run.ckpt"))
    )
    worker.start()
    worker.join()
    assert len(done[0]) == 2
