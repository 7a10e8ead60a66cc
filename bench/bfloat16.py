"""Whether to train in bfloat16."""

from __future__ import annotations

import torch


def pays() -> torch.dtype | None:
    """bfloat16 on a machine with a GPU, or with tile registers (AMX) in its CPU; None elsewhere."""
    fast = torch.cuda.is_available() or torch.cpu.get_capabilities().get("amx_bf16", False)
    return torch.bfloat16 if fast else None
