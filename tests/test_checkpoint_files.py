"""Retraining takes nothing but its own checkpoint, and says why."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch
from handmade import zipped_pair
from retraining import Killed, assert_same, inputs, weights_of, with_dropout

import mtzip
from mtzip.retraining import tree
from mtzip.retraining.retrain import retrain
from mtzip.saving import safefile

# -- files that are refused ------------------------------------------------------------------------------------


def written(tmp_path, **arguments):
    """A checkpoint of the pair, and the arguments of the call."""
    path = tmp_path / "run.ckpt"
    arguments = {"loaders": inputs(22), "steps": 4, "checkpoint": path} | arguments
    retrain(with_dropout(), **arguments)
    return path, arguments


def refused(arguments, message: str, zipped=None) -> None:
    """The call fails with this message and a remedy, and changes nothing."""
    zipped = zipped or with_dropout()
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
    frozen = with_dropout()
    frozen["a"].head.requires_grad_(False)
    refused(arguments, "it is of another network: networks.a.head.1.weight must be", frozen)
    other = with_dropout()
    with torch.no_grad():
        other["a"].hidden.bias.add_(0.1)
    refused(arguments, "it began with other weights: networks.a.hidden.bias", other)
    refused(arguments, "it is of another network: networks.a.conv", zipped_pair().double())


def test_the_same_zip_with_other_last_bits_goes_on(tmp_path):
    _, arguments = written(tmp_path)
    near = with_dropout()
    with torch.no_grad():
        for parameter in near.parameters():
            parameter.mul_(1 + 1e-6)
    assert len(retrain(near, **arguments)) == 4


def test_files_of_other_kinds_are_refused(tmp_path):
    path, arguments = written(tmp_path)
    mtzip.save(zipped_pair(), path)
    refused(arguments, "got another file of this library")
    torch.save(weights_of(with_dropout()), path)
    refused(arguments, "")
    path.write_bytes(b"")
    refused(arguments, "")
    with pytest.raises(ValueError, match="must be a file in a folder that exists"):
        retrain(with_dropout(), **arguments | {"checkpoint": tmp_path / "nowhere/run.ckpt"})
    with pytest.raises(ValueError, match="must be a file in a folder that exists"):
        retrain(with_dropout(), **arguments | {"checkpoint": tmp_path})


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
        zipped = with_dropout()
        before = weights_of(zipped)
        try:
            retrain(zipped, **arguments)  # what was changed may not matter, a time say
        except ValueError as error:
            assert "cannot be resumed" in str(error)
            assert_same(weights_of(zipped), before)


def test_a_loader_that_has_become_shorter_is_refused(tmp_path):
    path = tmp_path / "run.ckpt"

    def make(count):
        return {t: list(x.split(4)) for t, x in inputs(count).items()}

    def log(step, _):
        if step == 4:
            raise Killed

    with pytest.raises(Killed):
        retrain(with_dropout(), make(24), 10, checkpoint=path, checkpoint_every=3, log=log)
    arguments = {"loaders": make(8), "steps": 10, "checkpoint": path, "checkpoint_every": 3}
    refused(arguments, r"loaders\['a'\] must give the batches it gave before, at least 3 a round, got 2")


def test_an_optimizer_whose_state_is_no_numbers_is_named(tmp_path):
    class Odd(torch.optim.SGD):
        def state_dict(self):
            return {**super().state_dict(), "callback": print}

    with pytest.raises(
        TypeError, match=r"state\.optimizer\.callback must be made of dicts, lists, numbers and tensors"
    ):
        retrain(with_dropout(), inputs(8), 2, checkpoint=tmp_path / "c", optimizer=lambda p: Odd(p, 0.1))


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
