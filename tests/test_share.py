"""The zipped network: user's classes, blocks stored once, gradients, copies, state dicts."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from handmade import ALL, BOTH, Small, images, share_layer, small, zipped_pair, zipped_three
from torch import nn

from mtzip.network.layout import Layout
from mtzip.network.leaf import SharedLayer, leaves
from mtzip.network.zipped import ZippedNetwork

MADE = {"plain": lambda: zipped_pair(False), "scaled": zipped_pair, "three tasks": zipped_three}


@pytest.fixture(params=MADE, name="zipped")
def _zipped(request) -> ZippedNetwork:
    return MADE[request.param]()


def outputs(zipped: ZippedNetwork) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        dtype = next(zipped.parameters()).dtype
        return zipped(images(dtype=dtype))


def assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for task in expected:
        assert torch.equal(got[task], expected[task]), task


def shared_parameters(zipped: ZippedNetwork) -> list[nn.Parameter]:
    everything = dict(zipped.named_parameters(remove_duplicate=False))
    return [everything[aliases[0]] for aliases in zipped.shared_keys().values()]


# -- layers ----------------------------------------------------------------------------------------------------


def test_user_classes_and_isinstance_of_layers(zipped):
    for task in zipped:
        assert type(zipped[task]) is Small
        assert isinstance(zipped[task].conv, nn.Conv2d)
        assert isinstance(zipped[task].hidden, nn.Linear)
        assert type(zipped[task].head) is nn.Linear
    assert "SharedConv2d(2, 6, kernel_size=(3, 3)" in repr(zipped)


def test_unscaled_layers_compute_what_their_dense_weight_computes():
    """The first task gets all its own blocks, so the leaf must give back its weight; the second one the mixture."""
    zipped = zipped_pair(scaled=False)
    original = zipped.originals
    assert torch.equal(zipped["a"].conv.weight, original["a"].conv.weight)
    assert torch.equal(zipped["a"].hidden.weight, original["a"].hidden.weight)
    assert torch.equal(zipped["b"].conv.weight[:4], original["a"].conv.weight[:4])
    assert torch.equal(zipped["b"].conv.weight[4:], original["b"].conv.weight[4:])
    assert torch.equal(zipped["b"].hidden.weight[:, :16], original["a"].hidden.weight[:, :16])
    assert torch.equal(zipped["b"].hidden.weight[:, 16:], original["b"].hidden.weight[:, 16:])
    assert torch.equal(zipped["b"].conv.bias, original["b"].conv.bias)
    assert torch.equal(zipped["a"](images()), original["a"](images()))


def test_wholly_shared_weight_is_the_parameter_itself():
    networks = {"a": small(3, 0), "b": small(3, 1)}
    share_layer(networks, "hidden", ALL, [(BOTH, 24)], bias="shared")
    a, b = (network.hidden for network in networks.values())
    assert a.is_whole
    assert isinstance(a.weight, nn.Parameter)
    assert a.weight is b.weight
    assert a.bias is b.bias
    assert torch.equal(b(torch.eye(24)), a(torch.eye(24)))


@pytest.mark.parametrize("layer", [nn.Linear(6, 5), nn.Conv1d(6, 5, 3, stride=2), nn.Conv2d(6, 5, 3, padding="same")])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("bias", ["private", "shared", None])
def test_forward_equals_the_plain_layer_with_the_assembled_weight(layer, scaled, whole, bias):
    networks = {"a": nn.Sequential(copy.deepcopy(layer)), "b": nn.Sequential(copy.deepcopy(layer))}
    rows = [(BOTH, 5)] if whole else [(BOTH, 3), ((0,), 2), ((1,), 2)]
    columns = [(BOTH, 6)] if whole else [(BOTH, 2), ((0,), 1), ((1,), 1), (BOTH, 3)]
    share_layer(networks, "0", rows, columns, bias, scaled)
    x = torch.randn(4, 6, *[9] * (layer.weight.dim() - 2))
    for network in networks.values():
        leaf = network[0]
        plain = leaf.dense()
        assert type(plain) is type(layer)
        assert leaf.is_whole == whole
        torch.testing.assert_close(leaf(x), plain(x), rtol=1e-5, atol=1e-6)


def test_groups_dilation_and_padding_mode_survive():
    layer = nn.Conv2d(4, 6, 3, padding=2, dilation=2, groups=2, padding_mode="circular")
    networks = {"a": nn.Sequential(layer), "b": nn.Sequential(copy.deepcopy(layer))}
    share_layer(networks, "0", [(BOTH, 6)], [(BOTH, 2)], scaled=True)
    leaf = networks["a"][0]
    x = torch.randn(2, 4, 7, 7)
    expected = layer(x) - layer.bias.view(-1, 1, 1)
    expected = expected * leaf.scale.view(-1, 1, 1) + layer.bias.view(-1, 1, 1)
    torch.testing.assert_close(leaf(x), expected)


def test_wrap_leaves_the_layer_alone():
    layer = nn.Linear(3, 2)
    before = layer.weight.clone()
    networks = {"a": nn.Sequential(layer), "b": nn.Sequential(nn.Linear(3, 2))}
    share_layer(networks, "0", [(BOTH, 2)], [(BOTH, 3)])
    leaf = networks["a"][0]
    leaf.register_forward_hook(lambda *_: 1 / 0)
    with torch.no_grad():
        leaf.weight.zero_()
    assert torch.equal(layer.weight, before)
    layer(torch.ones(1, 3))  # no hook


def test_a_layer_used_at_two_places_stays_one():
    tied = nn.Linear(4, 4)
    networks = {"a": nn.Sequential(tied, nn.ReLU(), tied), "b": nn.Sequential(nn.Linear(4, 4))}
    share_layer(networks, "0", [(BOTH, 4)], [(BOTH, 4)])
    assert networks["a"][0] is networks["a"][2]
    assert len(list(leaves(networks["a"]))) == 1
    extracted = ZippedNetwork(networks, None).extract("a")
    assert extracted[0] is extracted[2]


def test_layout_to_dict_and_back(zipped):
    for paths in zipped.layouts().values():
        for layout in paths.values():
            assert Layout.from_dict(layout.to_dict()) == layout


# -- gradients -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("layer", [nn.Linear(3, 4), nn.Conv2d(3, 4, 2)])
def test_gradcheck_through_blocks(scaled, layer):
    networks = {"a": nn.Sequential(layer), "b": nn.Sequential(copy.deepcopy(layer))}
    share_layer(networks, "0", [(BOTH, 2), ((0,), 2), ((1,), 2)], [(BOTH, 2), ((0,), 1), ((1,), 1)], "shared", scaled)
    leaf = networks["b"][0].double()
    names = [name for name, _ in leaf.named_parameters()]
    assert len(names) == 5 + scaled
    x = torch.randn(2, 3, *[2] * (layer.weight.dim() - 2), dtype=torch.float64, requires_grad=True)

    def run(x, *values):
        return torch.func.functional_call(leaf, dict(zip(names, values, strict=True)), (x,))

    values = [p.detach().clone().requires_grad_() for p in leaf.parameters()]
    assert torch.autograd.gradcheck(run, (x, *values))


def test_gradient_of_a_shared_block_is_the_sum_over_tasks(zipped):
    x = images()
    alone = {}
    for task in zipped:
        zipped.zero_grad()
        zipped[task](x).square().sum().backward()
        alone[task] = [None if p.grad is None else p.grad.clone() for p in zipped.parameters()]
    zipped.zero_grad()
    for task in zipped:
        zipped[task](x).square().sum().backward()
    for parameter, *parts in zip(zipped.parameters(), *alone.values(), strict=True):
        expected = sum(part for part in parts if part is not None)
        torch.testing.assert_close(parameter.grad, expected)
    for parameter in shared_parameters(zipped):
        index = next(i for i, p in enumerate(zipped.parameters()) if p is parameter)
        assert sum(parts[index] is not None for parts in alone.values()) > 1


def test_every_parameter_gets_a_gradient_when_all_tasks_run(zipped):
    """What DistributedDataParallel asks for without find_unused_parameters."""
    sum(output.sum() for output in zipped(images()).values()).backward()
    assert all(p.grad is not None for p in zipped.parameters())


# -- the container ---------------------------------------------------------------------------------------------


def test_call_with_a_dict_with_one_input_and_by_task(zipped):
    everything = zipped(images())
    assert tuple(everything) == zipped.tasks
    some = zipped({"b": images()})
    assert list(some) == ["b"]
    assert torch.equal(some["b"], everything["b"])
    assert torch.equal(zipped["b"](images()), everything["b"])
    assert "a" in zipped
    assert "x" not in zipped
    assert len(zipped) == len(list(zipped))


def test_unknown_task_and_impossible_names():
    zipped = zipped_pair()
    with pytest.raises(KeyError, match="'a', 'b', got 'c'"):
        zipped["c"]
    for name in ("", "a.b", "items", "train", 3):
        with pytest.raises(ValueError, match="choose another name"):
            ZippedNetwork({name: small()}, None)


def test_parameters_are_listed_once_and_counted_by_hand():
    zipped = zipped_pair(scaled=True)
    ids = [id(p) for p in zipped.parameters()]
    assert len(ids) == len(set(ids))
    conv = (4 + 2 + 2) * 2 * 9 + 6 + 6  # filters and private biases
    hidden = 5 * 16 + 2 * 5 * 8 + 2 * 5 + 2 * 5  # shared columns, private columns, bias, scale
    norms, heads = 2 * 2 * 6, (5 * 3 + 3) + (5 * 4 + 4)
    assert zipped.parameter_count() == conv + hidden + norms + heads


def test_originals_are_no_submodules_and_can_be_forgotten():
    zipped = zipped_pair()
    inside = set(map(id, zipped.modules()))
    for network in zipped.originals.values():
        assert not inside & set(map(id, network.modules()))
    before = zipped.originals["a"].head.weight.clone()
    zipped.double()
    assert zipped.originals["a"].head.weight.dtype == torch.float32
    assert torch.equal(zipped.originals["a"].head.weight, before)
    zipped.forget_originals()
    assert zipped.originals is None


def test_extract_gives_plain_classes_with_weights_of_their_own(zipped):
    for task in zipped:
        network = zipped.extract(task)
        assert type(network) is Small
        assert not any(isinstance(module, SharedLayer) for module in network.modules())
        assert set(network.state_dict()) >= set(small().state_dict()) - {"hidden.bias"}
        torch.testing.assert_close(network(images()), zipped[task](images()), rtol=1e-5, atol=1e-6)
        taken = {p.untyped_storage().data_ptr() for p in zipped.parameters()}
        assert not taken & {p.untyped_storage().data_ptr() for p in network.parameters()}
    single = {"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)}
    share = {name: nn.Sequential(layer) for name, layer in single.items()}
    share_layer(share, "0", [(BOTH, 2)], [(BOTH, 2)])
    root = ZippedNetwork({name: network[0] for name, network in share.items()}, None)  # the network is the leaf
    assert type(root.extract("a")) is nn.Linear


def test_dtype_moves_everything_and_keeps_sharing(zipped):
    keys = zipped.shared_keys()
    single = outputs(zipped)
    zipped.double()
    assert all(p.dtype == torch.float64 for p in zipped.parameters())
    assert zipped.shared_keys() == keys
    for task, output in outputs(zipped).items():
        torch.testing.assert_close(output.float(), single[task], rtol=1e-4, atol=1e-5)


def test_autocast_keeps_its_type_in_scaled_layers():
    networks = {"a": nn.Sequential(nn.Linear(4, 4)), "b": nn.Sequential(nn.Linear(4, 4))}
    share_layer(networks, "0", [(BOTH, 4)], [(BOTH, 4)], scaled=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert networks["a"](torch.randn(2, 4)).dtype == torch.bfloat16


# -- copies ----------------------------------------------------------------------------------------------------


def _pickled(zipped):
    return pickle.loads(pickle.dumps(zipped))


def _torch_saved(zipped):
    file = io.BytesIO()
    torch.save(zipped, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("way", [copy.deepcopy, _pickled, _torch_saved])
def test_copies_keep_sharing_and_have_their_own_weights(zipped, way):
    new = way(zipped)
    assert new.shared_keys() == zipped.shared_keys()
    assert new.parameter_count() == zipped.parameter_count()
    assert new.layouts() == zipped.layouts()
    assert new.report == zipped.report
    before = outputs(zipped)
    assert_same(outputs(new), before)
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.add_(1.0)
    assert_same(outputs(zipped), before)


def test_copies_and_the_originals():
    zipped = zipped_pair()
    assert copy.deepcopy(zipped).originals["a"] is zipped.originals["a"]
    assert _pickled(zipped).originals is None
    extracted = copy.deepcopy(zipped["a"])  # one task alone is a plain module
    assert torch.equal(extracted(images()), zipped["a"](images()))


# -- state dicts -----------------------------------------------------------------------------------------------


def test_state_dict_keys():
    assert sorted(zipped_pair().state_dict()) == sorted(
        [
            "shared.conv.weight_rows_0_1_columns_0_1",
            "shared.hidden.weight_rows_0_1_columns_0_1",
            "networks.a.conv.weight_rows_0_columns_0",
            "networks.b.conv.weight_rows_1_columns_1",
            "networks.a.hidden.weight_rows_0_1_columns_0",
            "networks.b.hidden.weight_rows_0_1_columns_1",
        ]
        + [f"networks.{t}.{layer}.bias_rows_{i}" for i, t in enumerate("ab") for layer in ("conv", "hidden")]
        + [f"networks.{t}.hidden.scale" for t in "ab"]
        + [f"networks.{t}.head.{name}" for t in "ab" for name in ("weight", "bias")]
        + [f"networks.{t}.norm.{name}" for t in "ab" for name in small().norm.state_dict()]
    )


def test_state_dict_has_each_tensor_once(zipped):
    state = zipped.state_dict()
    pointers = [tensor.data_ptr() for tensor in state.values()]
    assert len(pointers) == len(set(pointers))
    assert sum(t.numel() for t in state.values()) == zipped.parameter_count() + sum(b.numel() for b in zipped.buffers())


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_load_state_dict(zipped, assign, nested):
    source = copy.deepcopy(zipped)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.mul_(1.25)
    keys = zipped.shared_keys()
    if nested:
        holder, from_holder = nn.ModuleDict({"inner": zipped}), nn.ModuleDict({"inner": source})
        assert all(key.startswith("inner.") for key in from_holder.state_dict())
        result = holder.load_state_dict(from_holder.state_dict(), assign=assign)
    else:
        result = zipped.load_state_dict(source.state_dict(), assign=assign)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert zipped.shared_keys() == keys
    assert zipped.parameter_count() == source.parameter_count()
    assert_same(outputs(zipped), outputs(source))


def test_load_state_dict_names_what_is_wrong():
    zipped = zipped_pair()
    state = zipped.state_dict()
    removed = state.pop("shared.hidden.weight_rows_0_1_columns_0_1")
    with pytest.raises(RuntimeError, match=r"Missing.*hidden.weight_rows_0_1_columns_0_1"):
        zipped.load_state_dict(state)
    state["shared.hidden.weight_rows_0_1_columns_0_1"] = removed[1:]
    with pytest.raises(RuntimeError, match="size mismatch"):
        zipped.load_state_dict(state)
    state["shared.hidden.weight_rows_0_1_columns_0_1"] = removed
    state["shared.other"] = removed
    with pytest.raises(RuntimeError, match=r"Unexpected.*shared.other"):
        zipped.load_state_dict(state)
    assert "shared.other" in state  # the caller's dict is not changed


def test_the_same_path_with_different_layers_gets_two_keys():
    """Layer "0" of one task may answer to layer "1" of another, and the other way round."""
    networks = {"a": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), "b": nn.Sequential(nn.Linear(2, 2))}
    for path in "01":
        pair = {"a": nn.Sequential(networks["a"][int(path)]), "b": nn.Sequential(nn.Linear(2, 2))}
        share_layer(pair, "0", [(BOTH, 2)], [(BOTH, 2)])
        networks["a"][int(path)] = pair["a"][0]
        networks["b" if path == "0" else "c"] = pair["b"]
    zipped = ZippedNetwork(networks, None)
    state = zipped.state_dict()
    assert len([key for key in state if key.startswith("shared.")]) == 2
    other = copy.deepcopy(zipped)
    other.load_state_dict(state)


# -- in a training script --------------------------------------------------------------------------------------


def test_an_optimiser_step_moves_all_tasks():
    zipped = zipped_pair()
    before = {task: zipped[task].hidden.weight.detach().clone() for task in zipped}
    optimizer = torch.optim.SGD(zipped.parameters(), lr=0.1)
    zipped["a"](images()).square().sum().backward()
    optimizer.step()
    for task in zipped:
        assert not torch.equal(zipped[task].hidden.weight, before[task])


def test_torch_compile():
    zipped = zipped_pair()
    compiled = torch.compile(zipped["b"], backend="eager", fullgraph=True)
    assert torch.equal(compiled(images()), zipped["b"](images()))


def test_torch_export():
    zipped = zipped_pair()
    program = torch.export.export(zipped["a"], (images(),))
    torch.testing.assert_close(program.module()(images()), zipped["a"](images()))
