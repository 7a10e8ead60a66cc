"""ONNX files of zipped networks: onnxruntime's outputs, what is stored, names, refusals."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from handmade import images, small, zipped_pair, zipped_three
from nets import Residual, mlp, noise, seeded
from torch import nn

import mtzip
from mtzip.cli import main
from mtzip.deploy import onnx_file
from mtzip.errors import ZipError
from mtzip.inputs import as_batch
from mtzip.network.zipped import ZippedNetwork
from mtzip.saving.save import load, save

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
ort = pytest.importorskip("onnxruntime")


def with_examples(zipped: ZippedNetwork) -> ZippedNetwork:
    zipped.example_inputs = {task: as_batch(images(count=2)) for task in zipped}
    return zipped


def run(path: Path, feeds: dict[str, torch.Tensor], outputs: list[str]) -> list[torch.Tensor]:
    """What onnxruntime, optimising as it does by default, makes of the file."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(path, options, ["CPUExecutionProvider"])
    return [torch.from_numpy(x) for x in session.run(outputs, {name: x.numpy() for name, x in feeds.items()})]


def assert_outputs(path: Path, zipped: ZippedNetwork, inputs: dict[str, torch.Tensor]) -> None:
    """Every output within 1e-5 of the network's in evaluation mode."""
    plain = copy.deepcopy(zipped).eval()
    for (task, x), got in zip(inputs.items(), run(path, inputs, [f"{task}.output" for task in inputs]), strict=True):
        with torch.no_grad():
            torch.testing.assert_close(got, plain[task](x), rtol=1e-5, atol=1e-5)


def stored(path: Path) -> dict[str, tuple[int, ...]]:
    """Key to shape of every floating-point initializer that is not a constant of the graph itself."""
    found = [item for item in onnx.load(path).graph.initializer if not item.name.endswith(".c")]
    return {item.name: tuple(item.dims) for item in found if item.data_type == onnx.TensorProto.FLOAT}


def expected_state(zipped: ZippedNetwork, tasks=None) -> dict[str, tuple[int, ...]]:
    """Key to shape of what the tasks' networks compute with; a BatchNorm's statistics are in its weight and bias."""
    kept = {id(x) for task in tasks or zipped for x in (*zipped[task].parameters(), *zipped[task].buffers())}
    state = zipped.state_dict(keep_vars=True)
    return {
        key: tuple(x.shape)
        for key, x in state.items()
        if id(x) in kept and x.is_floating_point() and "running_" not in key
    }


@pytest.fixture(scope="module", name="lenets")
def _lenets() -> dict[float, ZippedNetwork]:
    """LeNet-300-100 pairs, random weights, of two degrees of sharing."""
    networks = {task: seeded(lambda: mlp(784, (300, 100), 10), at) for at, task in enumerate("ab")}
    inputs = {task: noise(32, 784, seed=at) for at, task in enumerate("ab")}
    return {share: mtzip.zip_networks(networks, inputs, share=share) for share in (0.5, 1.0)}


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_a_zip_needs_nothing_more_and_is_as_large_as_its_parameters(share, lenets, tmp_path):
    zipped, path = lenets[share], tmp_path / "z.onnx"
    before = copy.deepcopy(zipped.state_dict())
    mtzip.export_onnx(zipped, path)
    onnx.checker.check_model(path, full_check=True)
    assert 1 <= path.stat().st_size / (4 * zipped.parameter_count()) < 1.02
    assert stored(path) == expected_state(zipped)
    assert_outputs(path, zipped, {"a": noise(5, 784, seed=8), "b": noise(1, 784, seed=9)})
    assert [entry.name for entry in tmp_path.iterdir()] == ["z.onnx"]
    assert all(torch.equal(value, before[key]) for key, value in zipped.state_dict().items())


def test_partly_shared_layers_are_assembled_from_blocks_stored_once(tmp_path):
    zipped = with_examples(zipped_three())
    mtzip.export_onnx(zipped, tmp_path / "z.onnx")
    assert stored(tmp_path / "z.onnx") == expected_state(zipped)
    assert_outputs(tmp_path / "z.onnx", zipped, {task: images(at, 3 + at) for at, task in enumerate(zipped)})


