"""The file a retraining goes on from: weights, optimiser, schedule, random generators, loader positions, history.

It is written beside its name and renamed, so what a kill leaves is a whole file of some step, or none. Its format is
safetensors with one JSON document and a checksum; reading it executes nothing.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import signal
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..saving import safefile
from .tree import flatten, unflatten

FORMAT = "mtzip retraining checkpoint"
VERSION = 1
_REMEDY = "delete it to start anew, or give checkpoint= another path"


class Checkpoint:
    """One file of one call of :func:`mtzip.retrain`.

    Args:
        path: the file.
        every: steps between two writes.
        settings: what of the call must be the same when it goes on: name to what JSON can hold.
        start: :func:`fingerprint` of the network as the call got it.

    Raises:
        ValueError: the folder is not there.
    """

    def __init__(self, path: str | os.PathLike, every: int, settings: Mapping[str, Any], start: Mapping[str, Any]):
        self.path, self.every, self.settings, self.start = Path(path), every, dict(settings), dict(start)
        if not self.path.parent.is_dir() or self.path.is_dir():
            raise ValueError(f"checkpoint must be a file in a folder that exists, got {os.fspath(path)!r}")

    def write(self, state: Mapping[str, Any]) -> None:
        """Replaces the file.

        Raises:
            TypeError: a state of the user's optimiser or scheduler that is no numbers and tensors.
            OSError: it cannot be written.
        """
        tensors, tree = flatten(state, "state")
        document = {"format": FORMAT, "version": VERSION, "settings": self.settings, "start": self.start, "tree": tree}
        safefile.write(self.path, tensors, document)

    def read(self) -> dict[str, Any] | None:
        """What was written, None where there is no file.

        Raises:
            ValueError: damaged, another kind of file, or of another call.
            OSError: it cannot be read.
        """
        for part in self.path.parent.glob(f".{self.path.name}.{'[0-9a-f]' * 32}.part"):  # of runs that were killed
            shutil.rmtree(part, ignore_errors=True)
        if not self.path.exists():
            return None
        try:
            tensors, document = safefile.read(self.path)
            if document.get("format") != FORMAT or document.get("version") != VERSION:
                raise ValueError(f"it must be a {FORMAT} of version {VERSION}, got another file of this library")
            self._check_settings(document["settings"])
            self._check_start(document["start"])
            state = unflatten(tensors, document["tree"])
            if not isinstance(state, dict):
                raise ValueError("its state must be a dict")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise self.refused(error) from error
        return state

    def refused(self, why: Exception | str) -> ValueError:
        """The error for a file that cannot be used."""
        return ValueError(f"checkpoint {os.fspath(self.path)!r} cannot be resumed: {why}; {_REMEDY}")

    def _check_settings(self, found: Mapping[str, Any]) -> None:
        for name in (*self.settings, *found):
            wanted, got = self.settings.get(name), found.get(name)
            if wanted != got:
                raise ValueError(f"it was written by a call with {name}={got!r}, expected {wanted!r} as in this one")

    def _check_start(self, found: Mapping[str, Any]) -> None:
        for name in (*self.start, *found):
            ours, its = self.start.get(name), found.get(name)
            if ours is None or its is None or any(ours[key] != its[key] for key in ("shape", "type", "trained")):
                raise ValueError(f"it is of another network: {name} must be {ours}, got {its}")
            near = 1e-3 * max(1.0, abs(ours["norm"]))
            if not all(math.isclose(ours[key], its[key], rel_tol=0, abs_tol=near) for key in ("norm", "sum")):
                raise ValueError(f"it began with other weights: {name} must be {ours}, got {its}")


def fingerprint(network: nn.Module) -> dict[str, dict[str, Any]]:
    """Shape, type, norm and sum of every parameter: enough to tell another network, or another zip of the same.

    Compared loosely, since the same zip on another machine differs in its last bits.
    """

    def describe(tensor: Tensor) -> dict[str, Any]:
        values = tensor.detach().double()
        numbers = {"norm": float(values.norm()), "sum": float(values.sum())}
        what = {"shape": list(tensor.shape), "type": str(tensor.dtype), "trained": tensor.requires_grad}
        return what | numbers

    return {name: describe(parameter) for name, parameter in network.named_parameters()}


class Termination:
    """Notes a SIGTERM instead of dying of it at once; in the main thread, where Python lets handlers be set."""

    def __init__(self):
        self.requested = False
        self._before: Any = None

    @contextlib.contextmanager
    def noted(self) -> Iterator[Termination]:
        """While it lasts, SIGTERM only sets ``requested``."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        self._before = signal.getsignal(signal.SIGTERM)
        signal.signal(signal.SIGTERM, lambda *_: setattr(self, "requested", True))
        try:
            yield self
        finally:
            signal.signal(signal.SIGTERM, self._before if self._before is not None else signal.SIG_DFL)

    def obey(self) -> None:
        """Does what the signal would have done: the handler there was before, or SystemExit with status 143.

        A handler that returns, or an ignored signal, lets the run go on.
        """
        self.requested = False
        if callable(self._before):
            self._before(signal.SIGTERM, None)
        elif self._before != signal.SIG_IGN:
            raise SystemExit(128 + signal.SIGTERM)
