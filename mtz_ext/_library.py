"""Registration with torch.library, namespace `mtz`.

Library.define/.impl rather than @custom_op: 4-6 us a call against 12-22 us.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

LIBRARY = torch.library.Library("mtz", "DEF")


def register(schema: str, implementation: Callable, fake: Callable) -> torch._ops.OpOverload:
    """Define ``mtz::schema``, implement it on CPU and CUDA (one function serves both); return the overload to call."""
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, implementation, key)
    torch.library.register_fake(f"mtz::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.mtz, name).default
