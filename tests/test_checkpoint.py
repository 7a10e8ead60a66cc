"""Retraining goes on from its checkpoint: after any kill the same weights, and nothing but its own file is taken."""

from __future__ import annotations

import json
import random
import signal
import threading

import numpy as np
import pytest
import torch
from handmade import images, zipped_pair
from retraining import assert_same, inputs, labelled, weights_of
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset, WeightedRandomSampler

import mtzip
from bench import resume as script
from mtzip.network.zipped import ZippedNetwork
from mtzip.retraining import tree
from mtzip.retraining.retrain import retrain
from mtzip.saving import safefile


class Killed(BaseException):
    """Stands for SIGKILL: nothing may be done about it."""


def pair() -> ZippedNetwork:
    """The zipped pair with dropout in it."""
    zipped = zipped_pair()
    for task in zipped:
        zipped[task].head = nn.Sequential(nn.Dropout(0.4), zipped[task].head)
    return zipped


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
    make = lambda: (pair(), loaders())  # noqa: E731
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
    make = lambda: (pair(), labelled(22))  # noqa: E731
    resumed = killed_and_resumed(make, tmp_path / "run.ckpt", **{"batch_size": 8} | arguments)
    arguments = {key: value for key, value in arguments.items() if key != "kills"}
    assert_same(weights_of(resumed), weights_of(left_alone(make, **{"batch_size": 8} | arguments)))


def test_the_callers_generators_go_on_too_without_a_seed(tmp_path):
    def make():
        torch.manual_seed(11)
        return pair(), inputs(22)

    resumed = killed_and_resumed(make, tmp_path / "run.ckpt", batch_size=8, seed=None)
    after = torch.get_rng_state()
    assert_same(weights_of(resumed), weights_of(left_alone(make, batch_size=8, seed=None)))
    assert torch.equal(torch.get_rng_state(), after)


def test_history_goes_on_and_a_finished_run_is_not_run_again(tmp_path):
    make = lambda: (pair(), inputs(22))  # noqa: E731
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

    make = lambda: (pair(), inputs(22))  # noqa: E731
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
        assert len(retrain(pair(), inputs(22), 8, checkpoint=path, log=log)) == 8
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [True]


def test_works_in_a_thread_where_signals_cannot_be_handled(tmp_path):
    done = []
    worker = threading.Thread(
        target=lambda: done.append(retrain(pair(), inputs(8), 2, checkpoint=tmp_path / "run.ckpt"))
    )
    worker.start()
    worker.join()
    assert len(done[0]) == 2


# -- files that are refused ------------------------------------------------------------------------------------


def written(tmp_path, **arguments):
    """A checkpoint of the pair, and the arguments of the call."""
    path = tmp_path / "run.ckpt"
    arguments = {"loaders": inputs(22), "steps": 4, "checkpoint": path} | arguments
    retrain(pair(), **arguments)
    return path, arguments


