"""``memory=``: activations that do not fit go to disk and come back bit for bit, and nothing is left behind."""

from __future__ import annotations

import copy
import gc
import os
import platform
import weakref
from pathlib import Path

import pytest
import torch
from nets import IMAGE, Branches, Functional, Residual, analysed, mlp, noise, seeded
from torch import nn

import mtzip
from mtzip import memory as accounts
from mtzip.inputs import as_batch
from mtzip.merging import spill, sweep
from mtzip.merging.execute import Execution
from mtzip.merging.spill import Store, Values
from mtzip.prepare import prepare
from mtzip.trace.analysis import Layer

X = {"a": noise(300, *IMAGE), "b": noise(300, *IMAGE, seed=1)}


def pair(make) -> dict[str, nn.Module]:
    return {task: seeded(make, at) for at, task in enumerate("ab")}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where temporary files go, and nothing else."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def small_chunks(monkeypatch):
    """Many chunks, so that there is something to put away: 64 kB of the largest value."""
    monkeypatch.setattr(accounts, "CHUNK_BYTES", 2**16)


def left_in(folder) -> list[str]:
    """Names of the folders that values are put away in; torch makes one of its own beside them."""
    return [name for name in os.listdir(folder) if name.startswith("mtzip")]


def same(first, second) -> bool:
    left, right = first.state_dict(), second.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


# -- zipping -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "matching"),
    [(Functional, "optimal"), (Residual, "optimal"), (Branches, "optimal"), (Residual, "activation")],
)
def test_spilling_changes_no_bit(make, matching, folder, small_chunks):
    networks = pair(make)
    free = mtzip.zip_networks(networks, X, matching=matching)
    assert free.report.memory["spilled"] == 0
    known = free.report.memory
    assert known["estimate"] / 4 < known["kept"] <= known["estimate"]
    tight = mtzip.zip_networks(networks, X, matching=matching, memory=known["least"])
    assert tight.report.memory["spilled"] > 0
    assert tight.report.memory["kept"] < known["kept"] / 3
    assert same(free, tight)
    assert left_in(folder) == []


def test_plans_spill_too(folder, small_chunks, monkeypatch):
    """A plan takes moments in a pass of its own: it costs the same with everything on disk."""
    networks = pair(Residual)
    loose = mtzip.plan(networks, X, 0.5)
    written = []
    write = Store.write
    monkeypatch.setattr(Store, "write", lambda self, value: written.append(1) or write(self, value))
    tight = mtzip.plan(networks, X, 0.5, memory=prepare(networks, X, None).need.least)
    assert written
    assert [axis.costs for axis in loose.axes] == [axis.costs for axis in tight.axes]
    assert left_in(folder) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupt_leaves_nothing_behind(error, folder, small_chunks, monkeypatch):
    """In the middle of the sweep: the originals as they were, and no files."""
    networks = pair(Functional)
    networks["a"].train()
    hooked = []
    handle = networks["a"].fc.register_forward_hook(lambda *_: hooked.append(1))
    before = {task: copy.deepcopy(network.state_dict()) for task, network in networks.items()}
    modes = {task: [module.training for module in network.modules()] for task, network in networks.items()}
    seen = []

    def interrupted(*args, **options):
        seen.append(left_in(folder))
        if len(seen) == 5:
            raise error
        return collect(*args, **options)

    collect = sweep.collect
    monkeypatch.setattr(sweep, "collect", interrupted)
    with pytest.raises(error):
        mtzip.zip_networks(networks, X, memory=prepare(networks, X, None).need.least)
    assert seen[-1], "nothing was on disk when it happened"
    assert left_in(folder) == []
    for task, network in networks.items():
        assert all(torch.equal(value, before[task][key]) for key, value in network.state_dict().items())
        assert [module.training for module in network.modules()] == modes[task]
        assert all(parameter.requires_grad and parameter.grad is None for parameter in network.parameters())
    hooks = [hook for module in networks["a"].modules() for hook in module._forward_hooks]
    assert hooks == [handle.id]


def test_too_little_for_one_layer_is_refused_before_work_begins(monkeypatch):
    monkeypatch.setattr(sweep.Sweep, "run", lambda self: pytest.fail("it began"))
    with pytest.raises(mtzip.ZipError, match=r"at least .* for 600 calibration samples.* got 1 kB; give fewer samples"):
        mtzip.zip_networks(pair(Functional), X, memory="1kB")