def test_one_task_alone(tmp_path):
    zipped = with_examples(zipped_three())
    mtzip.export_onnx(zipped, tmp_path / "z.onnx", tasks=["b"])
    graph = onnx.load(tmp_path / "z.onnx").graph
    assert [value.name for value in graph.input] == ["b"]
    assert [value.name for value in graph.output] == ["b.output"]
    assert stored(tmp_path / "z.onnx") == expected_state(zipped, ["b"])
    assert_outputs(tmp_path / "z.onnx", zipped, {"b": images(5, 4)})


def test_training_mode_is_left_as_it_is_and_evaluation_exported(tmp_path):
    zipped = with_examples(zipped_pair()).train()
    mtzip.export_onnx(zipped, tmp_path / "z.onnx", tasks=["a"])
    assert all(module.training for module in zipped.modules())
    assert_outputs(tmp_path / "z.onnx", zipped, {"a": images(3)})


def test_the_same_input_for_all_tasks_computes_once_what_they_compute_alike(tmp_path):
    zipped = with_examples(zipped_pair(False))  # the first layer partly shared: nothing alike
    mtzip.export_onnx(zipped, tmp_path / "apart.onnx", same_input=True)
    operators = [node.op_type for node in onnx.load(tmp_path / "apart.onnx").graph.node]
    assert operators.count("Conv") == 2
    networks = {"a": small(3, 0), "b": small(4, 1)}
    networks["b"].conv, networks["b"].norm = networks["a"].conv, networks["a"].norm
    zipped = with_examples(ZippedNetwork(networks, None))
    mtzip.export_onnx(zipped, tmp_path / "z.onnx", same_input=True)
    graph = onnx.load(tmp_path / "z.onnx").graph
    assert [value.name for value in graph.input] == ["input"]
    operators = [node.op_type for node in graph.node]
    assert (operators.count("Conv"), operators.count("BatchNormalization"), operators.count("Gemm")) == (1, 1, 4)
    x = images(6)
    got = run(tmp_path / "z.onnx", {"input": x}, ["a.output", "b.output"])
    for task, output in zip("ab", got, strict=True):
        torch.testing.assert_close(output, zipped[task](x).detach(), rtol=1e-5, atol=1e-5)


def test_tasks_that_are_the_same_network_have_an_output_each(tmp_path):
    network = small(3)
    zipped = with_examples(ZippedNetwork({"a": network, "b": network}, None))
    mtzip.export_onnx(zipped, tmp_path / "z.onnx", same_input=True)
    got = run(tmp_path / "z.onnx", {"input": images()}, ["a.output", "b.output"])
    assert torch.equal(*got)


def test_same_input_of_different_forms_is_refused(tmp_path):
    networks = {"a": mlp(6), "b": mlp(7)}
    zipped = mtzip.zip_networks(networks, {"a": noise(8, 6), "b": noise(8, 7)}, share=0.0)
    with pytest.raises(ValueError, match=r"inputs of the same form, got torch.float32 \['n', 6\] for a and"):
        mtzip.export_onnx(zipped, tmp_path / "z.onnx", same_input=True)
    assert not list(tmp_path.iterdir())


