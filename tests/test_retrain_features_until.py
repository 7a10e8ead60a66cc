"""``features_until``: first features and outputs, then outputs alone."""

from __future__ import annotations

import copy

import pytest
import torch
from nets import mlp, noise, seeded
from retraining import Killed, assert_same, distance, weights_of

import mtzip
from mtzip.retraining.retrain import retrain

COUNT = 96


def data(seed: int = 0) -> dict[str, torch.Tensor]:
    return {task: noise(COUNT, 6, seed=seed + at) for at, task in enumerate("ab")}


def zipped_mlps() -> mtzip.ZippedNetwork:
    return mtzip.zip_networks({t: seeded(lambda: mlp(6, (16, 12), 3), seed) for seed, t in enumerate("ab")}, data())


@pytest.mark.parametrize(("until", "same_as"), [(0.0, "outputs"), (1.0, "both")])
def test_the_ends_are_what_there_was(until, same_as):
    zipped = zipped_mlps()
    twin = copy.deepcopy(zipped)
    retrain(zipped, data(), 4, distill="both", features_until=until)
    retrain(twin, data(), 4, distill=same_as)
    assert_same(weights_of(zipped), weights_of(twin))


def test_the_loss_of_later_steps_is_that_of_outputs():
    """With steps that move nothing the terms can be read off; half of five steps is two, as Python rounds."""
    zipped = zipped_mlps()

    def losses(**settings):
        frozen = torch.optim.SGD(zipped.parameters(), 0.0)
        return retrain(zipped, data(), 5, optimizer=frozen, batch_size=COUNT, **settings).losses("a")

    both, outputs = losses(distill="both"), losses()
    assert both[0] > 1.01 * outputs[0]
    assert losses(distill="both", features_until=0.5) == pytest.approx([*both[:2], *outputs[2:]])


def test_outputs_end_nearer_where_features_cannot_be_met():
    """All neurons of two networks in one set, without a private scale: too little room for both tasks' features."""
    networks = {t: seeded(lambda: mlp(6, (16, 12), 3), seed) for seed, t in enumerate("ab")}
    zipped = mtzip.zip_networks(networks, data(), affine=False, reconstructions=0)
    twin = copy.deepcopy(zipped)
    retrain(zipped, data(), 200, distill="both", features_until=0.5, lr=5e-3)
    retrain(twin, data(), 200, distill="both", lr=5e-3)
    assert distance(zipped, data()) < 0.9 * distance(twin, data())


@pytest.mark.parametrize("weights", [None, "balanced"])
def test_a_run_goes_on_from_either_side(weights, tmp_path):
    settings = {"distill": "both", "features_until": 0.5, "batch_size": 16, "weights": weights}
    for kill in (3, 6, 9, None):  # the change is behind the sixth of twelve steps
        zipped = zipped_mlps()

        def log(step, _, kill=kill):
            if step == kill:
                raise Killed

        arguments = {"checkpoint": tmp_path / "run.ckpt", "checkpoint_every": 1, "log": log, **settings}
        if kill is None:
            retrain(zipped, data(), 12, **arguments)
        else:
            with pytest.raises(Killed):
                retrain(zipped, data(), 12, **arguments)
    alone = zipped_mlps()
    retrain(alone, data(), 12, **settings)
    assert_same(weights_of(zipped), weights_of(alone))
    with pytest.raises(ValueError, match="features_until"):
        retrain(zipped, data(), 12, checkpoint=tmp_path / "run.ckpt", **settings | {"features_until": 0.25})


def test_the_teacher_is_asked_once_a_sample_where_later_steps_use_them_all():
    zipped = zipped_mlps()
    rows = []
    handle = zipped.originals["a"].register_forward_hook(lambda module, args, output: rows.append(len(output)))
    retrain(zipped, data(), 20, distill="both", features_until=0.25, batch_size=16)
    handle.remove()
    assert sum(rows) == 16 + 5 * 16 + COUNT  # the spread, steps with features, every sample for those without


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"features_until": 1.5}, "features_until must be a fraction of the steps, from 0 to 1, got 1.5"),
        ({"features_until": -0.1}, "features_until must be a fraction"),
        ({"features_until": float("nan")}, "features_until must be a fraction"),
        ({"features_until": "half"}, "features_until must be a fraction"),
        ({"features_until": True}, "features_until must be a fraction"),
        ({"features_until": 0.5, "distill": "features"}, "features_until is for distill='both', got .*='features'"),
        ({"features_until": 0.5, "distill": "outputs"}, "features_until is for distill='both', got .*='outputs'"),
    ],
)
def test_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        retrain(zipped_mlps(), data(), 2, **{"distill": "both"} | settings)
