"""The command: a zip from files, what is in it, and one line for everything that can go wrong."""

import pickle
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import mtzip
from mtzip.cli import main

NETS = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, classes=3):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.hidden = nn.Linear(4 * 16, 6)
        self.head = nn.Linear(6, classes)

    def forward(self, x):
        x = torch.relu(self.conv(x)).flatten(1)
        return self.head(torch.relu(self.hidden(x)))

def wide():
    return Net(5)

def broken():
    raise AssertionError("no such luck")

number = 3
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A user's folder: a module, weights and inputs of two tasks."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "nets", raising=False)
    (tmp_path / "nets.py").write_text(NETS)
    monkeypatch.syspath_prepend(tmp_path)
    import nets

    torch.manual_seed(0)
    a, b = nets.Net(), nets.wide()
    torch.save(a.state_dict(), "a.pt")
    save_file(b.state_dict(), "b.safetensors")
    images = torch.rand(40, 1, 4, 4, dtype=torch.float64).numpy()  # NumPy's own type: the network's is float32
    np.save("a.npy", images)
    np.savez("b.npz", images=images, labels=np.zeros(40))
    yield tmp_path
    sys.modules.pop("nets", None)


NETWORKS = ["--network", "a=nets:Net", "--network", "b=nets:wide"]
WEIGHTS = ["--weights", "a=a.pt", "--weights", "b=b.safetensors"]
INPUTS = ["--inputs", "a=a.npy", "--inputs", "b=b.npz"]
OUTPUT = ["--output", "z.safetensors"]
ZIP = ["zip", *NETWORKS, *WEIGHTS, *INPUTS, *OUTPUT]


def test_zip_then_show_then_load(folder, capsys):
    assert main([*ZIP, "--share", "0.5", "--steps", "3"]) == 0
    out = capsys.readouterr().out
    assert "conv" in out and "wrote z.safetensors" in out
    assert main(["show", "z.safetensors"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^a +nets\.Net", out, re.MULTILINE) and "a + b, method refit" in out
    import nets

    zipped = mtzip.load("z.safetensors", {"a": nets.Net(), "b": nets.wide()})
    assert {axis.name: axis.shared for axis in zipped.report.axes} == {"conv": 2, "hidden": 3}
    assert zipped["b"](torch.rand(2, 1, 4, 4)).shape == (2, 5)


def test_nothing_shared_is_the_originals(folder):
    assert main([*ZIP, "--share", "0"]) == 0
    import nets

    original, x = nets.Net(), torch.rand(7, 1, 4, 4)
    original.load_state_dict(torch.load("a.pt"))
    zipped = mtzip.load("z.safetensors", {"a": nets.Net(), "b": nets.wide()})
    assert torch.equal(zipped["a"](x), original(x))


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ([], {"conv": 4, "hidden": 6}),
        (["hidden=0.5"], {"hidden": 3}),
        (["conv=3", "hidden=1"], {"conv": 3, "hidden": 6}),
    ],
)
def test_shares(folder, shares, expected):
    assert main([*ZIP, *(word for share in shares for word in ("--share", share))]) == 0
    import nets

    zipped = mtzip.load("z.safetensors", {"a": nets.Net(), "b": nets.wide()})
    assert {axis.name: axis.shared for axis in zipped.report.axes} == expected


def test_zeros_of_pruned_networks(folder):
    """Twelve weights of the hidden layer are pruned in either network, by chance not all at places that match."""
    import nets

    for make, file in ((nets.Net, "a.safetensors"), (nets.wide, "b.safetensors")):
        network = make()
        with torch.no_grad():
            network.hidden.weight[:, :2] = 0
        save_file(network.state_dict(), file)
    words, zeros = [word.replace("a.pt", "a.safetensors") for word in ZIP], {}
    for keep in ("no", "yes", "count"):
        assert main([*words, "--keep-zeros", keep]) == 0
        zipped = mtzip.load("z.safetensors", {"a": nets.Net(), "b": nets.wide()})
        assert zipped.keep_zeros == (keep != "no")
        zeros[keep] = sum(int((parameter == 0).sum()) for parameter in zipped.parameters() if parameter.dim() > 1)
    assert zeros["no"] == 0 and 0 < zeros["yes"] <= 12 <= zeros["count"]


