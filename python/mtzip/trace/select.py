"""What of a network's output counts, where it is more than tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

#: A name, an index, or a function of the output; None chooses by itself.
Select = str | int | Callable[[Any], Any] | None


def selected(output: Any, select: Select = None) -> Any:
    """The part of a network's output that counts.

    Args:
        output: what the network returned.
        select: attribute or key, index, or a function of ``output``. None takes plain containers of tensors as they
            are; of other objects, as Hugging Face returns them, every tensor but hidden states that come along with a
            result. Caches do not count.

    Raises:
        TypeError: there is no tensor in it.
        KeyError: it has no part of that name.
    """
    if callable(select):
        return select(output)
    if select is not None and isinstance(output, Tensor):
        raise TypeError(f"outputs must be None for a network that puts out one tensor, got {select!r}")
    if isinstance(select, int):
        return output[select]
    if isinstance(select, str):
        if isinstance(output, Mapping) and select in output:
            return output[select]
        if not hasattr(output, select):
            raise KeyError(
                f"outputs must name a part of the network's output, got {select!r}; there is {_names(output)}"
            )
        return getattr(output, select)
    if isinstance(output, Tensor):
        return output
    if type(output) in (tuple, list, dict):
        if all(leaf is None or isinstance(leaf, (Tensor, int, float)) for leaf in pytree.tree_leaves(output)):
            return output
        parts = output.items() if isinstance(output, dict) else enumerate(output)
        parts = {name: part for name, part in parts if isinstance(part, Tensor)}
    else:
        parts = {name: part for name, part in _parts(output).items() if isinstance(part, Tensor) and name != "loss"}
        results = {name: part for name, part in parts.items() if not name.endswith("hidden_state")}
        parts = results if any("logits" in name for name in results) else parts
    if not parts:
        raise TypeError(
            f"a network must put out tensors, got {type(output).__name__} with {_names(output)}; "
            "say with outputs= which part of it counts"
        )
    return next(iter(parts.values())) if len(parts) == 1 else tuple(parts.values())


def _parts(output: Any) -> dict[str, Any]:
    if isinstance(output, Mapping):
        return dict(output)
    if dataclasses.is_dataclass(output):
        return {field.name: getattr(output, field.name) for field in dataclasses.fields(output)}
    if hasattr(output, "_asdict"):
        return output._asdict()
    return dict(getattr(output, "__dict__", {}))


def _names(output: Any) -> str:
    return ", ".join(map(repr, _parts(output))) or type(output).__name__
