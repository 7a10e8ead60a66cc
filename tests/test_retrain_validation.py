"""Validation, early stopping, and the factors of the tasks' losses."""

from __future__ import annotations

import math

import pytest
import torch
from handmade import zipped_pair
from retraining import assert_same, distance, inputs, labelled, weights_of

from mtzip.retraining.balance import Balanced
from mtzip.retraining.retrain import retrain


def scores(values):
    """A validation that returns these values in turn."""
    values = iter(values)
    return lambda zipped: next(values)


# -- best weights ----------------------------------------------------------------------------------------------


def test_best_weights_are_kept():
    states = []

    def validate(zipped):
        states.append(weights_of(zipped))
        return [5.0, 4.0, 2.0, 3.0, 2.5][len(states) - 1]

    zipped = zipped_pair()
    history = retrain(zipped, inputs(), 8, validate=validate, validate_every=2)
    assert [(v.step, v.score) for v in history.validations] == [(0, 5.0), (2, 4.0), (4, 2.0), (6, 3.0), (8, 2.5)]
    assert history.best == 4
    assert "weights of step 4 kept" in str(history)
    assert_same(weights_of(zipped), states[2])


def test_retraining_that_only_hurts_leaves_the_network_as_it_was():
    zipped = zipped_pair()
    before = weights_of(zipped)
    history = retrain(zipped, labelled(), 5, validate=scores(range(9)), batchnorm="train")
    assert history.best == 0
    assert_same(weights_of(zipped), before)


def test_patience_ends_the_run():
    validate = scores([3, 2, 2.5, 2.1, 1, 0])
    history = retrain(zipped_pair(), inputs(), 30, validate=validate, validate_every=3, patience=2)
    assert len(history) == 9
    assert history.best == 3
    assert len(retrain(zipped_pair(), inputs(), 4, validate=scores(range(9, 0, -1)), patience=1)) == 4


def test_a_score_that_is_no_number_is_never_the_best():
    history = retrain(zipped_pair(), inputs(8), 3, validate=scores([math.nan, 2.0, math.nan, math.inf]))
    assert history.best == 1
    zipped = zipped_pair()
    history = retrain(zipped, inputs(8), 3, validate=lambda zipped: math.nan)
    reference = zipped_pair()
    retrain(reference, inputs(8), 3)
    assert history.best is None
    assert_same(weights_of(zipped), weights_of(reference))


def test_validation_sees_evaluation_mode_and_disturbs_nothing():
    zipped, reference = zipped_pair(), zipped_pair()
    for network in (zipped, reference):
        network["a"].head = torch.nn.Sequential(torch.nn.Dropout(0.5), network["a"].head)
        network.train()
    seen = []

    def validate(zipped):
        seen.append((any(module.training for module in zipped.modules()), torch.is_grad_enabled()))
        return {"a": -float(len(seen)) + float(torch.rand(())), "b": torch.tensor(-1.0)}

    history = retrain(zipped, inputs(), 6, validate=validate, validate_every=2, dropout=True)
    retrain(reference, inputs(), 6, dropout=True)
    assert seen == [(False, False)] * 4
    assert history.validations[0].scores.keys() == {"a", "b"}
    assert history.best == 6
    assert_same(weights_of(zipped), weights_of(reference))
    assert zipped.training


def test_validation_is_logged_with_its_step():
    rows = []
    log = lambda *row: rows.append(row)  # noqa: E731
    retrain(zipped_pair(), inputs(8), 4, validate=scores([3, 2, 1]), validate_every=2, log=log)
    found = [(step, scalars.get("validation/score")) for step, scalars in rows]
    assert found == [(0, 3.0), (1, None), (2, 2.0), (3, None), (4, 1.0)]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"validate": lambda z: "good"}, TypeError, "validate must return a number, lower is better.*got str"),
        ({"validate": lambda z: {}}, TypeError, "validate must return a number.*got dict"),
        ({"validate": lambda z: torch.zeros(2)}, TypeError, "validate must return a number.*got Tensor"),
        ({"validate": 3}, TypeError, "validate must be callable, got int"),
        ({"log": 3}, TypeError, "log must be callable, got int"),
        ({"patience": 3}, ValueError, "patience is for validate=, got no validate"),
        ({"validate": float, "patience": 0}, ValueError, "patience must be a positive integer, got 0"),
        ({"accumulate": 0}, ValueError, "accumulate must be a positive integer"),
        ({"autocast": torch.float16}, ValueError, "autocast must be torch.bfloat16 or None, got torch.float16"),
        ({"weights": "even"}, ValueError, "weights must map tasks to factors, or be 'balanced', got 'even'"),
        ({"distill": "layers"}, ValueError, "distill must be 'outputs' or 'features' or 'both', got 'layers'"),
        ({"dropout": "off"}, ValueError, "dropout must be None, True or False, got 'off'"),
        ({"distributed": True}, ValueError, "distributed=True needs a process group, got none"),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        retrain(zipped_pair(), inputs(8), 2, **arguments)