@pytest.mark.parametrize(
    ("memory", "error"), [("4 apples", ValueError), ("", ValueError), (0, ValueError), (-1, ValueError),
                          (float("nan"), ValueError), (True, TypeError), ([4], TypeError)]
)  # fmt: skip
def test_refusals(memory, error):
    with pytest.raises(error, match=r"memory must be a .*'4GB', got"):
        mtzip.zip_networks(pair(mlp), {"a": noise(9, 6), "b": noise(9, 6)}, memory=memory)


def test_bytes_as_people_write_them():
    texts = {"4GB": 4e9, "1.5 gb": 1.5e9, "2GiB": 2 * 2**30, "300MB": 3e8, "17": 17, 1e9: 1e9}
    assert {text: accounts.bytes_of(text) for text in texts} == texts
    assert accounts.bytes_of(None) is None
    assert accounts.shown(4.2e9) == "4.2 GB" and accounts.shown(12) == "12 bytes"


def test_the_default_is_half_of_what_is_free(monkeypatch, caplog):
    monkeypatch.setattr(accounts, "free_bytes", lambda device: 10**9)
    need = accounts.Need(activations=10, working=200, backward=300, samples=5)
    assert accounts.limit_of(None, need, torch.device("cpu")) == 5 * 10**8 - 200
    assert accounts.limit_of(10**6, need, torch.device("cpu")) == 10**6 - 200
    with caplog.at_level("INFO", logger="mtzip"):
        mtzip.zip_networks(pair(mlp), {"a": noise(9, 6), "b": noise(9, 6)})
    assert any("estimated memory" in text and "of 500 MB, 18 samples" in text for text in caplog.messages)


def test_large_values_are_cut_into_more_chunks_whatever_memory_there_is(small_chunks):
    networks = pair(Functional)
    chunks = [[batch.size for batch in batches] for batches in prepare(networks, X, None).chunks]
    assert all(sum(sizes) == 300 and max(sizes) * 6 * 64 * 4 <= 2**16 for sizes in chunks)


def early() -> nn.Sequential:
    """Two convolutions over many positions, and a linear layer that reads little."""
    convolutions = nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1), nn.ReLU()
    return nn.Sequential(*convolutions, nn.MaxPool2d(8), nn.Flatten(), nn.Linear(24, 3))


def test_samples_that_early_layers_do_not_take_are_not_kept_for_them(small_chunks, monkeypatch):
    """Nor estimated: most chunks only run once a later layer asks for them."""
    networks = pair(early)
    images = {task: noise(300, 2, 16, 16, seed=at) for at, task in enumerate("ab")}
    found = []
    for few in (accounts.FEW_SAMPLES, 8):
        monkeypatch.setattr(accounts, "FEW_SAMPLES", few)
        monkeypatch.setattr(accounts, "MANY_POSITIONS", 2**21 if not found else 1)
        found.append(mtzip.zip_networks(networks, images).report.memory)
        assert found[-1]["kept"] <= found[-1]["estimate"]
    everything, some = found
    assert some["kept"] < everything["kept"] / 2
    assert some["estimate"] < everything["estimate"] / 2


# -- the store -----------------------------------------------------------------------------------------------------


def test_values_come_back_as_they_were(folder):
    made = [
        noise(4, 5, 6, 7).contiguous(memory_format=torch.channels_last),
        noise(9, 8).T,
        noise(5, 6).bfloat16(),
        (noise(3), torch.arange(3)),
        noise(2, 3)[:, 1:2],
    ]
    with Store(0) as store:
        values = Values(store, 1, len(made))
        for at, value in enumerate(made):
            values.put(at, value)
        assert store.resident == 0 and len(left_in(folder)) == 1
        for got, want in zip(values, made, strict=True):
            for left, right in zip(*(x if isinstance(x, tuple) else (x,) for x in (got, want)), strict=True):
                assert torch.equal(left, right) and left.dtype == right.dtype
        assert values[0].stride() == made[0].stride() and values[1].stride() == made[1].stride()
    assert left_in(folder) == []


