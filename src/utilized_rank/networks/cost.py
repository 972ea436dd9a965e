"""What a network costs: parameters, FLOPs by torch's own counter, and measured latency."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from .batches import call
from .devices import device_of, placed


def parameters(network: nn.Module) -> int:
    """All parameters of the network, those that are not decomposed included; buffers are not."""
    return sum(p.numel() for p in network.parameters())


def flops(network: nn.Module, image: Any) -> int:
    """Floating point operations of one forward pass for one ``image`` (1, ...), as :func:`flops_of` counts."""
    network.eval()
    return flops_of(lambda: call(network, placed(image, network)))


@torch.no_grad()
def flops_of(run: Callable[..., Any], *inputs: Any) -> int:
    """Floating point operations of ``run(*inputs)``.

    A multiplication and an addition are two (half of it are MACs). Matrix products, convolutions
    and attention count; element-wise work and normalisation do not.
    """
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        # The counter knows the matrix products of plain attention, but not every fused kernel.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            run(*inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    return int(counter.get_total_flops())


@torch.inference_mode()
def latencies(modules: Sequence[nn.Module], inputs: Any, seconds: float = 0.2) -> list[float]:
    """The median time, in seconds, that each of ``modules`` takes for ``inputs``, on this machine at this moment.

    They take turns, so that what else the machine does falls on all of them alike. A device is waited for.

    Args:
        modules: in evaluation mode.
        inputs: what each is called with.
        seconds: how long to go on, for each; three turns at least.
    """
    device = device_of(modules[0])
    inputs = placed(inputs, modules[0])
    times: list[list[float]] = [[] for _ in modules]
    began = time.perf_counter()
    while len(times[0]) < 4 or time.perf_counter() - began < seconds * len(modules):
        for module, its in zip(modules, times, strict=True):
            start = time.perf_counter()
            call(module, inputs)
            _wait(device)
            its.append(time.perf_counter() - start)
    return [statistics.median(its[1:]) for its in times]  # the first call sets things up


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
