"""Nested dicts, lists, numbers and tensors as tensors by name and a JSON document, and back. Nothing is executed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor


def flatten(tree: Any, path: str = "") -> tuple[dict[str, Tensor], Any]:
    """Tensors by their path in the tree, and the tree as JSON can hold it.

    Raises:
        TypeError: something that is neither dict, list, tuple, number, string, None nor tensor; says where.
    """
    tensors: dict[str, Tensor] = {}

    def encode(value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            while path in tensors:  # 1 and "1" may both be keys
                path += "_"
            tensors[path] = value.detach()
            return {"tensor": path}
        if value is None or isinstance(value, (bool, int, str)):
            return value
        if isinstance(value, np.generic):
            return encode(value.item(), path)
        if isinstance(value, float):
            return value if math.isfinite(value) else {"float": repr(value)}
        if isinstance(value, Mapping):
            return {"dict": [[encode(k, path), encode(v, f"{path}.{k}")] for k, v in value.items()]}
        if isinstance(value, (list, tuple)):
            kind = "list" if isinstance(value, list) else "tuple"
            return {kind: [encode(item, f"{path}.{at}") for at, item in enumerate(value)]}
        raise TypeError(f"{path} must be made of dicts, lists, numbers and tensors, got {type(value).__name__}")

    return tensors, encode(tree, path)


def unflatten(tensors: Mapping[str, Tensor], document: Any) -> Any:
    """The inverse of :func:`flatten`.

    Raises:
        ValueError: the document was not made by it.
    """

    def decode(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        (kind, content), *rest = value.items() or [(None, None)]
        if not rest:
            if kind == "tensor" and content in tensors:
                return tensors[content]
            if kind == "float" and content in ("nan", "inf", "-inf"):
                return float(content)
            if kind == "dict":
                return {decode(k): decode(v) for k, v in content}
            if kind == "list":
                return [decode(item) for item in content]
            if kind == "tuple":
                return tuple(decode(item) for item in content)
        raise ValueError(f"a tree must be made of tensors, numbers, lists and dicts, got {str(value)[:60]}")

    try:
        return decode(document)
    except (TypeError, RecursionError) as error:  # no pairs, keys that cannot be keys
        raise ValueError(f"its tree is not well formed: {error}") from None
