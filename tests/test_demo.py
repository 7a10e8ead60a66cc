"""The demonstration: it trains, zips, retrains, prints what it found, and writes a network and a picture."""

import pytest
import torch
from torch import nn

import mtzip
from mtzip.demo import recipes
from mtzip.demo.networks import DigitNet
from mtzip.demo.run import demonstrate
from mtzip.demo.table import Table
from mtzip.demo.tasks import digit_tasks
from mtzip.demo.train import Recipe, evaluating, train
from mtzip.demo.train import test_error as error_of


@pytest.fixture(scope="module", autouse=True)
def short(tmp_path_factory):
    """A cache of its own, and recipes of two epochs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MTZIP_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(torch, "set_num_threads", lambda number: None)  # the other tests keep their threads
        patch.setitem(recipes.RECIPES, DigitNet, Recipe(epochs=2, rate=0.05, batch=32))
        yield


@pytest.fixture(scope="module")
def demonstration(tmp_path_factory):
    output = tmp_path_factory.mktemp("demo") / "made" / "by it"
    return output, demonstrate(None, output, shares=(0.5, 1.0), steps=5)


def test_outcome(demonstration):
    _, (outcome,) = demonstration
    assert outcome.network == "DigitNet" and set(outcome.originals) == {"digit", "odd"}
    assert outcome.training_steps == {"digit": 74, "odd": 74} and outcome.retraining_steps == 5
    assert [level.share for level in outcome.levels] == [0.5, 1.0]
    half, whole = outcome.levels
    assert whole.stored < half.stored < outcome.total
    # Two epochs leave some 10 % error; what zipping adds to it is small, what averaging adds is not bounded here.
    for task, error in outcome.originals.items():
        assert whole.zipped[task] < error + 5 and whole.retrained[task] < error + 5


def test_written_network_loads(demonstration):
    output, (outcome,) = demonstration
    loaded = mtzip.load(output / "digitnet.safetensors", {"digit": DigitNet(10), "odd": DigitNet(2)})
    for task in digit_tasks():
        error = error_of(loaded[task.name], task.test_images, task.test_labels)
        assert error == pytest.approx(outcome.levels[-1].retrained[task.name])


def test_picture_is_a_png(demonstration):
    output, _ = demonstration
    picture = (output / "share-against-error.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 10_000


def test_training_is_repeatable_and_cached(monkeypatch, tmp_path):
    monkeypatch.setenv("MTZIP_CACHE", str(tmp_path))
    task, _ = digit_tasks()
    networks = [recipes.trained(DigitNet, task, seed=1) for _ in range(2)]
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:100])  # a damaged file is not used, but trained again
    networks.append(recipes.trained(DigitNet, task, seed=1))
    for other in networks[1:]:
        for name, tensor in networks[0].state_dict().items():
            assert torch.equal(tensor, other.state_dict()[name]), name
    assert not any(network.training for network in networks)
    recipes.trained(DigitNet, task, seed=3)
    assert len(list(tmp_path.glob("digitnet-digit-*.pt"))) == len(list(tmp_path.iterdir())) == 2


def test_training_leaves_the_global_generator_alone():
    task, _ = digit_tasks()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    recipes.trained(DigitNet, task, seed=4)
    assert torch.equal(torch.get_rng_state(), before)


def test_training_learns():
    task, _ = digit_tasks()
    torch.manual_seed(0)
    network = train(DigitNet(), task, Recipe(epochs=4, rate=0.05, batch=32), seed=0)
    assert error_of(network, task.test_images, task.test_labels) < 15


def test_error_counts_wrong_classes_and_keeps_the_mode():
    network = nn.Sequential(nn.Flatten(), nn.Dropout(0.9))
    images = torch.eye(4).view(4, 1, 2, 2)
    assert error_of(network, images, torch.tensor([0, 1, 2, 0]), batch=3) == 25
    assert network.training and network[1].training
    network[1].eval()
    with evaluating(network):
        assert not network.training
    assert network.training and not network[1].training


def test_table_is_aligned(capsys):
    table = Table([("", ["share"]), ("errors", ["one", "two"])], narrowest=6)
    table.row(["50%", "1.25", ""])
    lines = capsys.readouterr().out.splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split() == ["---", "errors", "---"] and lines[2].split() == ["50%", "1.25"]
    with pytest.raises(ValueError):
        table.row(["too few"])
