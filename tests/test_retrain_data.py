"""Batches for retraining: forms of data, loaders, outputs and teachers of users."""

from __future__ import annotations

import copy

import pytest
import torch
from handmade import images, zipped_pair
from retraining import inputs, labelled
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from mtzip.network.zipped import ZippedNetwork
from mtzip.retraining.loaders import Cycle, loader_of
from mtzip.retraining.retrain import retrain


def test_loaders_of_different_lengths_go_round_on_their_own():
    counts = {"a": 0, "b": 0}

    class Counting(list):
        def __init__(self, task, items):
            super().__init__(items)
            self.task = task

        def __iter__(self):
            counts[self.task] += 1
            return super().__iter__()

    loaders = {"a": Counting("a", images(0, 12).split(4)), "b": Counting("b", images(1, 20).split(4))}
    retrain(zipped_pair(), loaders, 15)
    assert counts == {"a": 5, "b": 3}


@pytest.mark.parametrize("workers", [0, 1])
def test_data_loader_is_reshuffled_each_round(workers):
    x = images(0, 16)
    loader = DataLoader(TensorDataset(x, torch.arange(16)), 4, shuffle=True, num_workers=workers)
    torch.manual_seed(0)
    batches = Cycle("a", loader)
    rounds = [torch.cat([next(batches).targets for _ in range(4)]) for _ in range(2)]
    batches.close()
    assert not torch.equal(*rounds)
    for order in rounds:
        assert torch.equal(order.sort().values, torch.arange(16))


@pytest.mark.parametrize(
    "form",
    [
        lambda x, y: x,
        lambda x, y: (x, y),
        lambda x, y: [x, x],
        lambda x, y: [(x, y)],
        lambda x, y: [[x, y]],
        lambda x, y: [{"x": x, "labels": y}],
        lambda x, y: {"x": x, "labels": y},
        lambda x, y: TensorDataset(x, y),
        lambda x, y: DataLoader(TensorDataset(x, y), 8),
    ],
)
def test_forms_of_data(form):
    data = {task: form(*both) for task, both in labelled(16).items()}
    assert len(retrain(zipped_pair(), data, 2)) == 2


def test_shuffled_batches_cover_the_data_in_full_batches():
    x = torch.arange(10)
    torch.manual_seed(0)
    batches = list(loader_of("a", (x, x + 100), 4))
    assert [len(batch.args[0]) for batch in batches] == [4, 4]
    assert all(torch.equal(batch.args[0] + 100, batch.targets) for batch in batches)
    assert len(torch.cat([batch.args[0] for batch in batches]).unique()) == 8
    (batch,) = loader_of("a", x, 100)  # fewer samples than a batch: all of them
    assert torch.equal(batch.args[0].sort().values, x)


def test_outputs_with_logits():
    """What Hugging Face models give back."""

    class Output:
        def __init__(self, logits):
            self.logits = logits

    class Wrapped(nn.Module):
        def __init__(self, network, form):
            super().__init__()
            self.network, self.form = network, form

        def forward(self, pixels):
            return self.form(self.network(pixels))

    for form in (Output, lambda y: {"logits": y}, lambda y: (y, None)):
        pair = zipped_pair()
        zipped = ZippedNetwork({t: Wrapped(pair[t], form) for t in pair}, None)
        teachers = {t: Wrapped(pair.originals[t], form) for t in pair}
        data = {t: [{"pixels": x, "labels": y}] for t, (x, y) in labelled(8).items()}
        assert len(retrain(zipped, data, 1, teachers=teachers)) == 1


class Counted(nn.Module):
    """A teacher that counts the samples it is asked about."""

    def __init__(self, network):
        super().__init__()
        self.network, self.samples = network, 0

    def forward(self, x):
        self.samples += len(x)
        return self.network(x)


def test_a_teacher_sees_a_data_set_once_where_every_sample_is_needed():
    ends = []
    for form in (lambda x: x, lambda x: DataLoader(TensorDataset(x), 8, shuffle=True)):
        zipped = zipped_pair()
        teachers = {task: Counted(zipped.originals[task]) for task in zipped}
        history = retrain(
            zipped, {task: form(x) for task, x in inputs(20).items()}, 50, teachers=teachers, batch_size=8
        )
        ends.append((teachers["a"].samples, history[-1].losses["a"] / history[0].losses["a"]))
    assert ends[0][0] == 20 + 8  # all, and the first batch for the variance
    assert ends[1][0] > 300
    assert ends[0][1] == pytest.approx(ends[1][1], rel=0.3)


def test_what_the_teacher_said_of_a_sample_stays_with_it():
    """The same loss as where the teacher is asked at every step."""
    losses = []
    for known in (True, False):
        zipped = zipped_pair()
        teacher = zipped.originals["a"]
        teachers = {"a": teacher if known else (lambda x, teacher=teacher: teacher(x)), "b": zipped.originals["b"]}
        losses.append(retrain(zipped, labelled(20), 12, teachers=teachers, batch_size=8).losses("a"))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_teacher_is_not_asked_about_samples_that_are_not_needed():
    zipped = zipped_pair()
    teachers = {task: Counted(zipped.originals[task]) for task in zipped}
    retrain(zipped, inputs(64), 3, teachers=teachers, batch_size=8)
    assert teachers["a"].samples == 3 * 8 + 8
    large = {
        task: Counted(nn.Sequential(zipped.originals[task], nn.Linear(3 + at, 40))) for at, task in enumerate("ab")
    }
    wide = ZippedNetwork({task: copy.deepcopy(large[task]) for task in large}, None)
    retrain(wide, inputs(16), 4, teachers=large, batch_size=8)
    assert large["a"].samples == 8 + 8 + 4 * 8  # outputs larger than the inputs are not kept


def test_teachers_elsewhere_are_copied_to_the_networks_type():
    zipped = zipped_pair().double()
    data = {task: x.double() for task, x in inputs(16).items()}
    retrain(zipped, data, 2)
    assert next(zipped.originals["a"].parameters()).dtype == torch.float32
