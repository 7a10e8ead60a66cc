"""Retraining: what it minimises, what it takes, what it leaves as it was."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from handmade import images, share_layer, small, zipped_pair, zipped_three
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from mtzip.history import History
from mtzip.loaders import ShuffledBatches, cycle, loader_of
from mtzip.losses import distillation_loss, kl_loss, label_loss, relative_mse
from mtzip.retrain import gentle, retrain
from mtzip.share import ZippedNetwork
from mtzip.zip import zip_networks


def inputs(count: int = 64) -> dict[str, torch.Tensor]:
    return {task: images(seed, count) for seed, task in enumerate("ab")}


def labelled(count: int = 64) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Inputs with class indices (3 classes in either task)."""
    return {task: (x, x.flatten(1)[:, :3].argmax(1)) for task, x in inputs(count).items()}


def weights_of(zipped: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in zipped.state_dict().items()}


def assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    different = [key for key in got if not torch.equal(got[key], expected[key])]
    assert not different


def distance(zipped: ZippedNetwork, data: dict[str, torch.Tensor]) -> float:
    """Mean squared distance to the originals' outputs, summed over tasks."""
    with torch.no_grad():
        return sum(float(F.mse_loss(zipped[t](x), zipped.originals[t](x))) for t, x in data.items())


# -- it learns -------------------------------------------------------------------------------------------------


def test_distils_from_the_originals_without_labels():
    zipped = zipped_pair()
    before = distance(zipped, inputs())
    history = retrain(zipped, inputs(), 150, lr=1e-2, batch_size=32)
    assert distance(zipped, inputs()) < 0.2 * before
    assert len(history) == 150
    assert history[-1].total < 0.2 * history[0].total


def test_learns_labels_without_teachers():
    zipped = zipped_pair()
    data = labelled()

    def error():
        return sum(float((zipped[t](x).argmax(1) != y).float().mean()) for t, (x, y) in data.items())

    before = error()
    retrain(zipped, data, 100, teachers={}, lr=2e-2)
    assert error() < 0.5 * before


def test_labels_and_teachers_are_added_up():
    zipped, data = zipped_pair(), labelled(16)
    history = retrain(zipped, data, 1, batch_size=16, weights={"b": 0.5})
    zipped = zipped_pair()
    for task, factor in (("a", 1.0), ("b", 0.5)):
        x, y = data[task]
        with torch.no_grad():
            out, wanted = zipped[task](x), zipped.originals[task](x)
            expected = factor * (F.cross_entropy(out, y) + relative_mse(out, wanted))
        assert history[0].losses[task] == pytest.approx(float(expected), rel=1e-5)


def test_users_loss_gets_output_and_targets():
    seen = []

    def loss(output, targets):
        seen.append((output.shape, targets.shape))
        return (output.sum(1) - targets).square().mean()

    data = {task: (x, torch.ones(len(x))) for task, x in inputs(8).items()}
    retrain(zipped_pair(), data, 1, loss={"a": loss, "b": loss}, batch_size=8, teachers={})
    assert seen == [((8, 3), (8,)), ((8, 4), (8,))]


def test_one_step_is_one_step_of_the_summed_loss():
    zipped, reference, data = zipped_pair(), zipped_pair(), labelled(16)
    retrain(zipped, data, 1, teachers={}, optimizer=lambda p: torch.optim.SGD(p, lr=0.1), batch_size=16)
    reference.train()
    for network in reference.networks.values():
        network.norm.eval()
    sum(F.cross_entropy(reference[t](x), y) for t, (x, y) in data.items()).backward()
    torch.optim.SGD(reference.parameters(), lr=0.1).step()
    for key, value in reference.state_dict().items():
        torch.testing.assert_close(zipped.state_dict()[key], value, rtol=1e-5, atol=1e-6)


def test_three_tasks_with_teachers_of_the_user():
    zipped = zipped_three()
    teachers = {name: small(3 + i, i) for i, name in enumerate("abc")}
    data = {task: images(i, 32) for i, task in enumerate("abc")}
    history = retrain(zipped, data, 60, teachers=teachers, lr=1e-2)
    assert history.tasks == ("a", "b", "c")
    assert history[-1].total < 0.5 * history[0].total


# -- what it takes ---------------------------------------------------------------------------------------------


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
    batches = cycle("a", loader)
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


def test_teachers_elsewhere_are_copied_to_the_networks_type():
    zipped = zipped_pair().double()
    data = {task: x.double() for task, x in inputs(16).items()}
    retrain(zipped, data, 2)
    assert next(zipped.originals["a"].parameters()).dtype == torch.float32


# -- losses ----------------------------------------------------------------------------------------------------


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


