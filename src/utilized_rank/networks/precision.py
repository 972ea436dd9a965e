"""The precision of a network's arithmetic."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Literal

Precision = Literal["auto", "float32", "bfloat16"]
"""Of a network's arithmetic; ``auto`` is bfloat16 where the device multiplies in it."""


def resolved(precision: Precision, device: str = "cpu") -> Precision:
    """The precision that is meant on a type of device: ``auto`` is bfloat16 where it multiplies in it, else float32."""
    if precision != "auto":
        return precision
    import torch  # two seconds, and who only reads parameters needs none of it

    if device == "cuda":
        able = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        # Older releases cannot say: float32.
        its: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)() if device == "cpu" else {}
        able = any(its.get(way) for way in ("avx512_bf16", "amx_bf16", "bf16"))
    return "bfloat16" if able else "float32"


def autocast(precision: Precision, device: str = "cpu") -> AbstractContextManager[None]:
    """Autocast to ``precision`` on a type of device, where it is not float32."""
    import torch

    dtype = getattr(torch, resolved(precision, device))
    return torch.autocast(device, dtype=dtype, enabled=dtype is not torch.float32)
