"""The paper's experiments: measuring, baselines and tables, on small networks; and the command on real data."""

from __future__ import annotations

import copy
import csv
import math
from fractions import Fraction

import pytest
import torch
from torch import nn

import mtzip
from bench.networks import CifarResNet, Vgg16
from bench.paper import __main__ as command
from bench.paper import lenet_300_100, measure, methods, pruning, resnets, run
from bench.paper.case import Batches, Case, moved
from bench.paper.table import Row, table, write_csv
from mtzip.demo.tasks import Task


class Net(nn.Module):
    """A convolution, a BatchNorm and two linear layers, for 1 x 6 x 6."""

    def __init__(self, classes: int = 4):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(1, 20, 3, padding=1), nn.BatchNorm2d(20)
        self.fc1, self.fc2 = nn.Linear(20 * 36, 40), nn.Linear(40, classes)

    def forward(self, x):
        x = torch.relu(self.bn(self.conv(x)))
        return self.fc2(torch.relu(self.fc1(x.flatten(1))))


def task_of(name: str, classes: int = 4, seed: int = 0) -> Task:
    g = torch.Generator().manual_seed(seed)
    images, labels = torch.randn(360, 1, 6, 6, generator=g), torch.randint(classes, (360,), generator=g)
    return Task(name, images[:260], labels[:260], images[260:], labels[260:], classes)


def network(seed: int, classes: int = 4, make=Net) -> nn.Module:
    torch.manual_seed(seed)
    return make(classes).eval()


@pytest.fixture
def case() -> Case:
    tasks = {"a": task_of("a"), "b": task_of("b", 3, 1)}
    return Case("small", {"a": network(0), "b": network(1, 3)}, tasks, "?", ("originals", "mtzip"), calibration=200)


# -- measuring ---------------------------------------------------------------------------------------------------------


def test_wrong_is_one_where_the_network_errs():
    task = task_of("a")
    truth = {"a": lambda x: torch.eye(4)[task.test_labels[: len(x)]]}
    shifted = {"a": lambda x: torch.eye(4)[(task.test_labels[: len(x)] + 1) % 4]}
    assert measure.wrong(truth, {"a": task})["a"].sum() == 0
    assert measure.wrong(shifted, {"a": task})["a"].sum() == len(task.test_labels)


def test_increase_and_its_standard_error_by_hand():
    tasks = {"a": task_of("a"), "b": task_of("b")}
    before = {"a": torch.tensor([1.0, 0, 0, 0]), "b": torch.tensor([0.0, 0])}
    after = {"a": torch.tensor([0.0, 1, 1, 0]), "b": torch.tensor([1.0, 0])}
    mean, error = measure.increase(before, after, tasks)
    # Differences -1 1 1 0 (mean 1/4) and 1 0 (mean 1/2); variances 11/12 and 1/2.
    assert mean == pytest.approx(100 * float((Fraction(1, 4) + Fraction(1, 2)) / 2))
    expected = (Fraction(11, 12) / 4 + Fraction(1, 2) / 2) / 4
    assert error == pytest.approx(100 * math.sqrt(expected))


def test_standard_error_of_tasks_on_the_same_images_is_of_their_sum():
    same = task_of("a")
    before = {"a": torch.tensor([0.0, 0, 0, 0]), "b": torch.tensor([1.0, 0, 0, 0])}
    after = {"a": torch.tensor([1.0, 0, 0, 0]), "b": torch.tensor([0.0, 0, 0, 0])}
    assert measure.increase(before, after, {"a": same, "b": same}) == (0, 0)  # cancels on the very same image
    assert measure.increase(before, after, {"a": same, "b": task_of("b")})[1] > 0


def test_mean_over_seeds_is_image_by_image():
    mean = measure.mean_of([{"a": torch.tensor([1.0, 0])}, {"a": torch.tensor([0.0, 0])}])
    assert mean["a"].tolist() == [0.5, 0]


# -- data --------------------------------------------------------------------------------------------------------------


def test_moved_images_are_windows_of_the_padded_image():
    images = torch.arange(1.0, 2 * 3 * 16 + 1).view(2, 3, 4, 4).repeat(20, 1, 1, 1)
    torch.manual_seed(0)
    result, found = moved(images, 2), set()
    padded = nn.functional.pad(images, (2, 2, 2, 2))
    for image, padding in zip(result, padded, strict=True):
        windows = {(y, x): padding[:, y : y + 4, x : x + 4] for y in range(5) for x in range(5)}
        matches = [place for place, window in windows.items() if torch.equal(window, image)]
        assert len(matches) == 1
        found.update(matches)
    assert len(found) > 10
    assert moved(images, 0) is images


