"""What ``zip_networks`` takes, refuses and reports."""

from __future__ import annotations

import pytest
import torch
from nets import (
    IMAGE,
    Functional,
    mlp,
    noise,
    seeded,
)
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from zipping import inputs, pair, some, zip_pair

import mtzip

# -- inputs ----------------------------------------------------------------------------------------------------------


def test_every_form_of_calibration_inputs_is_the_same():
    networks, data = pair(mlp), inputs(6)
    x, y = data["a"], torch.zeros(200)
    expected = zip_pair(networks, data).state_dict()
    for form in (
        (x, y),
        [x],
        [(x, y)],
        (part for part in [x]),
        DataLoader(TensorDataset(x, y), 200),
        DataLoader(TensorDataset(x), 200),
        TensorDataset(x, y),
        {"input": x, "labels": y},
    ):
        got = mtzip.zip_networks(networks, {"a": form, "b": data["b"]}).state_dict()
        assert all(torch.equal(got[key], value) for key, value in expected.items()), type(form)


def test_uneven_batches_and_a_limit_on_samples():
    networks, data = pair(mlp), inputs(6, count=100)
    uneven = {task: [data[task][:1], data[task][1:70], data[task][70:]] for task in "ab"}
    got, expected = (
        zip_pair(networks, given, method="mtz", samples=samples)
        for given, samples in ((uneven, 80), ({t: data[t][:80] for t in "ab"}, None))
    )
    assert got.report.layers[0].samples == {"a": 80, "b": 80}
    for key, value in expected.state_dict().items():
        torch.testing.assert_close(got.state_dict()[key], value, rtol=1e-4, atol=1e-5)


def test_a_network_that_fixes_its_batch_size():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def forward(self, x):
            return self.net(x.view(20, 6))

    networks, data = pair(Fixed), inputs(6, count=50)
    pieces = {"a": list(data["a"].split(20)), "b": data["b"]}
    with pytest.raises(mtzip.ZipError, match="'b': Fixed cannot be exported"):
        zip_pair(networks, pieces)
    pieces["b"] = [data["b"][:20], data["b"][20:45]]
    zipped = zip_pair(networks, pieces)
    assert zipped.report.layers[0].samples == {"a": 40, "b": 40}
    assert zipped["a"](data["a"][:20]).shape == (20, 3)


def test_networks_with_several_inputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right, self.head = nn.Linear(3, 4), nn.Linear(5, 6), nn.Linear(10, 2)

        def forward(self, first, second):
            return self.head(torch.cat([self.left(first), self.right(second)], 1).relu())

    networks = pair(Two)
    x, y = noise(90, 3), noise(90, 5)
    zipped = mtzip.zip_networks(networks, {"a": [((x, y), None)], "b": {"first": x, "second": y}})
    assert {axis.name: axis.shared for axis in zipped.report.axes} == {"left": 4, "right": 6}
    assert torch.isfinite(zipped["b"](x, y)).all()


GOOD = {"networks": lambda: pair(mlp), "inputs": lambda: some(inputs(6), "ab")}


