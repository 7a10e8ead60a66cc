"""The bytes of a file: every type there and back, and an error for files that are foreign or damaged."""

from __future__ import annotations

import json
import pickle
import random
import re

import pytest
import torch
from handmade import zipped_pair
from saved import _file, instances, refused, signed  # noqa: F401 (_file is a fixture)

from mtzip.saving import safefile
from mtzip.saving.save import load


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"PK\x03\x04" + bytes(100),
        pickle.dumps({"weight": torch.zeros(3)}),
        bytes(1000),
        b"\xff" * 1000,
        (2).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (4).to_bytes(8, "little") + b"null" + bytes(8),
        (2**62).to_bytes(8, "little") + b"{}" + bytes(100),
        (50_000).to_bytes(8, "little") + b"[" * 50_000,
        (50_000).to_bytes(8, "little") + b'{"a":' * 10_000,
        (9).to_bytes(8, "little") + b'{"a":1e9}',
        (8).to_bytes(8, "little") + b'{"a":NaN',
        (12).to_bytes(8, "little") + b'{"a\xff\xfe":1}   ',
    ],
)
def test_foreign_files(content, tmp_path):
    (tmp_path / "z").write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "z"))):
        load(tmp_path / "z", instances(zipped_pair()))


def test_truncated_anywhere(file, tmp_path):
    data, networks = file.read_bytes(), instances(zipped_pair())
    header = 8 + int.from_bytes(data[:8], "little")
    ends = [*range(10), *range(10, len(data), 29), header - 1, header, header + 1, len(data) - 1]
    for end in ends:
        refused(data[:end], tmp_path / "z", networks)
    for extra in (b"\0", b" ", data):
        refused(data + extra, tmp_path / "z", networks)


def test_a_flipped_bit_anywhere(file, tmp_path):
    data, networks = bytearray(file.read_bytes()), instances(zipped_pair())
    rng = random.Random(0)
    for place in [*range(16), *(rng.randrange(len(data)) for _ in range(400))]:
        bit = 1 << rng.randrange(8)
        data[place] ^= bit
        refused(bytes(data), tmp_path / "z", networks)
        data[place] ^= bit


def test_swapped_cut_out_and_repeated_pieces(file, tmp_path):
    data, networks = file.read_bytes(), instances(zipped_pair())
    rng = random.Random(1)
    for _ in range(100):
        a, b, c = sorted(rng.randrange(len(data)) for _ in range(3))
        for changed in (data[:a] + data[b:], data[:b] + data[a:], data[:a] + data[b:c] + data[a:b] + data[c:]):
            if changed != data:
                refused(changed, tmp_path / "z", networks)


def test_bytes_of_bool_that_are_neither(tmp_path):
    safefile.write(tmp_path / "z", {"x": torch.tensor([True, False])}, {})
    data = (tmp_path / "z").read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    document = {**json.loads(header["__metadata__"]["mtzip"]), "sha256": "0" * 64}
    header["__metadata__"]["mtzip"] = json.dumps(document, separators=(",", ":"))
    (tmp_path / "z").write_bytes(signed(header, data[start:]))
    assert torch.equal(safefile.read(tmp_path / "z")[0]["x"], torch.tensor([True, False]))
    (tmp_path / "z").write_bytes(signed(header, b"\x02\x00"))
    with pytest.raises(ValueError, match="must have bytes 0 and 1"):
        safefile.read(tmp_path / "z")


@pytest.mark.parametrize("dtype", list(safefile._DTYPES.values()), ids=str)
def test_every_type_and_empty_and_strided_tensors(dtype, tmp_path):
    base = torch.arange(24).reshape(4, 6) % 2
    tensors = {
        "whole": base.to(dtype),
        "strided": base.to(dtype)[::2, 1::2],
        "turned": base.to(dtype).T,
        "scalar": torch.tensor(1).to(dtype),
        "empty": torch.empty(0, 3, dtype=dtype),
    }
    tensors["view"] = tensors["whole"].view(-1)[:5]
    safefile.write(tmp_path / "z", tensors, {"text": "é"})
    found, document = safefile.read(tmp_path / "z")
    assert document == {"text": "é"}
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name].float(), tensor.float()) if not dtype.is_complex else True
    with pytest.raises(TypeError, match="must be of a type safetensors files have"):
        safefile.write(tmp_path / "z", {"x": torch.zeros(1, dtype=torch.complex128)}, {})
