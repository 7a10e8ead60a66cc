"""Values over all calibration chunks, those that memory has no room for on disk.

A chunk that is on disk is read whenever it is asked for and let go of again: a layer goes over the chunks in turn, so
one of them is in memory at a time. It comes back bit for bit, strides included.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

#: Bytes of values that are let go of before memory is handed back to the system.
HANDED_BACK = 2**30


class Store:
    """Where values are kept: in memory up to a limit, in a temporary folder beyond it.

    A context manager: the folder is gone after it, whatever happened.

    Args:
        limit: bytes of values in memory; None for no limit.
    """

    def __init__(self, limit: int | None = None):
        self.limit = limit
        #: Bytes written to disk so far.
        self.spilled = 0
        #: Bytes of values in memory, now and at most.
        self.resident = self.peak = 0
        self._held = 0  # most that were in memory since memory was handed back
        self._storages: dict[int, int] = {}  # address to how many chunks lie in it
        self._values: weakref.WeakSet[Values] = weakref.WeakSet()
        self._folder: str | None = None
        self._files = 0

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: Any) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def write(self, value: Any) -> _OnDisk:
        """Puts a chunk's value on disk.

        Raises:
            OSError: the disk is full.
        """
        if self._folder is None:
            self._folder = tempfile.mkdtemp(prefix="mtzip-")
        self._files += 1
        path = os.path.join(self._folder, f"{self._files}.pt")
        try:
            torch.save(pytree.tree_map(_of_its_own, value), path)
        except (OSError, RuntimeError) as error:  # torch's writer says RuntimeError of a full disk
            raise OSError(
                f"calibration activations cannot be written to {self._folder}: {error}; set TMPDIR to a folder with "
                "more room, or give fewer samples or more memory"
            ) from error
        self.spilled += os.path.getsize(path)
        return _OnDisk(path)

    def count(self, value: Any, by: int) -> None:
        """Counts a chunk's value as in memory (``by=1``) or no longer (-1); what shares memory counts once."""
        for leaf in pytree.tree_leaves(value):
            if not isinstance(leaf, Tensor) or leaf.layout is not torch.strided:
                continue
            storage = leaf.untyped_storage()
            before = self._storages.get(storage.data_ptr(), 0)
            now = before + by
            if now:
                self._storages[storage.data_ptr()] = now
            else:
                self._storages.pop(storage.data_ptr(), None)
            self.resident += storage.nbytes() * ((now > 0) - (before > 0))
        self.peak, self._held = max(self.peak, self.resident), max(self._held, self.resident)
        if self._held - self.resident > HANDED_BACK:
            self._held = self.resident
            hand_back()

    def register(self, values: Values) -> None:
        """Takes values into account from here on."""
        self._values.add(values)

    def make_room(self) -> None:
        """Puts chunks on disk until the rest is within the limit: of the values that are needed longest, the last."""
        if self.limit is None or self.resident <= self.limit:
            return
        for values in sorted(self._values, key=lambda values: (-values.until, values.at)):
            while self.resident > self.limit and values.spill_one():
                pass


class Values(Sequence):
    """The values of one node, a chunk each.

    Args:
        store: that keeps them.
        until: position of the last node that reads them; what is needed longest goes to disk first.
        chunks: how many there are.
        bring: of a method that is called with a chunk that is asked for and not there yet; it puts it there.
    """

    _made = 0

    def __init__(self, store: Store, until: int, chunks: int, bring: weakref.WeakMethod | None = None):
        Values._made += 1
        self.at, self.until, self._store, self._bring = Values._made, until, store, bring
        self._items: list[Any] = [None] * chunks
        store.register(self)

    def put(self, index: int, value: Any) -> None:
        """Keeps a chunk's value."""
        self._items[index] = value
        self._store.count(value, 1)
        self._store.make_room()

    def spill_one(self) -> bool:
        """Puts the last chunk that is in memory on disk; False if there is none."""
        for index in reversed(range(len(self._items))):
            value = self._items[index]
            if not isinstance(value, _OnDisk) and any(isinstance(x, Tensor) for x in pytree.tree_leaves(value)):
                self._items[index] = self._store.write(value)
                self._store.count(value, -1)
                return True
        return False

    def drop(self, index: int) -> None:
        """Lets go of one chunk's value, if it is there: nobody reads it any more."""
        item, self._items[index] = self._items[index], None
        self._let_go(item)

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        if self._items[index] is None and self._bring is not None:
            self._bring()(index)
        item = self._items[index]
        if item is None:
            raise LookupError(f"the value of chunk {index} is no longer kept")
        return item.read() if isinstance(item, _OnDisk) else item

    def __del__(self) -> None:
        for item in self._items:
            self._let_go(item)

    def _let_go(self, item: Any) -> None:
        if isinstance(item, _OnDisk):
            item.remove()
        elif item is not None:
            self._store.count(item, -1)


def hand_back() -> None:
    """Hands memory that was let go of back to the system, where the C library has a way to.

    glibc keeps blocks of up to 32 MB for itself, in pieces: 6 GB after the middle layers of VGG-16 at 224 x 224, which
    the linear layers behind them cannot use.
    """
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return
    trim(0)


class _OnDisk:
    """A chunk's value in a file."""

    def __init__(self, path: str):
        self._path = path

    def read(self) -> Any:
        return torch.load(self._path, weights_only=True)

    def remove(self) -> None:
        try:
            os.remove(self._path)
        except OSError:  # the folder is gone already
            pass


def _of_its_own(leaf: Any) -> Any:
    """A tensor in memory of its own: of a view, torch.save would write all that it is a view of."""
    if isinstance(leaf, Tensor) and leaf.untyped_storage().nbytes() > leaf.nbytes:
        return leaf.clone()
    return leaf