def test_distillation_is_zero_for_the_teacher_itself_and_has_the_right_gradient():
    teacher = torch.randn(6, 4, dtype=torch.float64)
    for kind in ("kl", "mse"):
        loss = distillation_loss(teacher.clone(), teacher, None, kind, 2.0, "a")
        assert float(loss) == pytest.approx(0, abs=1e-12)
    output = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda o: kl_loss(o, teacher, 1, 3.0), output)
    p = torch.softmax(teacher / 3, 1)
    expected = 9 * (p * (p.log() - torch.log_softmax(output / 3, 1))).sum(1).mean()
    torch.testing.assert_close(kl_loss(output, teacher, 1, 3.0), expected)


def test_relative_mse_does_not_depend_on_the_scale_of_a_task():
    teacher, output = torch.randn(16, 3), torch.randn(16, 3)
    torch.testing.assert_close(relative_mse(output, teacher), relative_mse(1000 * output, 1000 * teacher))
    assert torch.isfinite(relative_mse(torch.ones(4, 2), torch.zeros(4, 2)))
    assert torch.isfinite(relative_mse(torch.ones(1, 2), torch.ones(1, 2)))


def test_kinds_of_distillation():
    output, teacher, classes = torch.randn(8, 3), torch.randn(8, 3), torch.randint(0, 3, (8,))
    assert distillation_loss(output, teacher, classes, "kl", 2.0, "a") == kl_loss(output, teacher, 1, 2.0)
    assert distillation_loss(output, teacher, classes, "mse", 2.0, "a") == relative_mse(output, teacher)
    images_, wanted = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    assert distillation_loss(images_, wanted, None, "kl", 2.0, "a") == kl_loss(images_, wanted, 1, 2.0)
    tokens, wanted = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    assert distillation_loss(tokens, wanted, torch.zeros(2, 5).long(), "kl", 2.0, "a") == kl_loss(
        tokens, wanted, -1, 2.0
    )
    assert len(retrain(zipped_pair(), labelled(8), 1, distillation="kl")) == 1
    with pytest.raises(ValueError, match="use distillation='mse'"):
        distillation_loss(output[:, :1], teacher[:, :1], None, "kl", 2.0, "a")
    with pytest.raises(ValueError, match=r"must give outputs \[8, 3\].*got \[8, 2\]"):
        distillation_loss(output, teacher[:, :2], None, "kl", 2.0, "a")


# -- what it leaves as it was ----------------------------------------------------------------------------------


def test_every_module_keeps_its_mode_and_gradients_are_gone():
    zipped = zipped_pair()
    zipped.train()
    zipped["a"].norm.eval()
    zipped["b"].eval()
    zipped.originals["a"].train()
    found = {module: module.training for module in (*zipped.modules(), *zipped.originals["a"].modules())}
    modes = []
    retrain(zipped, inputs(8), 1, log=lambda _: modes.extend((zipped["b"].training, zipped["b"].norm.training)))
    assert modes == [True, False]
    assert all(module.training == training for module, training in found.items())
    with pytest.raises(ZeroDivisionError):
        retrain(zipped, inputs(8), 1, log=lambda _: 1 / 0)
    assert all(module.training == training for module, training in found.items())
    assert all(p.grad is None for p in zipped.parameters())


def test_teachers_never_change():
    zipped = zipped_pair()
    before = {task: copy.deepcopy(network.state_dict()) for task, network in zipped.originals.items()}
    retrain(zipped, inputs(8), 3, batchnorm="train")
    for task, network in zipped.originals.items():
        assert_same(network.state_dict(), before[task])


@pytest.mark.parametrize(("batchnorm", "moves"), [("frozen", False), ("train", True)])
def test_batchnorm_statistics(batchnorm, moves):
    zipped = zipped_pair()
    mean, gamma = zipped["a"].norm.running_mean.clone(), zipped["a"].norm.weight.detach().clone()
    retrain(zipped, inputs(16), 3, batchnorm=batchnorm)
    assert torch.equal(zipped["a"].norm.running_mean, mean) != moves
    assert not torch.equal(zipped["a"].norm.weight, gamma)


def test_frozen_parameters_stay():
    zipped = zipped_pair()
    zipped["a"].conv.requires_grad_(False)  # the shared filters too
    before = weights_of(zipped)
    retrain(zipped, inputs(16), 3)
    for key, value in zipped.state_dict().items():
        frozen = "norm.running" in key or "num_batches" in key or (".conv." in key and "networks.b" not in key)
        assert torch.equal(value, before[key]) == frozen, key
    zipped.requires_grad_(False)
    with pytest.raises(ValueError, match="requires_grad=True, got none"):
        retrain(zipped, inputs(), 1)