def refused(arguments, message: str, zipped=None) -> None:
    """The call fails with this message and a remedy, and changes nothing."""
    zipped = zipped or pair()
    before = weights_of(zipped)
    with pytest.raises(ValueError, match=f"cannot be resumed: (?s:.*){message}(?s:.*); delete it to start anew"):
        retrain(zipped, **arguments)
    assert_same(weights_of(zipped), before)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"steps": 5}, "a call with steps=4, expected 5"),
        ({"lr": 1e-3}, "a call with lr=None, expected 0.001"),
        ({"seed": 1}, "seed=0, expected 1"),
        ({"weights": {"a": 2.0}}, "weights=None, expected {'a': 2.0}"),
        ({"optimizer": lambda p: torch.optim.SGD(p, 0.1)}, "optimizer='Adam', expected 'SGD'"),
        ({"validate": lambda z: 0.0}, "validate=False, expected True"),
        ({"autocast": torch.bfloat16}, "autocast=None, expected 'torch.bfloat16'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_call_is_refused(changed, message, tmp_path):
    _, arguments = written(tmp_path)
    refused(arguments | changed, message)


def test_another_network_is_refused(tmp_path):
    _, arguments = written(tmp_path)
    frozen = pair()
    frozen["a"].head.requires_grad_(False)
    refused(arguments, "it is of another network: networks.a.head.1.weight must be", frozen)
    other = pair()
    with torch.no_grad():
        other["a"].hidden.bias.add_(0.1)
    refused(arguments, "it began with other weights: networks.a.hidden.bias", other)
    refused(arguments, "it is of another network: networks.a.conv", zipped_pair().double())


def test_the_same_zip_with_other_last_bits_goes_on(tmp_path):
    _, arguments = written(tmp_path)
    near = pair()
    with torch.no_grad():
        for parameter in near.parameters():
            parameter.mul_(1 + 1e-6)
    assert len(retrain(near, **arguments)) == 4


def test_files_of_other_kinds_are_refused(tmp_path):
    path, arguments = written(tmp_path)
    mtzip.save(zipped_pair(), path)
    refused(arguments, "got another file of this library")
    torch.save(weights_of(pair()), path)
    refused(arguments, "")
    path.write_bytes(b"")
    refused(arguments, "")
    with pytest.raises(ValueError, match="must be a file in a folder that exists"):
        retrain(pair(), **arguments | {"checkpoint": tmp_path / "nowhere/run.ckpt"})
    with pytest.raises(ValueError, match="must be a file in a folder that exists"):
        retrain(pair(), **arguments | {"checkpoint": tmp_path})


def test_damage_is_noticed_wherever_it_is(tmp_path):
    path, arguments = written(tmp_path)
    whole = path.read_bytes()
    dice = random.Random(0)
    for _ in range(60):
        damaged = bytearray(whole)
        damaged[dice.randrange(len(whole))] ^= 1 << dice.randrange(8)
        path.write_bytes(damaged)
        refused(arguments, "")
    for _ in range(20):
        path.write_bytes(whole[: dice.randrange(len(whole))])
        refused(arguments, "")


def test_a_file_made_to_look_right_is_refused_and_changes_nothing(tmp_path):
    """The checksum holds, but the content is no state of a run."""
    path, arguments = written(tmp_path)
    tensors, document = safefile.read(path)
    document.pop("sha256", None)
    text = json.dumps(document)
    dice = random.Random(0)
    parts = ['"tensor"', '"dict"', '"list"', "state.", "null", ": 0", "[]", "torch", "own", "network", "1"]
    tried = 0
    while tried < 60:
        old, new = dice.choice(parts), dice.choice([*parts, "{}", "7", '""'])
        places = [at for at in range(len(text)) if text.startswith(old, at)]
        at = dice.choice(places) if places else 0
        try:
            altered = json.loads(text[:at] + new + text[at + len(old) :])
        except ValueError:
            continue
        tried += 1
        if altered == document or not isinstance(altered, dict):
            continue
        safefile.write(path, tensors, altered)
        zipped = pair()
        before = weights_of(zipped)
        try:
            retrain(zipped, **arguments)  # what was changed may not matter, a time say
        except ValueError as error:
            assert "cannot be resumed" in str(error)
            assert_same(weights_of(zipped), before)


def test_a_loader_that_has_become_shorter_is_refused(tmp_path):
    path = tmp_path / "run.ckpt"
    make = lambda count: {t: list(x.split(4)) for t, x in inputs(count).items()}  # noqa: E731

    def log(step, _):
        if step == 4:
            raise Killed

    with pytest.raises(Killed):
        retrain(pair(), make(24), 10, checkpoint=path, checkpoint_every=3, log=log)
    arguments = {"loaders": make(8), "steps": 10, "checkpoint": path, "checkpoint_every": 3}
    refused(arguments, r"loaders\['a'\] must give the batches it gave before, at least 3 a round, got 2")


def test_an_optimizer_whose_state_is_no_numbers_is_named(tmp_path):
    class Odd(torch.optim.SGD):
        def state_dict(self):
            return {**super().state_dict(), "callback": print}

    with pytest.raises(
        TypeError, match=r"state\.optimizer\.callback must be made of dicts, lists, numbers and tensors"
    ):
        retrain(pair(), inputs(8), 2, checkpoint=tmp_path / "c", optimizer=lambda p: Odd(p, 0.1))


# -- trees -----------------------------------------------------------------------------------------------------


def test_trees_come_back_as_they_were():
    given = {
        "a": [1, 2.5, (True, None, "x"), -0.0],
        1: torch.arange(3),
        "1": torch.zeros(0, dtype=torch.bfloat16),
        (2, "k"): {"nan": float("nan"), "inf": float("inf"), "scalar": np.float32(0.1), "big": 2**80},
        "tensor": {"tensor": "state.1"},
    }
    tensors, document = tree.flatten(given, "state")
    back = tree.unflatten(tensors, json.loads(json.dumps(document, allow_nan=False)))
    assert list(back) == list(given)
    assert back["a"] == given["a"] and isinstance(back["a"][2], tuple)
    assert torch.equal(back[1], given[1]) and back["1"].dtype == torch.bfloat16
    inner = back[(2, "k")]
    assert np.isnan(inner["nan"]) and inner["inf"] == float("inf")
    assert inner["scalar"] == float(np.float32(0.1)) and inner["big"] == 2**80
    assert back["tensor"] == {"tensor": "state.1"}
    with pytest.raises(TypeError, match=r"^x\.f\.0 must be made of dicts, lists, numbers and tensors, got type"):
        tree.flatten({"f": [int]}, "x")


@pytest.mark.parametrize(
    "document",
    [{}, {"tensor": "b"}, {"tensor": 1}, {"tensor": {}}, {"dict": [1]}, {"dict": 3}, {"list": None}, {"float": "1.0"},
     {"dict": [[{"list": []}, 1]]}, {"eval": "print"}, {"list": [], "dict": []}],
)  # fmt: skip
def test_documents_that_are_no_trees(document):
    with pytest.raises(ValueError, match="tree"):
        tree.unflatten({"a": torch.zeros(1)}, document)