class Several(nn.Module):
    """Two tensors and a flag in, a dict out."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 4), nn.Linear(4, 3)
        self.register_buffer("table", torch.arange(12.0).view(3, 4), persistent=False)

    def forward(self, ids, mask=None, double: bool = False):
        x = (self.embed(ids) * mask.unsqueeze(-1)).sum(1) + self.table[0]
        x = self.head(x)
        return {"logits": 2 * x if double else x, "hidden": (x, "no tensor")}


def test_several_inputs_and_outputs_by_their_names(tmp_path):
    zipped = ZippedNetwork({"a": seeded(Several), "b": small(3)}, None)
    ids, mask = torch.randint(0, 11, (4, 6), generator=torch.Generator().manual_seed(0)), noise(4, 6)
    example = {"a": {"ids": ids, "mask": mask, "double": True}, "b": images()}
    mtzip.export_onnx(zipped, tmp_path / "z.onnx", example=example)
    graph = onnx.load(tmp_path / "z.onnx").graph
    assert [value.name for value in graph.input] == ["a.ids", "a.mask", "b"]
    assert [value.name for value in graph.output] == ["a.logits", "a.hidden.0", "b.output"]
    feeds = {"a.ids": ids[:3], "a.mask": mask[:3], "b": images(1)}
    logits, hidden = run(tmp_path / "z.onnx", feeds, ["a.logits", "a.hidden.0"])
    expected = zipped["a"](ids[:3], mask[:3], True)["logits"].detach()
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(hidden, expected / 2, rtol=1e-5, atol=1e-5)


def test_a_residual_network_with_batchnorm(tmp_path):
    networks = {"a": seeded(Residual), "b": seeded(lambda: Residual(classes=4), 1)}
    inputs = {task: noise(24, 2, 8, 8, seed=at) for at, task in enumerate("ab")}
    zipped = mtzip.zip_networks(networks, inputs, share=0.7)
    mtzip.export_onnx(zipped, tmp_path / "z.onnx")
    assert stored(tmp_path / "z.onnx") == expected_state(zipped)
    assert_outputs(tmp_path / "z.onnx", zipped, {"a": noise(1, 2, 8, 8, seed=5), "b": noise(9, 2, 8, 8, seed=6)})


# -- the example input -----------------------------------------------------------------------------------------


def test_the_example_survives_copies_and_files_hold_its_form_alone(lenets, tmp_path):
    zipped = lenets[1.0]
    assert {task: batch.size for task, batch in zipped.example_inputs.items()} == {"a": 2, "b": 2}
    example = zipped.example_inputs["a"].args[0]
    assert example.untyped_storage().nbytes() == example.nbytes
    assert torch.equal(copy.deepcopy(zipped).example_inputs["a"].args[0], example)
    assert not any("example" in name for name, _ in zipped.named_parameters())
    save(zipped, tmp_path / "z")
    assert example.numpy().tobytes()[:64] not in (tmp_path / "z").read_bytes()
    loaded = load(tmp_path / "z", {task: mlp(784, (300, 100), 10).eval() for task in "ab"})
    mtzip.export_onnx(loaded, tmp_path / "loaded.onnx", ["b"])
    mtzip.export_onnx(zipped, tmp_path / "zipped.onnx", ["b"])
    assert (tmp_path / "loaded.onnx").read_bytes() == (tmp_path / "zipped.onnx").read_bytes()
    save(loaded, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "z").read_bytes()


def test_a_network_that_fixes_its_batch_size(tmp_path):
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 3)

        def forward(self, x):
            return self.fc(x.view(4, 6))

    zipped = mtzip.zip_networks({"a": Fixed().eval(), "b": mlp()}, {"a": noise(4, 6), "b": noise(8, 6)}, share=0.0)
    assert zipped.example_inputs["a"].size == 4
    mtzip.export_onnx(zipped, tmp_path / "z.onnx")
    assert_outputs(tmp_path / "z.onnx", zipped, {"a": noise(4, 6, seed=2), "b": noise(7, 6, seed=3)})


# -- refusals and files ----------------------------------------------------------------------------------------


def test_what_is_refused(tmp_path):
    zipped, path = zipped_pair(), tmp_path / "z.onnx"
    with pytest.raises(ValueError, match=r"example input of task 'a' is needed.*pass example=\{'a': inputs\}"):
        mtzip.export_onnx(zipped, path)
    with_examples(zipped)
    with pytest.raises(TypeError, match="must be a ZippedNetwork, got Small"):
        mtzip.export_onnx(zipped["a"], path)
    with pytest.raises(KeyError, match="c"):
        mtzip.export_onnx(zipped, path, tasks=["c"])
    with pytest.raises(TypeError, match=r"pass \['a'\]"):
        mtzip.export_onnx(zipped, path, tasks="a")
    with pytest.raises(ValueError, match="at least one task"):
        mtzip.export_onnx(zipped, path, tasks=[])
    with pytest.raises(TypeError, match="example must map tasks to inputs, got Tensor"):
        mtzip.export_onnx(zipped, path, example=images())
    with pytest.raises(TypeError, match=r"example\['a'\]: a batch must be a tensor"):
        mtzip.export_onnx(zipped, path, example={"a": 3})
    with pytest.raises(ZipError, match="task 'b': Small cannot run on the example input"):
        mtzip.export_onnx(zipped, path, example={"b": noise(2, 3)})
    with pytest.raises(OSError):
        mtzip.export_onnx(zipped, tmp_path / "missing" / "z.onnx")
    assert not list(tmp_path.iterdir())


def test_a_graph_that_computes_something_else_is_not_written(tmp_path, monkeypatch):
    real = onnx_file.compare

    def altered(file, calls, same_input):
        calls.tensors["networks.a.head.bias"] = calls.tensors["networks.a.head.bias"] + 0.01
        real(file, calls, same_input)

    path = tmp_path / "z.onnx"
    path.write_bytes(b"old")
    monkeypatch.setattr(onnx_file, "compare", altered)
    with pytest.raises(ZipError, match=r"task 'a': output 'a.output' of the ONNX graph must be.*error of 0.01"):
        mtzip.export_onnx(with_examples(zipped_pair()), path, ["a"])
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["z.onnx"]
    mtzip.export_onnx(with_examples(zipped_pair()), path, ["a"], check=False)
    onnx.checker.check_model(path)


def test_weights_beyond_one_file_lie_beside_it(tmp_path, monkeypatch):
    zipped = with_examples(zipped_pair())
    monkeypatch.setattr(onnx_file, "LARGEST", 1000)
    mtzip.export_onnx(zipped, tmp_path / "z.onnx", ["b"])
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["z.onnx", "z.onnx.data"]
    assert_outputs(tmp_path / "z.onnx", zipped, {"b": images(4)})


def test_half_precision_and_other_opsets(tmp_path):
    zipped = with_examples(zipped_pair()).half()
    example = {task: images(count=2, dtype=torch.float16) for task in zipped}
    mtzip.export_onnx(zipped, tmp_path / "z.onnx", ["a"], example=example, opset=21)
    model = onnx.load(tmp_path / "z.onnx")
    assert model.opset_import[0].version == 21
    assert {item.data_type for item in model.graph.initializer} <= {onnx.TensorProto.FLOAT16, onnx.TensorProto.INT64}
    got = run(tmp_path / "z.onnx", {"a": example["a"]}, ["a.output"])[0]
    np.testing.assert_allclose(got.float().numpy(), zipped["a"](example["a"]).detach().float().numpy(), atol=2e-2)


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    zipped = with_examples(zipped_pair())
    save(zipped, tmp_path / "z.safetensors")
    networks = ["--network", "a=handmade:Small", "--network", "b=test_onnx:four_classes"]
    command = ["export", str(tmp_path / "z.safetensors"), *networks, "--output", str(tmp_path / "z.onnx")]
    assert main([*command, "--task", "b"]) == 0
    assert f"wrote {tmp_path / 'z.onnx'}" in capsys.readouterr().out
    assert_outputs(tmp_path / "z.onnx", zipped, {"b": images(4, 3)})
    assert main([*command, "--task", "c"]) == 2
    assert "--task must be one of a, b, got c" in capsys.readouterr().err


def four_classes() -> nn.Module:
    return small(4)


def test_a_batch_norm_is_two_vectors(tmp_path):
    zipped = with_examples(zipped_pair())
    norm = zipped["a"].norm
    with torch.no_grad():
        norm.running_mean.copy_(torch.linspace(-3, 4, len(norm.running_mean)))
        norm.running_var.copy_(torch.linspace(0.01, 9, len(norm.running_mean)))
        norm.weight.copy_(torch.linspace(-2, 2, len(norm.running_mean)))
    mtzip.export_onnx(zipped, tmp_path / "z.onnx")
    assert_outputs(tmp_path / "z.onnx", zipped, {task: images(5, 3 + at) for at, task in enumerate(zipped)})
    found = {item.name: onnx.numpy_helper.to_array(item) for item in onnx.load(tmp_path / "z.onnx").graph.initializer}
    assert not [name for name in found if "running_" in name]
    factor = norm.weight.detach().double() / (norm.running_var.double() + norm.eps).sqrt()
    torch.testing.assert_close(torch.from_numpy(found["networks.a.norm.weight"].copy()), factor.float())
    shift = norm.bias.detach().double() - norm.running_mean.double() * factor
    torch.testing.assert_close(torch.from_numpy(found["networks.a.norm.bias"].copy()), shift.float())


def test_rows_of_one_task_are_not_cut_into_columns(lenets, tmp_path):
    mtzip.export_onnx(lenets[0.5], tmp_path / "z.onnx")
    assert "Slice" not in {node.op_type for node in onnx.load(tmp_path / "z.onnx").graph.node}


class TwoBranches(nn.Module):
    """Reads two branches side by side: of its columns some of either are shared and some are not."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Conv2d(2, 4, 1), nn.Conv2d(2, 6, 1)
        self.mix, self.head = nn.Conv2d(10, 6, 1), nn.Linear(6, 3)

    def forward(self, x):
        x = torch.cat([self.left(x).relu(), self.right(x).relu()], 1)
        return self.head(self.mix(x).relu().mean((2, 3)))


