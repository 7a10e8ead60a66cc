"""A training script's fast products do not reach what is computed in closed form."""

from __future__ import annotations

import pytest
import torch
from nets import seeded
from torch import nn

import mtzip
from mtzip.precision import exact_products


@pytest.fixture
def fast():
    """Products in bfloat16, where this machine can."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


def settings() -> list[object]:
    """What a script may have set, where torch has it."""
    found: list[object] = [torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32]
    if hasattr(torch.backends.cudnn, "conv"):
        found += [getattr(torch.backends, where).matmul.fp32_precision for where in ("cuda", "mkldnn")]
    return found


def wrong() -> float:
    a = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    return ((a @ a).double() - a.double() @ a.double()).abs().max().item()


def test_products_are_exact_inside_and_settings_as_before_afterwards(fast):
    before = settings()
    with pytest.raises(KeyError), exact_products():
        assert wrong() < 1e-4
        assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
        raise KeyError
    assert settings() == before


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="torch before 2.9 has no switch an operator")
def test_switches_of_single_operators_are_put_back():
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        with exact_products():
            assert wrong() < 1e-4
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = "ieee"


def network(seed: int) -> nn.Sequential:
    return seeded(
        lambda: nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5)), seed
    )


def test_a_zip_in_a_fast_script_is_the_same(fast):
    networks, x = {"a": network(0), "b": network(1)}, torch.randn(300, 20, generator=torch.Generator().manual_seed(0))
    inputs = {"a": x, "b": x.flip(0)}
    got = mtzip.zip_networks(networks, inputs)
    torch.set_float32_matmul_precision("highest")
    expected = mtzip.zip_networks(networks, inputs)
    for name, weight in expected.state_dict().items():
        assert torch.equal(got.state_dict()[name], weight), name