def test_batches_come_from_the_training_set_with_their_labels():
    task = task_of("a")
    of_image = {image.numpy().tobytes(): int(label) for image, label in zip(task.train_images, task.train_labels)}  # noqa: B905
    torch.manual_seed(0)
    batches = list(Batches(task, size=100))
    assert [len(labels) for _, labels in batches] == [100, 100]
    for images, labels in batches:
        assert [of_image[image.numpy().tobytes()] for image in images] == labels.tolist()


def test_a_case_says_how_large_batches_are_and_whether_they_have_labels(case):
    chosen = Case(**{**vars(case), "batch": 50})
    images, labels = next(iter(chosen.loaders(True)["b"]))
    assert len(images) == len(labels) == 50
    assert len(next(iter(chosen.loaders(False)["a"]))) == 50 and len(next(iter(case.loaders(False)["a"]))) == 128


def test_mirrored_batches_have_about_half_of_the_images_mirrored():
    task = task_of("a")
    torch.manual_seed(0)
    plain = next(iter(Batches(task, size=260)))[0]
    torch.manual_seed(0)
    mirrored = next(iter(Batches(task, flip=True, size=260)))[0]
    changed = (plain != mirrored).flatten(1).any(1)
    assert 90 < int(changed.sum()) < 170
    assert torch.equal(mirrored[changed], plain[changed].flip(3))


def test_batches_refuse_a_set_that_is_too_small():
    with pytest.raises(ValueError, match="500 training images, got 0 and 260"):
        Batches(task_of("a"), size=500)


def test_tasks_on_the_same_images_are_calibrated_on_different_draws(case):
    same = task_of("a")
    pair = Case("pair", case.networks, {"a": same, "b": same}, "?", (), calibration=50)
    images = pair.images(0)
    assert not torch.equal(images["a"], images["b"])
    assert torch.equal(images["a"], pair.images(0)["a"])
    assert not torch.equal(images["a"], pair.images(1)["a"])


# -- methods -----------------------------------------------------------------------------------------------------------


def test_originals_are_bit_for_bit(case):
    same = methods.METHODS["originals"].make(case, case.images(0), 0)
    for task, images in case.images(0).items():
        assert torch.equal(same[task](images), case.networks[task](images))


def test_refitted_head_is_the_least_squares_fit(case):
    original, images = case.networks["a"], task_of("a").train_images
    changed = copy.deepcopy(original)
    with torch.no_grad():
        changed.fc1.weight.mul_(0.7).add_(0.01)
        changed.fc2.weight.zero_()
    methods.refit_head_(changed, original, images)
    with torch.no_grad():
        x = torch.relu(changed.fc1(torch.relu(changed.bn(changed.conv(images))).flatten(1))).double()
        x = torch.cat([x, torch.ones(len(x), 1)], 1)
        exact = torch.linalg.lstsq(x, original(images).double()).solution
        residual = (x @ exact - original(images)).square().mean()
        fitted = (changed(images) - original(images)).square().mean()
    assert residual <= fitted <= 1.01 * residual  # a ridge of 1e-3 costs 0.1 % of it here


def test_a_shared_head_is_not_refitted(case):
    twins = {"a": network(0), "b": network(1)}
    images = {"a": task_of("a").train_images, "b": task_of("b").train_images}
    zipped = mtzip.zip_networks(twins, images)
    head = zipped["a"].fc1  # a shared layer in the head's place
    holder = nn.Sequential(head)
    with pytest.raises(ValueError, match="0 must be private"):
        methods.refit_head_(holder, nn.Sequential(nn.Linear(720, 40)), images["a"].flatten(1))


def test_untrained_trunk_is_shared_whole_and_new(case):
    fresh = methods.METHODS["from scratch"].make(case, case.images(0), 3)
    a, b = fresh["a"], fresh["b"]
    assert torch.equal(a.fc1.weight, b.fc1.weight) and torch.equal(a.conv.weight, b.conv.weight)
    assert not torch.equal(a.conv.weight, case.networks["a"].conv.weight)
    torch.manual_seed(3)
    expected = Net(4).conv.weight
    first = {tuple(row.flatten().tolist()) for row in expected}
    assert {tuple(row.flatten().tolist()) for row in a.conv.weight} == first  # averaging equal rows changes nothing
    parts = fresh.parameter_count()
    assert parts < sum(p.numel() for n in case.networks.values() for p in n.parameters())


