import pytest
import torch
from torch import nn

from utilized_rank.networks.precision import autocast, resolved


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_precision_that_is_named_is_meant_whatever_the_processor(monkeypatch, precision):
    for able in (True, False):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda able=able: {"avx512_bf16": able}, raising=False)
        assert resolved(precision) == precision


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx512_bf16": True}, "bfloat16"),
        ({"amx_bf16": True, "avx512_bf16": False}, "bfloat16"),
        ({"bf16": True}, "bfloat16"),
        ({"avx512_bf16": False, "amx_bf16": False, "avx2": True}, "float32"),
        ({"amx_fp16": True, "avx512_fp16": True}, "float32"),
        ({}, "float32"),
    ],
    ids=str,
)
def test_auto_is_bfloat16_where_the_processor_multiplies_in_it(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert resolved("auto") == expected
    with autocast("auto"):
        assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == getattr(torch, expected)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_autocast_multiplies_in_the_precision_and_ends(precision):
    layer = nn.Linear(2, 2)
    with autocast(precision):
        assert layer(torch.ones(1, 2)).dtype == getattr(torch, precision)
    assert layer(torch.ones(1, 2)).dtype == torch.float32