def test_a_task_with_nothing_to_train_rides_along():
    zipped = zipped_pair()
    zipped["a"].requires_grad_(False)
    assert len(retrain(zipped, inputs(8), 2)) == 2


def test_same_seed_same_weights_and_the_callers_generator_is_not_disturbed():
    runs = []
    for seed in (3, 3, 4):
        zipped = zipped_pair()
        zipped["a"].head = nn.Sequential(nn.Dropout(0.5), zipped["a"].head)
        loaders = {t: DataLoader(TensorDataset(x), 4, shuffle=True) for t, x in inputs().items()}
        torch.manual_seed(len(runs))
        state = torch.get_rng_state()
        retrain(zipped, loaders, 6, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        runs.append(weights_of(zipped))
    assert_same(runs[0], runs[1])
    assert any(not torch.equal(runs[0][key], runs[2][key]) for key in runs[0])
    torch.manual_seed(0)
    state = torch.get_rng_state()
    retrain(zipped_pair(), inputs(), 1, seed=None)
    assert not torch.equal(torch.get_rng_state(), state)


def test_works_where_the_caller_has_switched_gradients_off():
    zipped = zipped_pair()
    before = weights_of(zipped)
    with torch.no_grad():
        retrain(zipped, inputs(8), 1)
    assert any(not torch.equal(value, before[key]) for key, value in zipped.state_dict().items())


# -- numbers that are none -------------------------------------------------------------------------------------


def test_a_batch_with_nan_stops_with_step_and_task_and_good_weights():
    bad = [images(i, 8) for i in range(4)]
    bad[2][3, 0, 0, 0] = math.nan
    zipped, seen = zipped_pair(), []
    with pytest.raises(FloatingPointError, match=r"step 2, task 'b': the loss is nan; the batch holds NaN or Inf"):
        retrain(zipped, {"a": images(), "b": bad}, 4, log=lambda step: seen.append(step.step))
    assert seen == [0, 1]
    reference = zipped_pair()
    retrain(reference, {"a": images(), "b": bad}, 1, scheduler=lambda o: _like(o, 4))
    assert_same(weights_of(zipped), weights_of(reference))  # the last weights at which every loss was finite


def _like(optimizer, steps):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: gentle(step, steps))


def test_divergence_stops_with_good_weights():
    zipped = zipped_pair()
    with pytest.raises(FloatingPointError, match=r"task '[ab]': .* lower the learning rate"):
        retrain(zipped, inputs(), 20, optimizer=lambda p: torch.optim.SGD(p, lr=1e12))
    assert all(torch.isfinite(tensor).all() for tensor in zipped.state_dict().values())


def test_divergence_in_the_last_step_too():
    class Breaks(torch.optim.SGD):
        def step(self):
            self.param_groups[0]["params"][0].data.fill_(math.inf)

    zipped = zipped_pair()
    before = weights_of(zipped)
    with pytest.raises(FloatingPointError, match="step 0: the weights"):
        retrain(zipped, inputs(), 1, optimizer=lambda p: Breaks(p, lr=0.1))
    assert_same(weights_of(zipped), before)


def test_a_gradient_that_is_not_finite():
    def loss(output, _):
        return (output.sum() * 0).sqrt()  # 0 with a gradient of 0 * inf

    zipped = zipped_pair()
    before = weights_of(zipped)
    with pytest.raises(FloatingPointError, match="step 0, task 'a': a gradient is not finite"):
        retrain(zipped, labelled(8), 2, loss=loss, teachers={})
    assert_same(weights_of(zipped), before)


@pytest.mark.parametrize("when", ["log", "step"])
def test_interrupt_leaves_finite_weights_and_is_passed_on(when):
    class Interrupted(torch.optim.SGD):
        def step(self):
            self.param_groups[0]["params"][0].data.fill_(math.nan)
            raise KeyboardInterrupt

    def log(step):
        if step.step == 1:
            raise KeyboardInterrupt

    zipped = zipped_pair()
    before = weights_of(zipped)
    arguments = {"log": log} if when == "log" else {"optimizer": lambda p: Interrupted(p, lr=0.1)}
    with pytest.raises(KeyboardInterrupt):
        retrain(zipped, inputs(), 3, **arguments)
    after = weights_of(zipped)
    assert all(torch.isfinite(tensor).all() for tensor in after.values())
    assert any(not torch.equal(after[key], before[key]) for key in after) == (when == "log")