def test_one_after_another_is_the_joint_zip_of_two_and_adds_the_third(case):
    def made(method: str, chosen: Case):
        return methods.METHODS[method].make(chosen, chosen.images(0), 0)

    x = case.images(0)["a"]
    assert torch.equal(made(methods.CHAIN, case)["a"](x), made("mtzip", case)["a"](x))
    networks, tasks = {**case.networks, "c": network(2, 5)}, {**case.tasks, "c": task_of("c", 5, 2)}
    three = Case("small", networks, tasks, "?", (), calibration=200)
    chain, joint = made(methods.CHAIN, three), made("mtzip", three)
    assert list(chain) == list(joint) == ["a", "b", "c"]
    assert chain.parameter_count() == joint.parameter_count()


@pytest.mark.parametrize("make", [lambda classes: Vgg16(classes, 8), lambda classes: CifarResNet(1, classes)])
def test_pruned_networks_are_as_large_as_asked(make):
    pytest.importorskip("torch_pruning")
    networks = {"a": network(0, 10, make), "b": network(1, 5, make)}
    images = {name: torch.randn(20, 3, 32, 32) for name in networks}
    total = sum(p.numel() for n in networks.values() for p in n.parameters())
    before = {name: copy.deepcopy(n.state_dict()) for name, n in networks.items()}
    size = round(0.6 * total)
    smaller = pruning.pruned(networks, images, size)
    left = sum(p.numel() for n in smaller.values() for p in n.parameters())
    assert abs(left - size) <= 0.05 * size
    for name, pruned in smaller.items():
        assert pruned(images[name]).shape == networks[name](images[name]).shape
        assert all(torch.equal(before[name][key], value) for key, value in networks[name].state_dict().items())


def test_pruning_refuses_a_size_out_of_reach(case):
    pytest.importorskip("torch_pruning")
    with pytest.raises(ValueError, match="size must be one that pruning reaches"):
        pruning.pruned(case.networks, case.images(0), 10)


