"""A few hundred malformed files of the thousands of ``python -m bench fuzz``; and its watch sees what it is for."""

from __future__ import annotations

import os
import subprocess
import time

import pytest
import torch

import mtzip
from bench import fuzz


def test_malformed_files_give_an_error_or_the_right_network(tmp_path):
    found = list(fuzz.attempts(400, 7_000_000, tmp_path))
    assert [case for case in found if case[2] not in ("refused", "right")] == []
    assert {kind for kind, _, _ in found} == set(fuzz.KINDS)
    assert {outcome for _, _, outcome in found} == {"refused", "right"}


@pytest.fixture(scope="module", name="fuzzer")
def _fuzzer(tmp_path_factory) -> fuzz.Fuzzer:
    made = fuzz.Fuzzer(tmp_path_factory.mktemp("fuzz"))
    made.attempt(made.data)
    return made


def wrong_network(path, networks):
    zipped = fuzz_load(path, networks)
    with torch.no_grad():
        next(zipped.parameters()).add_(1e-6)
    return zipped


fuzz_load = mtzip.load
FAULTS = {
    "another exception": (lambda path, networks: {}["x"], "KeyError: 'x'"),
    "too much memory": (lambda path, networks: torch.empty(2**34), "RuntimeError"),
    "too long": (lambda path, networks: time.sleep(60), "more than"),
    "other weights": (wrong_network, "another network"),
    "a process": (lambda path, networks: subprocess.run(["true"], check=True), "executed"),
    "code": (lambda path, networks: eval("1 + 1"), "executed"),
    "another file": (lambda path, networks: open(os.devnull).close(), "executed open"),
    "a folder, then an error": (lambda path, networks: os.mkdir("/missing/x"), "executed os.mkdir"),
}


@pytest.mark.parametrize(("load", "outcome"), FAULTS.values(), ids=FAULTS)
def test_the_watch_sees_what_must_not_happen(load, outcome, fuzzer, monkeypatch):
    monkeypatch.setattr(mtzip, "load", load)
    monkeypatch.setattr(fuzz, "SECONDS", 1)
    assert fuzzer.attempt(fuzzer.data).startswith(outcome)


def test_limits_are_lifted_afterwards(fuzzer):
    import resource
    import signal

    before = resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGALRM)
    assert fuzzer.attempt(fuzzer.data) == "right"
    assert (resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGALRM)) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