# -- optimiser, schedule, history ------------------------------------------------------------------------------


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
    history = retrain(zipped_pair(), inputs(8), 3, log=rows.append)
    assert list(history) == rows
    assert history.losses("a") == [row.losses["a"] for row in rows]
    assert history[0].seconds <= history[2].seconds == history.seconds
    assert History.from_dict(history.to_dict()) == history
    assert "3 steps" in str(history)
    assert str(History(("a",))) == "no steps"


# -- errors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps must be a positive integer, got 0"),
        ({"steps": 1.5}, ValueError, "steps must be a positive integer, got 1.5"),
        ({"batch_size": 0}, ValueError, "batch_size must be"),
        ({"loaders": [1]}, TypeError, "must map every task to its batches, got list"),
        ({"loaders": {"a": images()}}, ValueError, "takes one batch of each; missing 'b'"),
        ({"loaders": {"a": images(), "b": images(), "c": images()}}, KeyError, "a key of loaders.*got 'c'"),
        ({"loaders": {"a": images(), "b": 3}}, TypeError, r"loaders\['b'\] must be a DataLoader.*got int"),
        ({"loaders": {"a": images(), "b": []}}, ValueError, r"loaders\['b'\] must give at least one batch"),
        ({"loaders": {"a": images(), "b": images()[:0]}}, ValueError, r"loaders\['b'\] must give at least one batch"),
        ({"loaders": {"a": images(), "b": [object()]}}, TypeError, r"loaders\['b'\]: a batch must be"),
        ({"loaders": {"a": images(), "b": torch.tensor(1.0)}}, ValueError, r"loaders\['b'\]: a batch must hold"),
        ({"loaders": {"a": images(), "b": (images(), torch.zeros(3))}}, ValueError, "got 8 inputs and 3 targets"),
        ({"teachers": {"x": small()}}, KeyError, "a key of teachers must be one of 'a', 'b', got 'x'"),
        ({"teachers": {}}, ValueError, "task 'a' has neither labels nor a teacher.*as teachers="),
        ({"weights": {"x": 1.0}}, KeyError, "a key of weights"),
        ({"weights": {"a": -1.0}}, ValueError, r"weights\['a'\] must be a finite number >= 0, got -1.0"),
        ({"loss": {"x": F.mse_loss}}, KeyError, "a key of loss"),
        ({"loss": F.mse_loss}, ValueError, "loss= of task 'a' needs targets"),
        ({"distillation": "features"}, ValueError, "must be 'mse' or 'kl', got 'features'"),
        ({"temperature": 0.0}, ValueError, "temperature must be > 0"),
        ({"batchnorm": "eval"}, ValueError, "must be 'frozen' or 'train', got 'eval'"),
    ],
)
def test_errors_say_what_was_wrong(arguments, error, message):
    zipped = zipped_pair()
    before = weights_of(zipped)
    with pytest.raises(error, match=message):
        retrain(zipped, **({"loaders": inputs(8), "steps": 1} | arguments))
    assert_same(weights_of(zipped), before)


def test_other_errors():
    with pytest.raises(TypeError, match="must be a ZippedNetwork, got Small; make one with mtzip"):
        retrain(small(), inputs(), 1)
    with pytest.raises(ValueError, match=r"loss= of task 'a' must return a scalar tensor, got \[8\]"):
        retrain(zipped_pair(), labelled(8), 1, loss=lambda o, t: F.cross_entropy(o, t, reduction="none"), teachers={})
    generator = (batch for batch in images(0, 12).split(4))
    with pytest.raises(ValueError, match="a generator that ended after 3 batches"):
        retrain(zipped_pair(), {"a": images(), "b": generator}, 5)


def test_a_network_without_sharing_can_be_retrained():
    networks = {"a": nn.Sequential(nn.Linear(3, 2)), "b": nn.Sequential(nn.Linear(3, 2))}
    data = {task: torch.randn(8, 3) for task in networks}
    teachers = copy.deepcopy(networks)
    assert len(retrain(ZippedNetwork(networks, None), data, 1, teachers=teachers)) == 1
    share_layer(networks, "0", [((0, 1), 2)], [((0, 1), 3)], bias="shared")
    assert len(retrain(ZippedNetwork(networks, None), data, 1, teachers=teachers)) == 1


def test_shuffled_batches_of_nothing_are_none():
    assert list(ShuffledBatches("a", loader_of("a", images(), 4).data.narrow(0, 0), 4)) == []


# -- after a real zip ------------------------------------------------------------------------------------------


def test_a_zip_is_retrained():
    data = inputs(256)
    zipped = zip_networks({"a": small(3, 0), "b": small(4, 1)}, data)
    before = distance(zipped, data)
    history = retrain(zipped, data, 100)
    assert distance(zipped, data) < 0.9 * before
    assert history[-1].total < history[0].total
    assert not any(module.training for module in zipped.modules())
