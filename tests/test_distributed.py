"""Two processes on one machine: the results of one process with the same data, and a message where one is gone."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import distributed_work as work
import pytest
import torch
import torch.distributed as dist
from handmade import zipped_pair
from retraining import assert_same

from mtzip.distributed import Ranks

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs torch's gloo")

ROOT = Path(__file__).parent.parent


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def started(what: str, folder: Path) -> list[subprocess.Popen]:
    """Two processes at distributed_work, with the environment torchrun would give them."""
    common = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tests/distributed_work.py"), what, str(folder)]
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    return [
        subprocess.Popen(command, env={**os.environ, **common, **rank}, stderr=subprocess.PIPE, cwd=ROOT)
        for rank in ranks
    ]


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict]:
    """What both processes have found."""
    folder = tmp_path_factory.mktemp("ranks")
    for process in started("everything", folder):
        error = process.communicate(timeout=240)[1].decode()
        assert process.returncode == 0, error[-3000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def assert_near(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value, rtol=1e-5, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")


ZIPS = {f"zip {name}": (name, {}) for name in work.ZIPPED} | {
    "zip by activation": ("residual", {"matching": "activation", "reconstructions": 1}),
    "zip mtz": ("mlp", {"method": "mtz", "share": 0.5}),
    "zip following": ("residual", {"follow": {"b": "a"}}),
}


@pytest.mark.parametrize("name", ZIPS)
def test_zips_are_the_same_bits_and_those_of_one_process(found, name):
    assert_same(found[0][name], found[1][name])
    case, arguments = ZIPS[name]
    assert_near(found[0][name], work.zipped_together(case, 0, 1, **arguments))


def test_a_part_of_the_data_alone_gives_another_zip():
    """What the test above would see if nothing was summed up."""
    half, whole = work.zipped_together("mlp", 0, 2), work.zipped_together("mlp", 0, 1)
    assert (half["outputs of a"] - whole["outputs of a"]).abs().max() > 0.01


@pytest.mark.parametrize("error", work.BUDGETS)
def test_a_budget_of_error_is_measured_on_the_inputs_of_all(found, error):
    assert_same(found[0]["budget"][error], found[1]["budget"][error])
    expected = work.within_budget(0, 1, error)
    assert_near(found[0]["budget"][error], expected)
    assert work.within_budget(1, 2, error)["stored"] != expected["stored"]  # what its own inputs alone would choose


def test_processes_with_different_networks_or_arguments_are_refused(found):
    for rank in range(2):
        weights, arguments = found[rank]["refused"]
        assert "got different weights; load the same weights everywhere" in weights
        assert "got different arguments" in arguments


@pytest.mark.parametrize("name", ["retrained", "features", "ddp", "ddp static", "fsdp", "resumed"])
def test_every_process_has_the_same_bits(found, name):
    assert_same(found[0][name], found[1][name])


@pytest.mark.parametrize(("name", "arguments"), [("retrained", {}), ("features", {"distill": "both"})])
def test_retraining_equals_one_process_with_all_the_data(found, name, arguments):
    expected = work.retrained(0, 1, **arguments)
    assert_near(found[0][name], expected)
    before = zipped_pair().state_dict()
    assert sum(not torch.equal(before[key], value) for key, value in expected.items()) > 8


@pytest.mark.parametrize("name", ["ddp", "ddp static", "fsdp"])
def test_wrapped_networks_train_as_one_process_does(found, name):
    zipped = zipped_pair()
    work.looped(zipped, zipped, 0, 1)
    assert_near(found[0][name], dict(zipped.state_dict()))


def test_both_go_on_from_one_checkpoint(found):
    assert_same(found[0]["resumed"], found[0]["uninterrupted"])


def test_one_process_may_work_by_itself(found):
    for rank in range(2):
        assert_same(found[rank]["alone"], work.retrained(0, 1))
        assert_same(found[rank]["zip alone"], work.zipped_together("mlp", 0, 1))


def test_a_number_that_is_none_stops_all(found):
    for rank, remedy in enumerate(("lower the learning rate", "the batch holds NaN or Inf: clean the data")):
        assert found[rank]["failed"].startswith("step 1, task 'b': the loss is nan; " + remedy)


def test_scores_are_averaged_so_that_all_decide_alike(found):
    for rank in range(2):
        assert [validation.scores for validation in found[rank]["validated"]] == [{"score": 0.5}] * 3


@pytest.mark.parametrize("what", ["dies", "hangs"])
def test_a_lost_process_ends_the_other_with_a_message(what, tmp_path):
    first, second = started(what, tmp_path)
    begin = time.perf_counter()
    try:
        error = first.communicate(timeout=90)[1].decode()
    finally:
        first.kill()
        second.kill()
        second.communicate()
    assert time.perf_counter() - begin < 60  # not the minutes of a default timeout
    assert first.returncode == 1
    message = "rank 0 of 2 cannot go on with the gradients of a step: another process has ended, hangs, or does not"
    assert message in error


def test_one_process_has_nobody_to_talk_to():
    ranks = Ranks()
    assert ranks.alone and (ranks.rank, ranks.size) == (0, 1)
    x = torch.ones(3)
    ranks.sum_([x], "x")
    ranks.mean_([x], "x")
    ranks.take_([x], "x")
    assert torch.equal(x, torch.ones(3))
    assert ranks.means({"a": 2.0}, "x") == {"a": 2.0}
    assert ranks.gathered(3, "x") == [3] and ranks.of_first(3, "x") == 3
    with pytest.raises(ValueError, match="distributed=True needs a process group, got none"):
        Ranks(True)
    with pytest.raises(ValueError, match="must be None, True or False, got 'yes'"):
        Ranks("yes")
