"""A saved network, taken apart and put together again: what the tests of files start from."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from handmade import images, small, zipped_pair
from torch import nn

from mtzip.network.zipped import ZippedNetwork
from mtzip.saving.save import load, save


def instances(zipped: ZippedNetwork) -> dict[str, nn.Module]:
    """Fresh networks of the user's class, of other weights."""
    return {task: small(zipped[task].head.out_features, 7 + i) for i, task in enumerate(zipped)}


def assert_same(got: ZippedNetwork, expected: ZippedNetwork) -> None:
    assert got.tasks == expected.tasks
    assert got.shared_keys() == expected.shared_keys()
    assert got.layouts() == expected.layouts()
    assert got.report == expected.report
    state, other = got.state_dict(), expected.state_dict()
    assert state.keys() == other.keys()
    for key, value in state.items():
        assert value.dtype == other[key].dtype, key
        assert torch.equal(value, other[key]), key
    x = images(dtype=next(expected.parameters()).dtype)
    with torch.no_grad():
        for task, output in expected.eval()(x).items():
            assert torch.equal(got.eval()[task](x), output)


@pytest.fixture(scope="module", name="file")
def _file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("file") / "zipped.safetensors"
    save(zipped_pair(), path)
    return path


def refused(data: bytes, path: Path, networks: dict[str, nn.Module]) -> None:
    path.write_bytes(data)
    with pytest.raises(ValueError):
        load(path, networks)


class Parts:
    """A file taken apart, to be changed and put together again with the right checksum."""

    def __init__(self, path: Path):
        data = path.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        self.header = json.loads(data[8:start])
        self.document = json.loads(self.header["__metadata__"]["mtzip"])
        self.tensors = data[start:]

    def bytes(self) -> bytes:
        document = {**self.document, "sha256": "0" * 64} if isinstance(self.document, dict) else self.document
        return signed(
            {**self.header, "__metadata__": {"mtzip": json.dumps(document, separators=(",", ":"))}}, self.tensors
        )


def signed(header: dict | str, tensors: bytes) -> bytes:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    data = len(text).to_bytes(8, "little") + text + tensors
    return data.replace(b"0" * 64, hashlib.sha256(data).hexdigest().encode(), 1)