def test_a_weight_whose_pieces_are_interleaved_is_cut_by_one_split(tmp_path):
    networks = {task: seeded(TwoBranches, at) for at, task in enumerate("ab")}
    inputs = {task: noise(24, 2, 8, 8, seed=at) for at, task in enumerate("ab")}
    mtzip.export_onnx(zipped := mtzip.zip_networks(networks, inputs, share=0.5), tmp_path / "z.onnx")
    assert_outputs(tmp_path / "z.onnx", zipped, {"a": noise(1, 2, 8, 8, seed=5), "b": noise(9, 2, 8, 8, seed=6)})
    kinds = [node.op_type for node in onnx.load(tmp_path / "z.onnx").graph.node]
    assert "Split" in kinds and "Slice" not in kinds


def test_constants_are_stored_once_and_names_are_no_tasks(tmp_path):
    networks = {name: seeded(Residual, at) for at, name in enumerate(("0", "1"))}
    inputs = {task: noise(24, 2, 8, 8, seed=int(task)) for task in networks}
    mtzip.export_onnx(zipped := mtzip.zip_networks(networks, inputs, share=0.5), tmp_path / "z.onnx")
    assert_outputs(tmp_path / "z.onnx", zipped, {"0": noise(1, 2, 8, 8, seed=5), "1": noise(9, 2, 8, 8, seed=6)})
    constants = [item for item in onnx.load(tmp_path / "z.onnx").graph.initializer if item.name.endswith(".c")]
    assert constants
    assert len({item.raw_data + bytes(item.dims) for item in constants}) == len(constants)


def test_the_strides_of_the_example_are_not_in_the_graph(tmp_path):
    networks = {"a": seeded(Residual), "b": seeded(Residual, 1)}
    last = {t: noise(24, 2, 8, 8, seed=at).to(memory_format=torch.channels_last) for at, t in enumerate("ab")}
    for name, inputs in (("last", last), ("first", {task: x.contiguous() for task, x in last.items()})):
        mtzip.export_onnx(mtzip.zip_networks(networks, inputs, share=1.0), tmp_path / name)
    kinds = [[node.op_type for node in onnx.load(tmp_path / name).graph.node] for name in ("last", "first")]
    assert kinds[0] == kinds[1]
