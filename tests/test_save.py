"""Files: the same network back, and a clear error for networks that are not the ones saved."""

from __future__ import annotations

import copy
import json
import os
import pickle
import re

import pytest
import safetensors.torch
import torch
from handmade import BOTH, Small, images, share_layer, small, zipped_pair, zipped_three
from saved import _file, assert_same, instances  # noqa: F401 (_file is a fixture)
from torch import nn

from mtzip.network.zipped import ZippedNetwork
from mtzip.saving.save import load, read_manifest, save
from mtzip.zip import zip_networks

MADE = {"plain": lambda: zipped_pair(False), "scaled": zipped_pair, "three tasks": zipped_three}


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


# -- after a real zip ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "share"), [("refit", 0.0), ("refit", 0.5), ("mtz", 0.5), ("average", 1.0)])
def test_a_zip_comes_back(method, share, tmp_path):
    networks = {"a": small(3, 0), "b": small(4, 1, width=8)}
    zipped = zip_networks(networks, {"a": images(0, 64), "b": images(1, 64)}, share=share, method=method)
    save(zipped, tmp_path / "z")
    assert_same(load(tmp_path / "z", {"a": small(3, 5), "b": small(4, 6, width=8)}), zipped)
    assert str(read_manifest(tmp_path / "z")[0].report) == str(zipped.report)
