"""``outputs=``: what of a network's output counts, through zipping, retraining, saving and exporting."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from nets import noise, seeded
from torch import nn
from transformers.utils import ModelOutput

import mtzip

X = {"a": noise(300, 6), "b": noise(300, 6, seed=1)}


class TwoHeads(nn.Module):
    """A trunk and two heads, whose outputs come back in one of the forms that users return."""

    def __init__(self, form):
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 8)
        self.scores, self.boxes = nn.Linear(8, 3), nn.Linear(8, 4)
        self.form = form

    def forward(self, x):
        x = torch.relu(self.second(torch.relu(self.first(x))))
        return self.form(self.scores(x), self.boxes(x))


def as_model_output(scores, boxes):
    output = ModelOutput()
    output["logits"], output["boxes"] = scores, boxes
    return output


def as_tuple(scores, boxes):
    return scores, boxes


def boxes_of(output):
    return output[1]


def pair(form) -> dict[str, nn.Module]:
    return {task: seeded(lambda: TwoHeads(form), at) for at, task in enumerate("ab")}


CHOICES = {
    "ModelOutput, name": (as_model_output, "boxes"),
    "ModelOutput, index": (as_model_output, 1),
    "tuple, index": (as_tuple, 1),
    "tuple, function": (as_tuple, boxes_of),
}


@torch.no_grad()
def relative_error(zipped, networks, at: int) -> float:
    found = []
    for task, network in networks.items():
        want, got = (tuple(net(X[task]).values() if isinstance(net(X[task]), dict) else net(X[task]))[at]
                     for net in (network, zipped[task]))  # fmt: skip
        found.append(float((got - want).square().mean() / want.var(0).mean()))
    return max(found)


@pytest.mark.parametrize("choice", CHOICES)
def test_only_what_counts_is_kept_right(choice):
    """The head that counts is refitted to what the trunk's neurons have become; the other one does not know them."""
    form, select = CHOICES[choice]
    networks = pair(form)
    zipped = mtzip.zip_networks(networks, X, outputs={"a": select, "b": select})
    counts, other = relative_error(zipped, networks, 1), relative_error(zipped, networks, 0)
    assert counts < 0.3 < other, (counts, other)
    names = {item.name for item in zipped.report.private}
    assert "boxes" in names and "scores" not in names  # the one that does not count is no part of the graph


def test_without_a_choice_every_tensor_counts():
    networks = pair(as_model_output)
    zipped = mtzip.zip_networks(networks, X)
    assert max(relative_error(zipped, networks, at) for at in (0, 1)) < 0.3
    assert zipped.outputs == {}


def test_nothing_shared_leaves_every_output_bit_for_bit():
    networks = pair(as_tuple)
    zipped = mtzip.zip_networks(networks, X, 0.0, outputs={"a": 1})
    for task, network in networks.items():
        assert all(torch.equal(*both) for both in zip(zipped[task](X[task]), network(X[task]), strict=True))


def test_retraining_imitates_what_counts():
    """Only the boxes' head gets a gradient, with teachers and with labels."""
    for batches in (X, {task: (x, noise(300, 4, seed=5)) for task, x in X.items()}):
        zipped = mtzip.zip_networks(pair(as_tuple), X, 0.5, outputs={"a": 1, "b": boxes_of})
        before = copy.deepcopy(zipped.state_dict())
        mtzip.retrain(zipped, batches, steps=3)
        changed = {key for key, value in zipped.state_dict().items() if not torch.equal(value, before[key])}
        assert any("boxes" in key for key in changed)
        assert not any("scores" in key for key in changed)


def test_save_keeps_names_and_indices_and_copies_keep_everything(tmp_path):
    networks = pair(as_model_output)
    zipped = mtzip.zip_networks(networks, X, outputs={"a": "boxes", "b": boxes_of})
    assert copy.deepcopy(zipped).outputs == {"a": "boxes", "b": boxes_of}
    mtzip.save(zipped, tmp_path / "z.safetensors")
    loaded = mtzip.load(tmp_path / "z.safetensors", networks)
    assert loaded.outputs == {"a": "boxes"}
    zipped.outputs["b"] = lambda output: output[1]
    assert pickle.loads(pickle.dumps(zipped)).outputs == {"a": "boxes"}


def test_a_file_from_before_there_was_a_choice_is_read():
    from mtzip.saving.manifest import Manifest

    zipped = mtzip.zip_networks(pair(as_tuple), X, outputs={"a": 1})
    document = Manifest.of(zipped).to_dict()
    assert Manifest.from_dict(document).outputs == {"a": 1}
    del document["outputs"]
    assert Manifest.from_dict(document).outputs == {}
    for wrong in ({"c": 1}, {"a": 1.5}, {"a": True}):
        with pytest.raises(ValueError, match=r"manifest\.outputs"):
            Manifest.from_dict({**document, "outputs": wrong})


def test_export_onnx_puts_out_what_counts(tmp_path):
    onnx = pytest.importorskip("onnx")
    zipped = mtzip.zip_networks(pair(as_tuple), X, outputs={"a": 1})
    mtzip.export_onnx(zipped, tmp_path / "z.onnx")
    names = [value.name for value in onnx.load(tmp_path / "z.onnx").graph.output]
    assert names == ["a.output", "b.0", "b.1"]


REFUSED = [
    ("boxes", TypeError, "outputs must be a mapping"),
    ({"c": 1}, KeyError, "outputs must be one of 'a', 'b', got 'c'"),
    ({"a": True}, TypeError, r"outputs\['a'\] must be a name, an index"),
    ({"a": 1.0}, TypeError, r"outputs\['a'\] must be a name, an index"),
    ({"a": "masks"}, mtzip.ZipError, r"outputs\['a'\] must be .* got 'masks' for ModelOutput.*'logits', 'boxes'"),
    ({"a": 7}, mtzip.ZipError, r"outputs\['a'\] must be .* got 7 for ModelOutput"),
    ({"a": lambda output: None}, mtzip.ZipError, r"outputs\['a'\] must select at least one floating-point tensor"),
]


@pytest.mark.parametrize(("outputs", "error", "message"), REFUSED)
def test_refusals(outputs, error, message):
    with pytest.raises(error, match=message):
        mtzip.zip_networks(pair(as_model_output), X, outputs=outputs)


def test_a_network_of_one_tensor_has_nothing_to_choose_by_number():
    """Index 0 of a tensor would be its first sample."""
    networks = {task: seeded(lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))) for task in "ab"}
    with pytest.raises(mtzip.ZipError, match="network that puts out one tensor, got 0"):
        mtzip.zip_networks(networks, X, outputs={"a": 0})
