"""Files whose checksum is right and whose content is not."""

from __future__ import annotations

import json

import pytest
from handmade import zipped_pair
from saved import Parts, _file, assert_same, instances, refused, signed  # noqa: F401 (_file is a fixture)

from mtzip.saving.save import load


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


def test_a_file_from_before_orders_were_kept(file, tmp_path):
    parts = Parts(file)
    del parts.document["orders"]
    (tmp_path / "z").write_bytes(parts.bytes())
    assert load(tmp_path / "z", instances(zipped_pair())).orders == {}


@pytest.mark.parametrize(
    "orders",
    [{"a": {"conv": [0, 0]}}, {"a": {"conv": [1, 2]}}, {"a": {"conv": [-1, 0]}}, {"a": [0]}, {"c": {}}, [], None],
)
def test_orders_that_are_none(orders, file, tmp_path):
    parts = Parts(file)
    parts.document["orders"] = orders
    refused(parts.bytes(), tmp_path / "z", instances(zipped_pair()))
