"""Where a network computes: its device and type, inputs brought there, and what is asked of the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

CPU = torch.device("cpu")
FAST_DOUBLES = ((6, 0), (7, 0), (8, 0), (9, 0), (10, 0))
"""Compute capabilities of P100, V100, A100, H100 and B200."""
SEVERAL = 4
"""Batches after which a device other than the processor is asked what it found: each question waits for it."""


def device_of(network: nn.Module) -> torch.device:
    """The device of a network's first parameter; the processor for one that has none."""
    return next((parameter.device for parameter in network.parameters()), CPU)


def placed(inputs: Any, network: nn.Module) -> Any:
    """Inputs of ``network`` (a tensor, or a tuple or dictionary of some) on its device, floats in its type."""
    like = next(network.parameters(), None)
    if like is None:
        return inputs

    def one(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        dtype = like.dtype if value.is_floating_point() else value.dtype
        return value.to(like.device, dtype, non_blocking=True)

    return tree_map(one, inputs)


def sums_on(device: torch.device) -> torch.device:
    """Where sums in float64 are kept: on the device itself, but on the processor where it has no float64 (mps)."""
    return CPU if device.type == "mps" else device


def solver(device: torch.device, order: int) -> torch.device:
    """Where an eigenproblem of this order is solved in float64: on the processor if it is small, or float64 slow."""
    return device if device.type == "cuda" and order >= 512 and _has_fast_doubles(device) else CPU


def _has_fast_doubles(device: torch.device) -> bool:
    """Whether a GPU is of the kind that is built for float64 (half the rate of float32, not 1/32 and less)."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability(device) in FAST_DOUBLES


def looks(device: torch.device) -> int:
    """After how many batches a device is asked what it found."""
    return 1 if device.type == "cpu" else SEVERAL


def truth(flag: Tensor) -> bool:
    """What a flag says; waits for the device."""
    return bool(flag)


def free_memory(device: torch.device) -> int:
    """Bytes of the device's own memory that values may be kept in: half of what is free; none of the processor's."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return 0
    return torch.cuda.mem_get_info(device)[0] // 2
