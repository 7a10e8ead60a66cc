"""What retraining minimises."""

from __future__ import annotations

import pytest
import torch
from handmade import zipped_pair
from retraining import labelled
from torch.nn import functional as F

from mtzip.retraining.losses import Spread, distillation_loss, kl_loss, label_loss, relative_mse
from mtzip.retraining.retrain import retrain


def test_label_loss_of_every_layout():
    logits, classes = torch.randn(4, 5), torch.randint(0, 5, (4,))
    assert label_loss(logits, classes, "a") == F.cross_entropy(logits, classes)
    assert label_loss(logits, classes.to(torch.uint8), "a") == F.cross_entropy(logits, classes)
    dense, pixels = torch.randn(2, 5, 3, 3), torch.randint(0, 5, (2, 3, 3))
    assert label_loss(dense, pixels, "a") == F.cross_entropy(dense, pixels)
    tokens, ids = torch.randn(2, 7, 5), torch.randint(0, 5, (2, 7))
    torch.testing.assert_close(label_loss(tokens, ids, "a"), F.cross_entropy(tokens.flatten(0, 1), ids.flatten()))
    values, targets = torch.randn(4, 1), torch.randn(4, dtype=torch.float64)
    torch.testing.assert_close(label_loss(values, targets, "a"), F.mse_loss(values[:, 0], targets.float()))


@pytest.mark.parametrize(
    ("output", "targets"),
    [
        (torch.randn(4, 5), torch.randn(4)),
        (torch.randn(4, 5), torch.zeros(3, dtype=torch.long)),
        (torch.randn(4, 1), torch.zeros(4, dtype=torch.long)),
        (torch.randn(4), torch.zeros(4, dtype=torch.long)),
        (torch.randn(4, 5), torch.zeros(4, dtype=torch.bool)),
    ],
)
def test_label_loss_says_which_shapes_it_takes(output, targets):
    with pytest.raises(ValueError, match=r"task 'a'.*got.*pass loss="):
        label_loss(output, targets, "a")
    with pytest.raises(TypeError, match="must be a tensor, got list"):
        label_loss(output, [1, 2], "a")


def spread_of(*batches: torch.Tensor) -> float:
    spread = Spread()
    for batch in batches:
        spread.add(batch)
    return spread.value()


def test_distillation_is_zero_for_the_teacher_itself_and_has_the_right_gradient():
    teacher = torch.randn(6, 4, dtype=torch.float64)
    for kind in ("kl", "mse"):
        loss = distillation_loss(teacher.clone(), teacher, None, kind, 2.0, 1.0, "a")
        assert float(loss) == pytest.approx(0, abs=1e-12)
    output = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda o: kl_loss(o, teacher, 1, 3.0), output)
    p = torch.softmax(teacher / 3, 1)
    expected = 9 * (p * (p.log() - torch.log_softmax(output / 3, 1))).sum(1).mean()
    torch.testing.assert_close(kl_loss(output, teacher, 1, 3.0), expected)
    loss, expected = relative_mse(output, teacher, 0.5), 2 * (output - teacher).square().mean()
    torch.testing.assert_close(loss, expected)
    got = torch.autograd.grad(3 * loss, output, retain_graph=True)
    torch.testing.assert_close(got, torch.autograd.grad(3 * expected, output))
    with pytest.raises(RuntimeError, match="inplace"):  # its gradient takes the difference's place: only once
        torch.autograd.grad(loss, output)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_relative_mse_of_half_precision_is_summed_in_float32(dtype):
    """100,000 terms near 1: a sum in half precision would stop growing at some hundreds, or be infinite."""
    output, teacher = torch.ones(100, 1000, dtype=dtype, requires_grad=True), torch.zeros(100, 1000, dtype=dtype)
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = relative_mse(output, teacher, 0.5)
        assert loss.dtype == torch.float32
        assert float(loss.detach()) == pytest.approx(2, rel=1e-5)
        (gradient,) = torch.autograd.grad(loss, output)
        assert gradient.dtype == dtype
        torch.testing.assert_close(gradient.float(), torch.full_like(output, 4e-5).float(), rtol=1e-2, atol=1e-7)


def test_relative_mse_of_float16_has_the_range_of_float32():
    """The difference is beyond float16, and so is what every one of four million elements gets, but for its scale."""
    output = torch.full((1,), 6e4, dtype=torch.float16, requires_grad=True)
    assert float(relative_mse(output, -output.detach(), 1.0).detach()) == pytest.approx(1.44e10, rel=1e-2)
    many = torch.zeros(2048, 2048, dtype=torch.float16, requires_grad=True)
    (gradient,) = torch.autograd.grad(relative_mse(many, torch.full_like(many, -3), 1.0), many)
    expected = torch.tensor(6 / 2048**2).to(torch.float16)
    assert torch.equal(gradient, expected.expand_as(gradient))


def test_nothing_to_compare_is_not_a_perfect_match():
    assert relative_mse(torch.zeros(0, 3), torch.zeros(0, 3), 1.0).isnan()


def test_relative_mse_does_not_depend_on_the_scale_of_a_task():
    teacher, output = torch.randn(16, 3), torch.randn(16, 3)
    got = [relative_mse(k * output, k * teacher, spread_of(k * teacher)) for k in (1, 1000)]
    torch.testing.assert_close(*got)
    for same in (torch.zeros(4, 2), torch.ones(1, 2), torch.ones(4)):  # a teacher that always says the same
        assert 0 < spread_of(same) < 2


def test_spread_is_the_variance_about_each_channels_mean_however_it_is_cut_into_batches():
    for shape, channels in (((12, 3), 1), ((12, 5, 3), 2), ((12, 3, 4, 4), 1), ((12,), None)):
        teacher = torch.randn(shape, dtype=torch.float64) * 3 + 7
        rows = teacher.view(-1, 1) if channels is None else teacher.movedim(channels, -1).reshape(-1, shape[channels])
        expected = float(rows.var(0, correction=0).mean())
        assert spread_of(teacher) == pytest.approx(expected, rel=1e-4)
        assert spread_of(*teacher.split([5, 7])) == pytest.approx(spread_of(teacher), rel=1e-9)


def test_kinds_of_distillation():
    output, teacher, classes = torch.randn(8, 3), torch.randn(8, 3), torch.randint(0, 3, (8,))
    assert distillation_loss(output, teacher, classes, "kl", 2.0, 1.0, "a") == kl_loss(output, teacher, 1, 2.0)
    assert distillation_loss(output, teacher, classes, "mse", 2.0, 3.0, "a") == relative_mse(output, teacher, 3.0)
    images_, wanted = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    assert distillation_loss(images_, wanted, None, "kl", 2.0, 1.0, "a") == kl_loss(images_, wanted, 1, 2.0)
    tokens, wanted = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    assert distillation_loss(tokens, wanted, torch.zeros(2, 5).long(), "kl", 2.0, 1.0, "a") == kl_loss(
        tokens, wanted, -1, 2.0
    )
    assert len(retrain(zipped_pair(), labelled(8), 1, distillation="kl")) == 1
    with pytest.raises(ValueError, match="use distillation='mse'"):
        distillation_loss(output[:, :1], teacher[:, :1], None, "kl", 2.0, 1.0, "a")
    with pytest.raises(ValueError, match=r"must give outputs \[8, 3\].*got \[8, 2\]"):
        distillation_loss(output, teacher[:, :2], None, "kl", 2.0, 1.0, "a")