def test_slots_of_some_of_three_tasks(folder):
    """The third task is the first one again: they share with each other, where slots need not be all tasks'."""
    import nets

    again = ["--network", "c=nets:Net", "--weights", "c=a.pt", "--inputs", "c=a.npy", "--share", "0.5"]
    for slots, expected in (("all", {("a", "b", "c")}), ("some", {("a", "c")})):
        assert main([*ZIP, *again, "--slots", slots]) == 0
        zipped = mtzip.load("z.safetensors", {"a": nets.Net(), "b": nets.wide(), "c": nets.Net()})
        assert {shared.tasks for axis in zipped.report.axes for shared in axis.sets} & expected
    assert main([*ZIP, "--slots", "most"]) == 2


class Bomb:
    """Unpickled, it would leave a file."""

    def __reduce__(self):
        return (open, ("exploded", "w"))


def bombs():
    torch.save({"conv.weight": Bomb()}, "bomb.pt")
    np.save("bomb.npy", np.array([Bomb()], dtype=object), allow_pickle=True)
    with open("bare.pt", "wb") as file:
        pickle.dump(Bomb(), file)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["zip", *NETWORKS[:2], *INPUTS[:2], *OUTPUT], "--network must be given for at least two tasks, got a"),
        (["zip", *NETWORKS, *INPUTS[:2], *OUTPUT], "--inputs must be given for every task, got none for b"),
        ([*ZIP, "--weights", "c=a.pt"], "--weights must be for one of the tasks a, b, got c"),
        ([*ZIP, "--network", "a=nets:Net"], "--network must be given once for a task, got a twice"),
        ([*ZIP, "--network", "nets:Net"], "must be TASK=VALUE, got 'nets:Net'"),
        ([*ZIP, "--share", "1.5"], "must be a fraction from 0 to 1, got '1.5'"),
        ([*ZIP, "--share", "half"], "AXIS=FRACTION or AXIS=COUNT, got 'half'"),
        ([*ZIP, "--share", "0.5", "--share", "conv=1"], "--share must be one fraction"),
        ([*ZIP, "--share", "nothing=0.5"], "'nothing'"),
        ([*ZIP, "--share", "conv=5"], "conv"),
        ([*ZIP, "--method", "magic"], "'magic' is not one of 'refit', 'mtz', 'average'"),
        ([*ZIP, "--output", "no/where.safetensors"], "--output must be in a folder that exists"),
        (["zip", *INPUTS, *OUTPUT], "Missing option '--network'; see mtzip zip --help"),
        (["zip", "--network", "a=nowhere:Net", *ZIP[3:]], "nowhere:Net must make a network when called"),
        (["zip", "--network", "a=nets:Missing", *ZIP[3:]], "has no attribute 'Missing'"),
        (["zip", "--network", "a=nets:broken", *ZIP[3:]], "AssertionError: no such luck"),
        (["zip", "--network", "a=nets:number", *ZIP[3:]], "'int' object is not callable"),
        (["zip", "--network", "a=nets", *ZIP[3:]], "must be given as module:callable, got 'nets'"),
        (["zip", "--network", "a=collections:OrderedDict", *ZIP[3:]], "torch.nn.Module, got OrderedDict"),
        (["zip", *NETWORKS, "--weights", "a=b.safetensors", *INPUTS, *OUTPUT], "must hold the weights of a Net"),
        (["zip", *NETWORKS, "--weights", "a=a.npy", *INPUTS, *OUTPUT], "must hold a state dict"),
        (["zip", *NETWORKS, "--weights", "a=bomb.pt", *INPUTS, *OUTPUT], "loading would run code"),
        (["zip", *NETWORKS, "--weights", "a=bare.pt", *INPUTS, *OUTPUT], "loading would run code"),
        (["zip", *NETWORKS, "--weights", "a=missing.pt", *INPUTS, *OUTPUT], "missing.pt must be a file, got nothing"),
        (["zip", *NETWORKS, "--weights", "a=nets.py", *INPUTS, *OUTPUT], "must end in one of .npy, .npz, .pt"),
        (["zip", *NETWORKS, "--inputs", "a=bomb.npy", *INPUTS[2:], *OUTPUT], "must be a whole .npy file"),
        (["zip", *NETWORKS, "--inputs", "a=cut.npz", *INPUTS[2:], *OUTPUT], "must be a whole .npz file"),
        (["zip", *NETWORKS, "--inputs", "a=b.npz:nothing", *INPUTS[2:], *OUTPUT], "must hold an array nothing"),
        (["zip", *NETWORKS, "--inputs", "a=two.npz", *INPUTS[2:], *OUTPUT], "choose with two.npz:NAME"),
        (["zip", *NETWORKS, "--inputs", "a=a.npy:images", *INPUTS[2:], *OUTPUT], "must hold named arrays for :images"),
        (["zip", *NETWORKS, "--inputs", "a=empty.npy", *INPUTS[2:], *OUTPUT], "got a tensor of shape [0, 1, 4, 4]"),
        (["zip", *NETWORKS, "--inputs", "a=nan.npy", *INPUTS[2:], *OUTPUT], "must be finite"),
        (["show", "missing.safetensors"], "missing.safetensors"),
        (["show", "b.safetensors"], "must be a file of mtzip.save"),
        (["show", "nets.py"], "must be a file of mtzip.save"),
        (["demo", "--data", "missing"], "Directory 'missing' does not exist"),
        (["demo", "--data", "."], "train-images-idx3-ubyte"),
        (["unzip"], "No such command 'unzip'"),
    ],
)
def test_errors_are_one_line(folder, capsys, arguments, message):
    bombs()
    (folder / "cut.npz").write_bytes((folder / "b.npz").read_bytes()[:100])
    np.savez("two.npz", first=np.zeros((2, 2)), second=np.zeros((2, 2)))
    np.save("empty.npy", np.zeros((0, 1, 4, 4)))
    np.save("nan.npy", np.full((4, 1, 4, 4), np.nan))
    assert main(arguments) == 2
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("mtzip: error: "), captured.err
    assert message in lines[0]
    assert not (folder / "exploded").exists() and not (folder / "z.safetensors").exists()


