"""A zipped network to a file and back: safetensors, with a manifest that says what the tensors are."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..network.layout import Layout
from ..network.leaf import replace_module
from ..network.zipped import ZippedNetwork
from . import safefile
from .manifest import Manifest, leaf_class


def save(zipped: ZippedNetwork, path: str | os.PathLike) -> None:
    """Writes ``zipped`` to a safetensors file, every shared tensor once, with a readable manifest and a checksum.

    The file is written beside ``path`` and renamed, so it is there whole or not at all. The same network gives the
    same bytes. The originals are not in it, nor is any input: of the example inputs their shapes and types.

    Args:
        zipped: the network.
        path: the file, usually ``.safetensors``; one that exists is replaced.

    Raises:
        OSError: the file cannot be written.
        TypeError: no zipped network; something in its state dict that is no tensor, or of a type files do not have.
    """
    if not isinstance(zipped, ZippedNetwork):
        got = type(zipped).__name__
        raise TypeError(f"zipped must be a ZippedNetwork, got {got}; a wrapper (DDP, torch.compile) has it inside")
    manifest = Manifest.of(zipped)
    tensors = {}
    for key, tensor in zipped.state_dict().items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{key} must be a tensor, got {type(tensor).__name__}; get_extra_state cannot be saved")
        if key not in manifest.aliases:
            tensors[key] = tensor
    safefile.write(path, tensors, manifest.to_dict())


def load(path: str | os.PathLike, networks: Mapping[str, nn.Module]) -> ZippedNetwork:
    """Reads a zipped network that :func:`save` wrote. Nothing in the file is executed.

    Args:
        path: the file.
        networks: task to an instance of the class its network had, made with the same arguments; what its weights are
            does not matter, and it is not changed. The zipped network has the types of the file, the devices of these
            instances and their training or evaluation mode.

    Returns:
        The zipped network: the same outputs, the same sharing. Its ``originals`` are None.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is another file, damaged or altered, or of other networks; says what was expected and got.
        TypeError: ``networks`` is not as described.
    """
    if not isinstance(networks, Mapping):
        raise TypeError(f"networks must map every task to a network, got {type(networks).__name__}")
    for task, network in networks.items():
        if not isinstance(network, nn.Module):
            raise TypeError(f"networks[{task!r}] must be an nn.Module, got {type(network).__name__}")
    tensors, document = safefile.read(path)
    try:
        manifest = Manifest.from_dict(document)
        return _assembled(manifest, tensors, networks)
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)}: {error}") from error


def read_manifest(path: str | os.PathLike) -> tuple[Manifest, dict[str, Tensor]]:
    """What is in a file of :func:`save`, without networks: its manifest, and its tensors by key.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is another file, damaged or altered.
    """
    tensors, document = safefile.read(path)
    try:
        return Manifest.from_dict(document), tensors
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)}: {error}") from error


# -- putting the network together ----------------------------------------------------------------------------------


def _assembled(manifest: Manifest, tensors: dict[str, Tensor], networks: Mapping[str, nn.Module]) -> ZippedNetwork:
    if set(networks) != set(manifest.tasks):
        raise ValueError(f"networks must have the tasks of the file, {list(manifest.tasks)}, got {list(networks)}")
    copies = {task: copy.deepcopy(networks[task]) for task in manifest.tasks}
    for task, layers in manifest.layers.items():
        for path, (name, layout) in layers.items():
            copies[task] = _with_leaf(copies[task], path, name, layout, f"layer {path!r} of task {task!r}")
    zipped = ZippedNetwork(copies, manifest.report)
    _tie(zipped, manifest, tensors)
    _fill(zipped, manifest, tensors)
    zipped.example_inputs = dict(manifest.examples)
    zipped.outputs = dict(manifest.outputs)
    zipped.keep_zeros = manifest.keep_zeros
    zipped.orders = {
        task: {path: torch.tensor(order, dtype=torch.int64) for path, order in paths.items()}
        for task, paths in manifest.orders.items()
    }
    return zipped


def _with_leaf(network: nn.Module, path: str, name: str, layout: Layout, where: str) -> nn.Module:
    """``network`` with the layer at ``path`` replaced by a leaf of empty blocks."""
    # Not get_submodule: that is getattr, which would run the properties a path may name.
    layer = dict(network.named_modules(remove_duplicate=False)).get(path)
    leaf = leaf_class(layer, name, layout, where)
    weight, bias = (getattr(layer, name) for name in layout.names)
    trained = weight.requires_grad
    shapes = {block: (*shape, *weight.shape[2:]) for block, shape in layout.weight_blocks().items()}
    shapes |= {block: (size,) for block, size in layout.bias_blocks().items()}
    shapes |= {layout.scale_name: (layout.scaled,)} if layout.scaled else {}
    blocks = {
        block: nn.Parameter(
            torch.empty(shape, dtype=weight.dtype, device=weight.device),
            bias.requires_grad if block in layout.bias_blocks() and bias is not None else trained,
        )
        for block, shape in shapes.items()
    }
    return replace_module(network, layer, leaf.wrap(layer, layout, blocks))


def _tie(zipped: ZippedNetwork, manifest: Manifest, tensors: Mapping[str, Tensor]) -> None:
    """Makes one Parameter of those that the file says are shared; checks that they are what the layouts share."""
    found = dict(zipped.named_parameters(remove_duplicate=False))
    owners = dict(zipped.named_modules(remove_duplicate=False))
    for key, places in manifest.shared.items():
        unknown = [place for place in places if place not in found]
        if unknown or not places:
            raise ValueError(f"shared tensor {key!r} must stand for parameters of the networks, got {unknown[:3]}")
        if key not in tensors:
            raise ValueError(f"shared tensor {key!r} must be in the file, got none")
        for place in places:
            got, wanted = list(found[place].shape), list(tensors[key].shape)
            if got != wanted:
                raise ValueError(
                    f"{place} must be {wanted} as in the file, got {got}; pass a network made with the arguments of "
                    "the one saved"
                )
            owner, _, name = place.rpartition(".")
            owners[owner]._parameters[name] = found[places[0]]
    expected = {key: list(places) for key, places in manifest.shared.items()}
    if zipped.shared_keys() != expected:
        raise ValueError("what the file says is shared must be what its layouts share, got something else")
    sharing = {place: {other.split(".")[1] for other in places} for places in expected.values() for place in places}
    for task, layers in manifest.layers.items():
        for path, (_, layout) in layers.items():
            for block, numbers in layout.block_tasks().items():
                place = ".".join(filter(None, ("networks", task, path, block)))
                names = {manifest.tasks[number] for number in numbers}
                if sharing.get(place, {task}) != names:
                    raise ValueError(
                        f"block {place!r} must be shared by {sorted(names)} as its layout says, got others"
                    )


def _fill(zipped: ZippedNetwork, manifest: Manifest, tensors: dict[str, Tensor]) -> None:
    """Gives every parameter and buffer its tensor; all of them, and no tensor left over."""
    wanted = zipped.state_dict(keep_vars=True)
    for alias, key in manifest.aliases.items():
        if alias in tensors or key not in tensors:
            raise ValueError(f"tensor {alias!r} must be stored as {key!r} and not by itself, got otherwise")
    given = {key: tensors.get(manifest.aliases.get(key, key)) for key in wanted}
    missing = [key for key in wanted if given[key] is None]
    spare = [key for key in (*tensors, *manifest.aliases) if key not in wanted]
    if missing or spare:
        raise ValueError(
            f"its tensors must be those of the networks, got none for {missing[:3]} and unknown {spare[:3]}; pass "
            "networks of the classes saved"
        )
    made: dict[tuple[str, bool], Tensor] = {}
    sources = {key: (manifest.aliases.get(key, key), isinstance(wanted[key], nn.Parameter)) for key in wanted}
    for key, old in wanted.items():
        new = given[key]
        if not isinstance(old, Tensor) or old.shape != new.shape or _kind(old) != _kind(new):
            got = f"{old.dtype} {list(old.shape)}" if isinstance(old, Tensor) else type(old).__name__
            raise ValueError(
                f"{key} must be {new.dtype} {list(new.shape)} as in the file, got {got}; pass a network made with the "
                "arguments of the one saved"
            )
        if sources[key] not in made:
            moved = new if old.device.type == "meta" else new.to(old.device)
            made[sources[key]] = nn.Parameter(moved, old.requires_grad) if isinstance(old, nn.Parameter) else moved
    state = {key: made[source] for key, source in sources.items()}
    try:
        zipped.load_state_dict(state, assign=True)
    except Exception as error:  # hooks of the user's modules may raise anything
        raise ValueError(f"the networks must take the tensors of the file, got {error}") from error
    left = [name for name, buffer in zipped.named_buffers() if buffer.is_meta]
    if left:
        raise ValueError(f"buffers that are not saved must have values, got meta tensors {left[:3]}; build on a device")


def _kind(tensor: Tensor) -> tuple[bool, bool]:
    return tensor.is_floating_point(), tensor.is_complex()