def test_what_is_needed_longest_goes_first_and_its_files_with_it(folder):
    with Store(900) as store:
        soon, late = Values(store, 1, 2), Values(store, 9, 2)
        late.put(0, noise(100))
        soon.put(0, noise(100))
        soon.put(1, noise(50))
        assert isinstance(late._items[0], spill._OnDisk)
        assert not any(isinstance(item, spill._OnDisk) for item in soon._items)
        assert store.resident == 600
        (inside,) = left_in(folder)
        assert len(os.listdir(folder / inside)) == 1
        del late
        gc.collect()
        assert os.listdir(folder / inside) == []
        del soon
        gc.collect()
        assert store.resident == 0


def test_views_count_once():
    with Store() as store:
        whole, part = Values(store, 1, 1), Values(store, 1, 1)
        x = noise(100)
        whole.put(0, x)
        part.put(0, x.view(10, 10))
        assert store.resident == 400
        del whole
        gc.collect()
        assert store.resident == 400


def test_memory_is_handed_back_once_much_was_let_go_of(monkeypatch):
    handed = []
    monkeypatch.setattr(spill, "HANDED_BACK", 1000)
    monkeypatch.setattr(spill, "hand_back", lambda: handed.append(store.resident))
    store = Store()
    values = Values(store, 1, 8)
    for at in range(8):
        values.put(at, noise(100))  # 400 bytes
    assert handed == []
    for at in range(8):
        values.drop(at)
    assert handed == [2000, 800]
    for _ in range(9):  # little at a time
        values.put(0, noise(100))
        values.drop(0)
    assert handed == [2000, 800]


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_what_was_handed_back_is_no_longer_of_this_process():
    blocks = [bytearray(2**16) for _ in range(3200)]  # 200 MB in pieces
    full = resident()
    del blocks[1::2]
    spill.hand_back()
    assert full - resident() > 80e6


def test_a_full_disk_says_what_to_do(folder, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"No space left.*set TMPDIR"), Store(0) as store:
        Values(store, 1, 1).put(0, noise(3))
    assert left_in(folder) == []


# -- chunks are run when they are asked for ------------------------------------------------------------------------


def executed() -> Execution:
    network = seeded(lambda: mlp(6, (5, 4), 3))
    chunks = [noise(size, 6, seed=size) for size in (8, 4, 2)]
    analysis = analysed(network, chunks[0])
    return Execution(analysis, copy.deepcopy(analysis.exported.network), [as_batch(x) for x in chunks])


def at_the_second_layer(execution: Execution) -> Layer:
    """The second layer, of which the first chunk has been asked for."""
    first, second, _ = execution.analysis.layers.values()
    execution.advance(first.node)
    execution.finish(first.node, False)
    execution.advance(second.node)
    assert len(execution.inputs(second)[0]) == 8
    return second


def test_a_chunk_is_run_when_it_is_asked_for_and_once(monkeypatch):
    execution, ran = executed(), []
    run = Execution._run
    monkeypatch.setattr(Execution, "_run", lambda self, steps, chunk: (ran.append(chunk), run(self, steps, chunk)))
    *_, last = execution.analysis.layers.values()
    for layer in execution.analysis.layers.values():
        execution.advance(layer.node)
        first = execution.inputs(layer)[0]
        if layer is not last:
            execution.finish(layer.node, False)
    assert ran == [0, 0] and len(first) == 8
    network = execution.analysis.exported.network
    for _ in range(2):
        expected = network[:-1](execution.batches[2].args[0])
        assert torch.equal(execution.inputs(last)[2], expected)
    assert ran == [0, 0, 2]


def test_a_chunk_that_was_left_behind_runs_with_the_weights_as_they_were_before_a_reordering():
    execution = executed()
    second = at_the_second_layer(execution)
    first, network = next(iter(execution.analysis.layers.values())), execution.network
    expected = torch.relu(network.get_submodule(first.path)(execution.batches[1].args[0]))
    (segment,) = execution.analysis.axes.resolve(first.rows)
    execution.reorder({segment.atom: torch.tensor([4, 3, 2, 1, 0])})
    assert torch.equal(execution.inputs(second)[1], expected)


def test_values_go_with_their_execution():
    execution = executed()
    gone = weakref.ref(execution.inputs(at_the_second_layer(execution))[0])
    gc.disable()
    try:
        del execution
        assert gone() is None
    finally:
        gc.enable()