def test_batchnorm_is_reestimated_from_the_images(case):
    net, images = copy.deepcopy(case.networks["a"]), task_of("a").train_images[:250]
    pruning.reestimate_(net, images)
    with torch.no_grad():
        out = net.conv(images).double().movedim(1, 0).flatten(1)
    torch.testing.assert_close(net.bn.running_mean.double(), out.mean(1), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(net.bn.running_var.double(), out.var(1), rtol=1e-4, atol=1e-6)
    assert not net.training and not net.bn.training and net.bn.momentum == 0.1


# -- rows --------------------------------------------------------------------------------------------------------------


def test_rows_of_a_case_before_and_after_retraining(case):
    pytest.importorskip("torch_pruning")
    chosen = Case(**{**vars(case), "steps": 2, "methods": methods.BASELINES})
    states = {name: copy.deepcopy(net.state_dict()) for name, net in case.networks.items()}
    found = list(run.rows(chosen))
    steps = {name: [row.steps for row in found if row.method == name] for name in chosen.methods}
    assert steps.pop("originals") == [0] and steps.pop("from scratch") == [2]
    assert all(value == [0, 2] for value in steps.values())
    rows = {(row.method, row.steps): row for row in found}
    total = sum(p.numel() for n in case.networks.values() for p in n.parameters())
    same = rows["originals", 0]
    assert (same.stored, same.fraction, same.increase, same.standard_error) == (total, 1.0, 0.0, 0.0)
    assert rows["mtzip", 2].stored == rows["mtzip", 0].stored < total
    assert abs(rows["pruned", 0].stored / rows["mtzip", 0].stored - 1) <= 0.05
    assert all(row.original == same.errors for row in found)
    for name, net in case.networks.items():
        assert all(torch.equal(states[name][key], value) for key, value in net.state_dict().items())


def test_without_a_step_there_is_no_row_of_another_retraining(case):
    assert {name for name in methods.ABLATIONS if methods.METHODS[name].retrain(case)} == set(methods.RETRAINING)
    chosen = Case(**{**vars(case), "steps": 0, "methods": ("mtzip", *methods.RETRAINING)})
    assert [row.method for row in run.rows(chosen)] == ["mtzip"]


@pytest.mark.parametrize("name", methods.ABLATIONS)
def test_an_ablation_differs_from_the_default_in_weights_or_retraining(case, name):
    method, images = methods.METHODS[name], case.images(0)
    if method.retrain(case):
        return  # another objective
    usual, other = (one.make(case, images, 0) for one in (methods.METHODS["mtzip"], method))
    x = images["a"]
    assert not torch.equal(usual["a"](x), other["a"](x))


def test_same_seed_same_rows(case):
    chosen = Case(**{**vars(case), "steps": 2, "methods": ("mtzip", "from scratch"), "shift": 1, "flips": ("a",)})
    first, second = ([{**vars(row), "seconds": 0} for row in run.rows(chosen)] for _ in range(2))
    assert first == second


def test_table_and_file_hold_every_row(tmp_path):
    row = Row("pair", "mtzip", "100%", 5, 1234567, 0.5, "1.00", "1.50", 0.5, 0.1, 1, "+3.18", 9.4, 0.7)
    text = table([row])
    assert "1,234,567" in text and "50.0%" in text and "+0.50 ± 0.10" in text and "+3.18" in text
    write_csv([row, row], tmp_path / "rows.csv")
    with open(tmp_path / "rows.csv", newline="") as file:
        read = list(csv.DictReader(file))
    assert len(read) == 2 and read[0]["increase"] == "0.5" and read[0]["paper"] == "+3.18"
    assert [path.name for path in tmp_path.iterdir()] == ["rows.csv"]


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["lenet-6"], "invalid choice"),
        (["lenet-5", "--methods", "mtzip,magic"], "got 'magic'"),
        (["lenet-5", "--seeds", "0"], "at least 1, got 0"),
    ],
)
def test_command_refuses(arguments, text, capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(arguments)
    assert ended.value.code == 2 and text in capsys.readouterr().err


def test_command_prints_and_writes_what_was_chosen(case, tmp_path, capsys, monkeypatch):
    other = Case(**{**vars(case), "name": "large"})
    monkeypatch.setattr(resnets, "cases", lambda quick, ablations: iter([case, other]))
    file = tmp_path / "rows.csv"
    rows = command.main(["resnets", "--only", "larg", "--methods", "originals", "--seeds", "2", "--csv", str(file)])
    assert [(row.case, row.method, row.seeds) for row in rows] == [("large", "originals", 2)]
    assert "mean increase" in capsys.readouterr().out and file.read_text().count("large") == 1
    with pytest.raises(SystemExit):
        command.main(["resnets", "--only", "huge"])


@pytest.mark.shared
def test_first_case_of_lenet_300_100_has_the_real_networks():
    first = next(lenet_300_100.cases(quick=True, ablations=False))
    found = measure.errors(measure.wrong(first.networks, first.tasks))
    # The weights' own notes: 97.72 and 98.39 % of the test images right.
    assert {name: round(error, 2) for name, error in found.items()} == {"a": 2.28, "b": 1.61}
    assert first.methods == methods.BASELINES and first.steps == 100


def test_full_size_measures_time_and_memory(monkeypatch, tmp_path, capsys):
    """On small networks in place of the large ones: every layer a row, and figures that can be."""
    from bench.paper import vgg_16_full_size

    monkeypatch.setattr(vgg_16_full_size, "ImageNetVgg16", lambda classes, seed: network(seed, classes))
    for name in ("cifar10", "gtsrb"):
        monkeypatch.setattr(vgg_16_full_size.data, name, lambda part: (torch.rand(9, 3, 8, 8), None))
    monkeypatch.setattr(vgg_16_full_size.data, "normalised", lambda images, _: images[:, :1] - 0.5)
    file = tmp_path / "rows.csv"
    rows = command.main(["vgg-16-full-size", "--images", "12", "--size", "6", "--memory", "200MB", "--csv", str(file)])
    found = {row.measure: row.value for row in rows}
    assert {row.work for row in rows} == {"two VGG-16, 12 images of 6 x 6 a task"}
    assert {"conv, s", "fc1, s", "fc2, s", "trace, s"} <= found.keys()
    assert 60 * found["zip, s"] >= sum(found[f"{layer}, s"] for layer in ("conv", "fc1", "fc2"))
    assert found["zip / two forward passes"] == pytest.approx(0.5 * found["zip, s"] / found["forward passes, s"])
    assert 0 <= found["above what it was before, GB"] < found["memory of the process at most, GB"] < 64
    assert 50 < found["parameters stored, %"] < 60
    assert [row["measure"] for row in csv.DictReader(file.open())] == list(found)
    assert "estimated memory" in capsys.readouterr().out