def test_inputs_may_be_chosen_by_name(folder):
    assert main(["zip", *NETWORKS, "--inputs", "a=b.npz:images", *INPUTS[2:], *OUTPUT]) == 0


def test_a_checkpoint_of_data_parallel_loads(folder):
    state = {f"module.{name}": tensor for name, tensor in torch.load("a.pt").items()}
    torch.save({"epoch": 3, "state_dict": state}, "a.pt")
    assert main(ZIP) == 0


def test_debug_shows_the_traceback(folder, monkeypatch):
    monkeypatch.setenv("MTZIP_DEBUG", "1")
    with pytest.raises(OSError):
        main(["show", "missing.safetensors"])


@pytest.mark.parametrize("command", [[], ["zip"], ["show"], ["demo"]])
def test_help(capsys, command):
    assert main([*command, "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Usage: mtzip")
    assert command != ["zip"] or "Example:" in out


def test_without_a_command_there_is_help(capsys):
    assert main([]) == 2
    assert "demo" in capsys.readouterr().err


def test_as_a_process(folder):
    found = subprocess.run([sys.executable, "-m", "mtzip.cli", "show", "missing"], capture_output=True, text=True)
    assert found.returncode == 2 and found.stdout == ""
    assert len(found.stderr.splitlines()) == 1 and "Traceback" not in found.stderr
