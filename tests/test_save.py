"""Files: the same network back, and a clear error for everything that is not one."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import pickle
import random
import re
from pathlib import Path

import pytest
import safetensors.torch
import torch
from handmade import BOTH, Small, images, share_layer, small, zipped_pair, zipped_three
from torch import nn

from mtzip import safefile
from mtzip.save import load, read_manifest, save
from mtzip.share import ZippedNetwork
from mtzip.zip import zip_networks

MADE = {"plain": lambda: zipped_pair(False), "scaled": zipped_pair, "three tasks": zipped_three}


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


# -- there and back --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_there_and_back(make, dtype, tmp_path):
    zipped = make().to(dtype)
    save(zipped, tmp_path / "z.safetensors")
    networks = instances(zipped)
    before = {task: copy.deepcopy(network.state_dict()) for task, network in networks.items()}
    loaded = load(tmp_path / "z.safetensors", networks)
    assert_same(loaded, zipped)
    assert loaded.originals is None
    assert loaded.parameter_count() == zipped.parameter_count()
    for task, network in networks.items():
        assert all(torch.equal(value, before[task][key]) for key, value in network.state_dict().items())
        assert type(network.conv) is nn.Conv2d
        assert loaded[task] is not network


def test_half_and_the_order_of_the_networks(tmp_path):
    zipped = zipped_pair().half()
    save(zipped, tmp_path / "z")
    assert_same(load(tmp_path / "z", dict(reversed(instances(zipped).items()))), zipped)


def test_a_loaded_network_is_one_to_train_save_and_extract_from(tmp_path):
    zipped = zipped_pair()
    save(zipped, tmp_path / "1")
    loaded = load(tmp_path / "1", instances(zipped))
    save(loaded, tmp_path / "2")
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    torch.testing.assert_close(loaded.extract("a")(images()), zipped["a"](images()))
    sum(output.sum() for output in loaded(images()).values()).backward()
    assert all(p.grad is not None for p in loaded.parameters())
    copy.deepcopy(loaded)
    pickle.loads(pickle.dumps(loaded))
    storages = {p.untyped_storage().data_ptr() for p in loaded.parameters()}
    assert len(storages) == len(list(loaded.parameters()))


def test_mode_and_frozen_parameters_are_the_instances(tmp_path):
    zipped = zipped_pair()
    save(zipped, tmp_path / "z")
    networks = instances(zipped)
    networks["a"].head.requires_grad_(False)
    networks["b"].train()
    loaded = load(tmp_path / "z", networks)
    assert not loaded["a"].training
    assert loaded["b"].training
    assert loaded.training
    frozen = [name for name, p in loaded.named_parameters() if not p.requires_grad]
    assert frozen == ["networks.a.head.weight", "networks.a.head.bias"]


def test_instances_on_the_meta_device(tmp_path):
    zipped = zipped_pair()
    save(zipped, tmp_path / "z")
    with torch.device("meta"):
        networks = {"a": Small(3), "b": Small(4)}
    assert_same(load(tmp_path / "z", networks), zipped)


def test_layers_used_twice_and_whole_networks_that_are_one_layer(tmp_path):
    def twice():
        tied, norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        return nn.Sequential(tied, norm, tied, norm, nn.Linear(4, 2))

    networks = {"a": twice(), "b": twice()}
    share_layer(networks, "0", [(BOTH, 3), ((0,), 1), ((1,), 1)], [(BOTH, 4)])
    zipped = ZippedNetwork(networks, None).eval()
    save(zipped, tmp_path / "z")
    manifest, tensors = read_manifest(tmp_path / "z")
    assert manifest.aliases
    assert not set(manifest.aliases) & set(tensors)
    loaded = load(tmp_path / "z", {"a": twice(), "b": twice()}).eval()
    x = torch.randn(3, 4)
    for task in zipped:
        assert torch.equal(loaded[task](x), zipped[task](x))
        assert loaded[task][0] is loaded[task][2]
    assert loaded.parameter_count() == zipped.parameter_count()

    holders = {task: nn.Sequential(nn.Linear(3, 2)) for task in "ab"}
    share_layer(holders, "0", [(BOTH, 2)], [(BOTH, 3)], "shared")
    save(ZippedNetwork({task: holder[0] for task, holder in holders.items()}, None), tmp_path / "z")
    loaded = load(tmp_path / "z", {task: nn.Linear(3, 2) for task in "ab"})
    assert loaded["a"].weight is loaded["b"].weight


def test_file_size_is_that_of_the_parameters(tmp_path):
    def lenet():
        return nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))

    networks = {"a": lenet(), "b": lenet()}
    share_layer(networks, "0", [(BOTH, 300)], [(BOTH, 784)], scaled=True)
    share_layer(networks, "2", [(BOTH, 100)], [(BOTH, 300)], scaled=True)
    zipped = ZippedNetwork(networks, zipped_pair().report)
    save(zipped, tmp_path / "z")
    assert 1 <= (tmp_path / "z").stat().st_size / (4 * zipped.parameter_count()) < 1.01


def test_any_safetensors_reader_gets_the_tensors_and_a_readable_manifest(file):
    zipped = zipped_pair()
    state = safetensors.torch.load_file(file)
    assert state.keys() == zipped.state_dict().keys()
    assert all(torch.equal(value, zipped.state_dict()[key]) for key, value in state.items())
    with safetensors.safe_open(file, "pt") as reader:
        document = json.loads(reader.metadata()["mtzip"])
    assert document["format"] == "mtzip"
    assert document["tasks"] == ["a", "b"]
    assert document["report"]["method"] == "refit"
    assert re.fullmatch("[0-9a-f]{64}", document["sha256"])


def test_read_manifest(file):
    manifest, tensors = read_manifest(file)
    assert manifest.tasks == ("a", "b")
    assert manifest.networks["a"].endswith("Small")
    assert manifest.report == zipped_pair().report
    assert manifest.layers["a"]["conv"] == ("Conv2d", zipped_pair()["a"].conv.layout)
    assert tensors.keys() == zipped_pair().state_dict().keys()


# -- writing ---------------------------------------------------------------------------------------------------


def test_save_replaces_the_file_whole_or_leaves_it(tmp_path, monkeypatch):
    path = tmp_path / "z.safetensors"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save(zipped_pair(), path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["z.safetensors"]
    assert path.read_bytes() == b"old"
    monkeypatch.undo()
    save(zipped_pair(), path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["z.safetensors"]
    load(path, instances(zipped_pair()))


def test_errors_of_save(tmp_path):
    with pytest.raises(TypeError, match="must be a ZippedNetwork, got Small"):
        save(small(), tmp_path / "z")
    with pytest.raises(OSError, match="cannot be written"):
        save(zipped_pair(), tmp_path / "missing" / "z")
    assert not list(tmp_path.iterdir())

    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"something": 1}

    with pytest.raises(TypeError, match=r"networks.a._extra_state must be a tensor, got dict"):
        save(ZippedNetwork({"a": Extra(2, 2)}, None), tmp_path / "z")


# -- files that cannot be read, and networks that do not fit ---------------------------------------------------


def test_what_cannot_be_read_is_an_oserror(tmp_path):
    networks = instances(zipped_pair())
    for path in (tmp_path / "missing", tmp_path, tmp_path / "missing" / "z"):
        with pytest.raises(OSError):
            load(path, networks)
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(OSError, match="must be a regular file"):
            load(path, networks)


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


def test_safetensors_of_others(tmp_path):
    for metadata in (None, {"format": "pt"}, {"mtzip": "{}"}, {"mtzip": "[]"}, {"mtzip": "?"}):
        safetensors.torch.save_file({"weight": torch.zeros(3)}, tmp_path / "z", metadata)
        with pytest.raises(ValueError):
            load(tmp_path / "z", instances(zipped_pair()))


def test_loading_executes_nothing(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    torch.save(Bomb(), tmp_path / "z")
    with pytest.raises(ValueError):
        load(tmp_path / "z", instances(zipped_pair()))
    assert not (tmp_path / "exploded").exists()


class Other(nn.Module):
    def __init__(self, conv=None, hidden=None):
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3, padding=1) if conv is None else conv
        self.norm = nn.BatchNorm2d(6)
        self.hidden = nn.Linear(24, 5) if hidden is None else hidden
        self.head = nn.Linear(5, 3)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (Small(3, width=7), "layer 'conv' of task 'a' must have 6 outputs and 2 inputs as in the file, got 7 outputs"),
        (Small(3, hidden=9), "layer 'hidden' of task 'a' must have 5 outputs and 24 inputs.*got 9 outputs and 24"),
        (Small(5), r"networks.a.head.weight must be torch.float32 \[3, 5\] as in the file, got torch.float32 \[5, 5\]"),
        (nn.Linear(2, 2), "layer 'conv' of task 'a' must be an nn.Conv2d as in the file, got none"),
        (Other(conv=nn.Linear(2, 6)), "layer 'conv' of task 'a' must be an nn.Conv2d as in the file, got Linear"),
        (
            Other(conv=nn.Conv2d(2, 6, 5)),
            r"conv.weight_rows_0_1_columns_0_1 must be \[4, 2, 3, 3\] as in the file, got \[4, 2, 5",
        ),
        (zipped_pair()["a"], "got SharedConv2d"),
        (nn.Sequential(small()), "must be an nn.Conv2d as in the file, got none"),
    ],
)
def test_networks_of_another_architecture(file, network, message):
    with pytest.raises(ValueError, match=message):
        load(file, {"a": network, "b": small(4)})


def test_more_or_fewer_layers_than_the_file_has(file):
    more, fewer = small(3), small(3)
    more.extra = nn.Linear(2, 2)
    fewer.norm = nn.Identity()
    with pytest.raises(ValueError, match=r"got none for \['networks.a.extra.weight'"):
        load(file, {"a": more, "b": small(4)})
    with pytest.raises(ValueError, match=r"unknown \['networks.a.norm"):
        load(file, {"a": fewer, "b": small(4)})


def test_other_tasks(file):
    with pytest.raises(ValueError, match=r"the tasks of the file, \['a', 'b'\], got \['a'\]"):
        load(file, {"a": small()})
    with pytest.raises(TypeError, match=r"networks\['b'\] must be an nn.Module, got type"):
        load(file, {"a": small(), "b": Small})
    with pytest.raises(TypeError, match="must map every task to a network, got list"):
        load(file, [small()])


# -- damaged files ---------------------------------------------------------------------------------------------


def refused(data: bytes, path: Path, networks: dict[str, nn.Module]) -> None:
    path.write_bytes(data)
    with pytest.raises(ValueError):
        load(path, networks)


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


# -- files whose checksum is right and whose content is not ----------------------------------------------------


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


def test_signing_is_what_save_does(file, tmp_path):
    (tmp_path / "z").write_bytes(Parts(file).bytes())
    assert_same(load(tmp_path / "z", instances(zipped_pair())), zipped_pair())


def rename(parts: Parts, old: str, new: str) -> None:
    parts.header[new] = parts.header.pop(old)


BLOCK = "shared.conv.weight_rows_0_1_columns_0_1"


def _overlap(p):
    p.header["networks.a.head.weight"]["data_offsets"] = p.header["networks.a.hidden.scale"]["data_offsets"]


def _gap(p):
    p.tensors += bytes(8)
    last = max(p.header.values(), key=lambda e: e.get("data_offsets", [0, 0])[1])
    last["data_offsets"] = [offset + 8 for offset in last["data_offsets"]]


def _swap(p):
    a, b = p.header["networks.a.norm.weight"], p.header[BLOCK]
    p.header["networks.a.norm.weight"], p.header[BLOCK] = b, a


def _layers(p, task="a"):
    return p.document["layers"][task]


def _layout(p, path="conv"):
    return _layers(p)[path]["layout"]


CHANGES = {
    "overlap": _overlap,
    "gap": _gap,
    "swapped tensors": _swap,
    "bytes behind": lambda p: setattr(p, "tensors", p.tensors + bytes(4)),
    "bytes missing": lambda p: setattr(p, "tensors", p.tensors[:-4]),
    "tensor missing": lambda p: p.header.pop(BLOCK),
    "tensor renamed": lambda p: rename(p, BLOCK, "shared.other"),
    "path trick": lambda p: rename(p, BLOCK, "../../etc/passwd"),
    "spare tensor": lambda p: p.header.update(x={"dtype": "F32", "shape": [0], "data_offsets": [len(p.tensors)] * 2}),
    "huge empty": lambda p: p.header.update(
        x={"dtype": "F32", "shape": [0, 2**62, 2**62], "data_offsets": [len(p.tensors)] * 2}
    ),
    "many dimensions": lambda p: p.header[BLOCK].update(shape=[1] * 100 + p.header[BLOCK]["shape"]),
    "reshaped": lambda p: p.header[BLOCK].update(shape=[2, 4, 3, 3]),
    "other type": lambda p: p.header[BLOCK].update(dtype="I32"),
    "unknown type": lambda p: p.header[BLOCK].update(dtype="F31"),
    "type a list": lambda p: p.header[BLOCK].update(dtype=["F32"]),
    "negative shape": lambda p: p.header[BLOCK].update(shape=[-4, -2, 3, 3]),
    "shape of bools": lambda p: p.header["networks.a.norm.num_batches_tracked"].update(shape=[True]),
    "negative offset": lambda p: p.header[BLOCK].update(data_offsets=[-8, 280]),
    "offsets reversed": lambda p: p.header[BLOCK]["data_offsets"].reverse(),
    "offsets a text": lambda p: p.header[BLOCK].update(data_offsets="01"),
    "entry a list": lambda p: p.header.update({BLOCK: [1, 2]}),
    "entry with more": lambda p: p.header[BLOCK].update(code="print(1)"),
    "other format": lambda p: p.document.update(format="zip"),
    "newer version": lambda p: p.document.update(version=2),
    "version true": lambda p: p.document.update(version=True),
    "unknown field": lambda p: p.document.update(code="print(1)"),
    "field missing": lambda p: p.document.pop("tasks"),
    "tasks swapped": lambda p: p.document["tasks"].reverse(),
    "task twice": lambda p: p.document.update(tasks=["a", "a"]),
    "no tasks": lambda p: p.document.update(tasks=[]),
    "layer missing": lambda p: _layers(p).pop("conv"),
    "no layers": lambda p: p.document.update(layers={"a": {}, "b": {}}),
    "unknown layer": lambda p: _layers(p).update(other=_layers(p)["conv"]),
    "a layer that is a class": lambda p: _layers(p).update(__class__=_layers(p)["conv"]),
    "a layer that is a method": lambda p: _layers(p).update({"conv.forward": _layers(p)["conv"]}),
    "the root for a layer": lambda p: _layers(p).update({"": _layers(p)["conv"]}),
    "other class": lambda p: _layers(p)["conv"].update({"class": "Linear"}),
    "a class of os": lambda p: _layers(p)["conv"].update({"class": "os.system"}),
    "other task": lambda p: _layout(p).update(task=1),
    "task 2 of 2": lambda p: _layout(p).update(rows=[[[0, 2], 4], [[0], 2]]),
    "rows too many": lambda p: _layout(p).update(rows=[[[0, 1], 4], [[0], 3]]),
    "rows beyond all": lambda p: _layout(p).update(rows=[[[0, 1], 2**62], [[0], 2**62]]),
    "rows of another": lambda p: _layout(p).update(rows=[[[0, 1], 4], [[1], 2]]),
    "rows twice": lambda p: _layout(p).update(rows=[[[0, 1], 2], [[0, 1], 2], [[0], 2]]),
    "rows empty": lambda p: _layout(p).update(rows=[[[0, 1], 6], [[0], 0]]),
    "rows all shared": lambda p: _layout(p).update(rows=[[[0, 1], 6]]),
    "rows all private": lambda p: _layout(p).update(rows=[[[0], 6]]),
    "rows of nobody": lambda p: _layout(p).update(rows=[[[], 6]]),
    "no rows": lambda p: _layout(p).update(rows=[]),
    "columns too many": lambda p: _layout(p).update(columns=[[[0, 1], 3]]),
    "columns private": lambda p: _layout(p).update(columns=[[[0], 2]]),
    "no bias": lambda p: _layout(p).update(bias=None),
    "bias too long": lambda p: _layout(p).update(bias=[[[0], 7]]),
    "bias shared": lambda p: _layout(p).update(bias=[[[0, 1], 6]]),
    "scaled": lambda p: _layout(p).update(scaled=4),
    "not scaled": lambda p: _layout(p, "hidden").update(scaled=0),
    "scaled too much": lambda p: _layout(p, "hidden").update(scaled=6),
    "layout with more": lambda p: _layout(p).update(heads=4),
    "nothing shared": lambda p: p.document.update(shared={}),
    "shared by one": lambda p: p.document["shared"][BLOCK].pop(),
    "shared by nobody": lambda p: p.document["shared"][BLOCK].clear(),
    "shared with a buffer": lambda p: p.document["shared"][BLOCK].append("networks.b.norm.running_mean"),
    "shared with another": lambda p: p.document["shared"][BLOCK].append("networks.b.norm.weight"),
    "shared with what is not there": lambda p: p.document["shared"][BLOCK].append("networks.b.__class__"),
    "private shared": lambda p: p.document["shared"].update(x=["networks.a.norm.weight", "networks.b.norm.weight"]),
    "shared under another key": lambda p: p.document["shared"].update(x=p.document["shared"].pop(BLOCK)),
    "alias of a stored tensor": lambda p: p.document["aliases"].update({BLOCK: "networks.a.head.bias"}),
    "alias of nothing": lambda p: p.document["aliases"].update({"networks.a.x": "networks.a.y"}),
    "alias that is not there": lambda p: p.document["aliases"].update({"networks.a.x": BLOCK}),
    "report a list": lambda p: p.document.update(report=[]),
    "report without axes": lambda p: p.document["report"].pop("axes"),
    "report with text for a number": lambda p: p.document["report"].update(parameters_before="1"),
    "document a list": lambda p: setattr(p, "document", []),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_inconsistent_content_under_a_right_checksum(change, file, tmp_path):
    parts = Parts(file)
    change(parts)
    refused(parts.bytes(), tmp_path / "z", instances(zipped_pair()))


def test_keys_that_come_twice_and_numbers_json_does_not_have(file, tmp_path):
    parts, networks = Parts(file), instances(zipped_pair())
    header = json.dumps({**parts.header, "__metadata__": {"mtzip": json.dumps({**parts.document, "sha256": "0" * 64})}})
    entry = json.dumps(parts.header[BLOCK])
    for changed in (
        header[:-1] + f', "{BLOCK}": {entry}}}',
        header.replace(r"\"version\": 1", r"\"version\": 1, \"version\": 1", 1),
        header.replace(r"\"version\": 1", r"\"version\": NaN", 1),
        header.replace(r"\"version\": 1", r"\"version\": " + "9" * 5000, 1),
        header.replace(r"\"parameters_before\": 545", r"\"parameters_before\": Infinity", 1),
        header.replace(r"\"parameters_before\": 545", r"\"parameters_before\": 1e999", 1),
    ):
        assert changed != header
        refused(signed(changed.replace(r"\"sha256\": \"", r"\"sha256\":\""), parts.tensors), tmp_path / "z", networks)


def test_random_changes_of_the_documents_give_an_error_or_the_right_network(file, tmp_path):
    """Whatever is put in place of any value: ValueError, or a network that computes what the one saved does."""
    rng = random.Random(2)
    values = [
        None,
        True,
        -1,
        0,
        1,
        3,
        2**70,
        0.5,
        1e308,
        "",
        "a",
        "0",
        [],
        {},
        [[]],
        [[0], 1],
        {"a": 1},
        "\ud800",
        "../x",
    ]
    networks, x = instances(zipped_pair()), images(count=2)
    expected = {task: output for task, output in zipped_pair()(x).items()}
    loaded = 0
    for _ in range(500):
        parts = Parts(file)
        holder, key = rng.choice(list(_places(rng.choice([parts.document, parts.header]))))
        if isinstance(holder, list) or rng.random() < 0.8:
            holder[key] = rng.choice(values)
        else:
            holder.pop(key) if rng.random() < 0.5 else holder.update({rng.choice(["x", "a", ""]): holder.pop(key)})
        (tmp_path / "z").write_bytes(parts.bytes())
        try:
            result = load(tmp_path / "z", networks)
        except ValueError:
            continue
        loaded += 1
        with torch.no_grad():
            assert all(torch.equal(result[task](x), output) for task, output in expected.items())
    assert 0 < loaded < 400  # names in the report and the like may change


def _places(value):
    """Every (holder, key) below a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield value, key
        yield from _places(item)


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


# -- after a real zip ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "share"), [("refit", 0.0), ("refit", 0.5), ("mtz", 0.5), ("average", 1.0)])
def test_a_zip_comes_back(method, share, tmp_path):
    networks = {"a": small(3, 0), "b": small(4, 1, width=8)}
    zipped = zip_networks(networks, {"a": images(0, 64), "b": images(1, 64)}, share=share, method=method)
    save(zipped, tmp_path / "z")
    assert_same(load(tmp_path / "z", {"a": small(3, 5), "b": small(4, 6, width=8)}), zipped)
    assert str(read_manifest(tmp_path / "z")[0].report) == str(zipped.report)
