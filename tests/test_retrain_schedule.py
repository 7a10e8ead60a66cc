"""Optimiser, schedule and history of retraining."""

from __future__ import annotations

import pytest
import torch
from handmade import small, zipped_pair
from retraining import inputs

from mtzip.retraining.history import History
from mtzip.retraining.optimizers import gentle
from mtzip.retraining.retrain import retrain


def test_default_schedule_is_gentle():
    for steps in (1, 2, 10, 100):
        factors = [gentle(step, steps) for step in range(steps)]
        assert all(0 < factor <= 1 for factor in factors)
        peak = factors.index(max(factors))
        assert factors[: peak + 1] == sorted(factors[: peak + 1])
        assert factors[peak:] == sorted(factors[peak:], reverse=True)
        assert steps < 10 or (factors[0] <= 0.5 and max(factors) == 1 and factors[-1] < 0.1)


def test_users_optimizer_and_scheduler():
    zipped = zipped_pair()
    optimizer = torch.optim.SGD(zipped.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.1)
    history = retrain(zipped, inputs(8), 4, optimizer=optimizer, scheduler=scheduler)
    assert [step.lr for step in history] == pytest.approx([1e-3, 1e-3, 1e-4, 1e-4])
    history = retrain(zipped, inputs(8), 2, optimizer=lambda p: torch.optim.SGD(p, lr=1e-3))
    assert [step.lr for step in history] == [1e-3, 1e-3]
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau
    assert len(retrain(zipped, inputs(8), 2, optimizer=optimizer, scheduler=lambda o: plateau(o))) == 2
    with pytest.raises(ValueError, match="none of them; make it from zipped"):
        retrain(zipped, inputs(8), 1, optimizer=torch.optim.SGD(small().parameters()))
    with pytest.raises(TypeError, match="Optimizer, got list"):
        retrain(zipped, inputs(8), 1, optimizer=lambda p: [p])
    with pytest.raises(ValueError, match="give optimizer= its own learning rate"):
        retrain(zipped, inputs(8), 1, optimizer=optimizer, lr=0.1)


def test_history():
    rows = []
    history = retrain(zipped_pair(), inputs(8), 3, log=lambda *row: rows.append(row))
    assert rows == [(number, row.scalars()) for number, row in enumerate(history, start=1)]
    assert rows[0][1].keys() == {"loss/a", "loss/b", "weight/a", "weight/b", "lr", "seconds"}
    assert history.losses("a") == [row["loss/a"] for _, row in rows]
    assert history[0].seconds <= history[2].seconds == history.seconds
    assert History.from_dict(history.to_dict()) == history
    assert "3 steps" in str(history)
    assert str(History(("a",))) == "no steps"
