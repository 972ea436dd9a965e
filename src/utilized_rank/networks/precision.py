"""The precision of a network's arithmetic."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Literal

Precision = Literal["auto", "float32", "bfloat16"]
"""Of a network's arithmetic; ``auto`` is bfloat16 where the processor multiplies in it."""


def resolved(precision: Precision) -> Precision:
    """The precision that is meant: ``auto`` is bfloat16 where the processor multiplies in it, float32 elsewhere."""
    if precision != "auto":
        return precision
    import torch  # two seconds, and who only reads parameters needs none of it

    able = getattr(torch.cpu, "get_capabilities", dict)()  # older releases cannot say: float32
    return "bfloat16" if any(able.get(way) for way in ("avx512_bf16", "amx_bf16", "bf16")) else "float32"


def autocast(precision: Precision) -> AbstractContextManager[None]:
    """Autocast to ``precision`` where it is not float32."""
    import torch

    dtype = getattr(torch, resolved(precision))
    return torch.autocast("cpu", dtype=dtype, enabled=dtype is not torch.float32)
