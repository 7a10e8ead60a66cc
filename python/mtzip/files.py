"""Networks, weights and inputs named on a command line, read from files without executing code in them."""

from __future__ import annotations

import importlib
import pickle
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

USUAL_NAMES = ("inputs", "x", "images")


def make_network(target: str) -> nn.Module:
    """The network that ``module:callable`` makes when called without arguments.

    Raises:
        ValueError: the target is not of that form, is not found, fails, or does not give a network.
    """
    module_name, separator, attribute = target.partition(":")
    if not (module_name and separator and attribute):
        raise ValueError(f"a network must be given as module:callable, got {target!r}")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    # Any exception may come out of the user's module, and each is the user's to mend: said with its place.
    try:
        factory: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            factory = getattr(factory, part)
        network = factory()
    except Exception as error:
        raise ValueError(f"{target} must make a network when called, got {type(error).__name__}: {error}") from error
    if not isinstance(network, nn.Module):
        raise ValueError(f"{target} must give a torch.nn.Module, got {type(network).__name__}")
    return network


def load_weights(network: nn.Module, file: str | Path) -> None:
    """Loads a state dict into ``network``.

    A mapping with the entry ``state_dict`` is taken by that entry, and the prefix ``module.`` that DataParallel leaves
    is dropped.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds no state dict, or one of another network.
    """
    state = _load_tensors(file)
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{file} must hold a state dict, names to tensors, got {_kind(state)}")
    if all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{file} must hold the weights of a {type(network).__name__}, got others: {error}") from error


def load_inputs(target: str | Path, network: nn.Module) -> Tensor:
    """Calibration inputs, in the floating-point type of ``network`` unless they are integers.

    Args:
        target: a .npy, .npz, .pt or .safetensors file, or ``file:name`` for one array of several.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds no array, several without a name to tell them apart, or no samples.
    """
    path, name = str(target), None
    if not Path(path).exists() and ":" in path:
        path, _, name = path.rpartition(":")
    found = _load_tensors(path)
    if isinstance(found, Mapping):
        found = _pick({key: value for key, value in found.items() if isinstance(value, Tensor)}, path, name)
    elif name is not None:
        raise ValueError(f"{path} must hold named arrays for :{name}, got {_kind(found)}")
    if not isinstance(found, Tensor) or found.dim() < 2 or not len(found):
        raise ValueError(f"{path} must hold inputs with a sample a row, [n, ...], got {_kind(found)}")
    dtype = next((p.dtype for p in network.parameters() if p.is_floating_point()), torch.float32)
    return found.to(dtype) if found.is_floating_point() else found


def _pick(arrays: Mapping[str, Tensor], path: str, name: str | None) -> Tensor:
    names = [name] if name else [usual for usual in USUAL_NAMES if usual in arrays]
    if name is None and len(arrays) == 1:
        names = list(arrays)
    if len(names) != 1 or names[0] not in arrays:
        asked = f"an array {name}" if name else f"one array, or one called {' or '.join(USUAL_NAMES)}"
        raise ValueError(f"{path} must hold {asked}, got {', '.join(arrays) or 'none'}; choose with {path}:NAME")
    return arrays[names[0]]


def _load_tensors(file: str | Path) -> Any:
    """What a .npy, .npz, .pt, .pth or .safetensors file holds, arrays as tensors."""
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"{path} must be a file, got {'a folder' if path.is_dir() else 'nothing there'}")
    try:
        return _READERS[path.suffix](path)
    except KeyError:
        raise ValueError(f"{path} must end in one of {', '.join(_READERS)}, got {path.suffix or 'no ending'}") from None
    except OSError:
        raise
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} must hold tensors alone, got something whose loading would run code; "
            "write it with torch.save(network.state_dict(), ...)"
        ) from error
    except Exception as error:
        # The readers raise whatever a damaged file makes them stumble over, from zlib.error to SafetensorError.
        raise ValueError(f"{path} must be a whole {path.suffix} file, got a damaged one: {error}") from error


def _read_torch(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def _read_npy(path: Path) -> Tensor:
    return torch.from_numpy(np.load(path, allow_pickle=False))


def _read_npz(path: Path) -> dict[str, Tensor]:
    with np.load(path, allow_pickle=False) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


_READERS = {
    ".npy": _read_npy,
    ".npz": _read_npz,
    ".pt": _read_torch,
    ".pth": _read_torch,
    ".safetensors": _read_safetensors,
}


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}"
    return type(value).__name__
