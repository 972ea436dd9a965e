"""What a network costs: parameters, and FLOPs by torch's own counter."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def parameters(network: nn.Module) -> int:
    """All parameters of the network, those that are not decomposed included; buffers are not."""
    return sum(p.numel() for p in network.parameters())


@torch.no_grad()
def flops(network: nn.Module, image: Tensor) -> int:
    """Floating point operations of one forward pass for one ``image`` (1, C, H, W).

    A multiplication and an addition are two (half of it are MACs). Matrix products, convolutions
    and attention count; element-wise work and normalisation do not.
    """
    network.eval()
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        # The counter knows the matrix products of plain attention, but not every fused kernel.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            network(image)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    return int(counter.get_total_flops())