# -- balance ---------------------------------------------------------------------------------------------------


def test_balanced_factors():
    """By hand: w_t = (sum L(0) / sum r) r_t / L_t(0), with r_t the running loss over the first."""
    balance = Balanced(("a", "b"))
    assert balance.weights == {"a": 1.0, "b": 1.0}
    balance.update({"a": 100.0, "b": 1.0})
    assert balance.weights == pytest.approx({"a": 101 / 2 / 100, "b": 101 / 2})
    balance.update({"a": 50.0, "b": 1.0})  # the running loss of a is 95: b has come down less, and gains
    assert balance.weights == pytest.approx({"a": 101 / 1.95 * 0.95 / 100, "b": 101 / 1.95})
    other = Balanced(("a", "b"))
    other.load(balance.state())
    assert other.weights == balance.weights
    other.update({"a": 0.0, "b": 0.0})
    assert all(math.isfinite(weight) for weight in other.weights.values())


def test_a_task_with_a_small_unit_is_not_starved():
    """Task b's loss in a unit a thousand times smaller: alone it is drowned by a's, balanced it comes down too."""
    fell = {}
    for weights in (None, "balanced"):
        zipped, data = zipped_pair(), labelled(64)
        loss = {
            "a": lambda output, y: torch.nn.functional.cross_entropy(output, y),
            "b": lambda output, y: 1e-3 * torch.nn.functional.cross_entropy(output, y),
        }
        sgd = lambda p: torch.optim.SGD(p, 0.5)  # noqa: E731
        history = retrain(zipped, data, 100, loss=loss, weights=weights, teachers={}, optimizer=sgd, batch_size=64)
        fell[weights] = history.losses("b")[-1] / history.losses("b")[0]
    assert fell[None] > 0.9
    assert fell["balanced"] < 0.6


def test_balancing_does_not_depend_on_the_unit_of_a_loss():
    ends = []
    for unit in (1.0, 64.0):  # a power of two, so that only the factors' own rounding is left
        zipped = zipped_pair()
        loss = {
            "a": lambda output, y, unit=unit: unit * torch.nn.functional.cross_entropy(output, y),
            "b": torch.nn.functional.cross_entropy,
        }
        history = retrain(zipped, labelled(), 20, loss=loss, weights="balanced", teachers={}, lr=1e-2)
        ends.append([history.losses("a")[-1] / unit, history.losses("b")[-1]])
    assert ends[0] == pytest.approx(ends[1], rel=0.02)  # the first step is taken before the losses are known


def test_a_weight_of_zero_leaves_a_task_out():
    zipped = zipped_pair()
    head = zipped["b"].head.weight.clone()
    retrain(zipped, inputs(), 3, weights={"b": 0.0}, optimizer=lambda p: torch.optim.SGD(p, 0.1))
    assert torch.equal(zipped["b"].head.weight, head)
    assert distance(zipped, inputs()) > 0


# -- TensorBoard -----------------------------------------------------------------------------------------------


def test_tensorboard_writes_what_log_gives(tmp_path):
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with tensorboard.SummaryWriter(str(tmp_path)) as writer:
        log = lambda step, scalars: [writer.add_scalar(name, value, step) for name, value in scalars.items()]  # noqa: E731
        history = retrain(zipped_pair(), inputs(8), 3, log=log, validate=lambda z: 1.0)
        writer.add_scalars("last", history[-1].scalars(), 3)
    events = event_accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    assert {"loss/a", "loss/b", "lr", "validation/score"} <= set(events.Tags()["scalars"])
    assert [event.value for event in events.Scalars("loss/a")] == pytest.approx(history.losses("a"), rel=1e-6)