@pytest.mark.parametrize(
    "change, error, match",
    [
        ({"networks": [1]}, TypeError, "networks must be a mapping"),
        ({"networks": {}}, ValueError, "at least one network"),
        ({"networks": {"a": 1, "b": seeded(mlp)}}, TypeError, r"networks\['a'\] must be an nn.Module"),
        ({"networks": {"a.c": seeded(mlp), "b": seeded(mlp)}}, ValueError, "without '.'"),
        ({"networks": {"items": seeded(mlp), "a": seeded(mlp), "b": seeded(mlp)}}, ValueError, "choose another name"),
        ({"inputs": [1]}, TypeError, "inputs must be a mapping"),
        ({"inputs": {"a": noise(3, 6)}}, ValueError, r"\['a', 'b'\], got \['a'\]"),
        ({"inputs": {"a": 3, "b": noise(3, 6)}}, TypeError, r"inputs\['a'\] must be a tensor"),
        ({"inputs": {"a": [3], "b": noise(3, 6)}}, TypeError, r"inputs\['a'\]: a batch must be"),
        ({"inputs": {"a": noise(3, 6), "b": []}}, ValueError, r"inputs\['b'\] must hold at least one sample"),
        ({"inputs": {"a": noise(3, 6), "b": noise(0, 6)}}, ValueError, r"inputs\['b'\] must hold at least one sample"),
        ({"inputs": {"a": torch.tensor(1.0), "b": noise(3, 6)}}, ValueError, r"inputs\['a'\].*batch dimension"),
        ({"inputs": {"a": (noise(4, 6), noise(3)), "b": noise(3, 6)}}, ValueError, "as many targets"),
        ({"inputs": {"a": noise(3, 6) / 0, "b": noise(3, 6)}}, ValueError, r"inputs\['a'\] must be finite"),
        ({"inputs": {"a": noise(3, 6), "b": [noise(3, 6) * torch.nan]}}, ValueError, r"inputs\['b'\] must be finite"),
        ({"inputs": {"a": noise(3, 6), "b": noise(3, 7)}}, mtzip.ZipError, "'b'"),
        ({"share": 1.5}, ValueError, r"fraction in \[0, 1\], got 1.5"),
        ({"share": -0.1}, ValueError, "got -0.1"),
        ({"share": float("nan")}, ValueError, "got nan"),
        ({"share": True}, ValueError, "got True"),
        ({"share": "all"}, ValueError, "got 'all'"),
        ({"share": 2}, ValueError, "got 2"),
        ({"share": {"nowhere": 1}}, ValueError, r"axes among \['0', '2'\], got 'nowhere'"),
        ({"share": {"0": 9}}, ValueError, "smaller width 8, got 9"),
        ({"share": {"0": 1.1}}, ValueError, "got 1.1"),
        ({"method": "zipit"}, ValueError, "method must be one of"),
        ({"matching": "random"}, ValueError, "matching must be one of"),
        ({"damping": 0}, ValueError, "damping must be a positive"),
        ({"damping": float("inf")}, ValueError, "damping must be a positive"),
        ({"reconstructions": -1}, ValueError, "reconstructions must be"),
        ({"samples": 0}, ValueError, "samples must be at least 1"),
    ],
)
def test_errors_say_what_was_wrong(change, error, match):
    with pytest.raises(error, match=match):
        mtzip.zip_networks(**{name: make() for name, make in GOOD.items()} | change)


def test_the_same_object_twice_and_weights_that_are_not_finite():
    network = seeded(mlp)
    with pytest.raises(ValueError, match="different objects"):
        mtzip.zip_networks({"a": network, "b": network}, some(inputs(6), "ab"))
    broken = seeded(mlp, 1)
    broken[2].bias.data[1] = torch.nan
    with pytest.raises(ValueError, match=r"networks\['b'\]: 2.bias must be finite"):
        mtzip.zip_networks({"a": network, "b": broken}, some(inputs(6), "ab"))


def test_networks_on_two_devices_are_refused():
    networks, data = pair(mlp), inputs(6)
    networks["b"].to("meta")
    with pytest.raises(
        ValueError, match=r"one device, got networks\['a'\] has 0.weight on cpu and 0.weight .* on meta"
    ):
        mtzip.zip_networks(networks, some(data, networks))


def test_activations_that_overflow_are_an_error_and_not_a_network_of_nans():
    networks, data = pair(mlp), inputs(6)
    networks["b"][0].weight.data.mul_(1e30)
    networks["b"][2].weight.data.mul_(1e30)
    with pytest.raises(ValueError, match=r"'b'.*NaN or Inf"):
        zip_pair(networks, data)


# -- report ----------------------------------------------------------------------------------------------------------


def test_report():
    networks, data = pair(Functional), inputs(*IMAGE)
    report = zip_pair(networks, data, 0.8, damping=0.02).report
    assert report.tasks == ("a", "b")
    assert [axis.name for axis in report.axes] == ["conv1", "conv2", "fc"]
    assert all(0 < axis.difference < 1 for axis in report.axes)
    names = [layer.name for layer in report.layers]
    assert names == ["conv1", "conv2", "fc", "head (a)", "head (b)"]
    assert all(layer.damping == pytest.approx(0.02) for layer in report.layers)
    assert report.layers[0].samples == {"a": 200 * 64, "b": 200 * 64}
    assert all(0 <= error < 1 for layer in report.layers for error in layer.error.values())
    assert {(item.task, item.name) for item in report.private} == {("a", "head"), ("b", "head")}
    assert set(report.seconds) >= {"trace", "zip"}
    assert "conv1" in str(report)
    assert mtzip.Report.from_dict(report.to_dict()) == report


def test_progress_is_silent_unless_asked(capsys):
    zip_pair(pair(mlp), inputs(6))
    assert capsys.readouterr() == ("", "")
