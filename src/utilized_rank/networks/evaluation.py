"""What a network predicts, and the features it predicts from."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn

from .batches import Batches

BATCH = 256


@torch.inference_mode()
def outputs(network: nn.Module, inputs: Batches, batch_size: int = BATCH) -> Tensor:
    """What a network in evaluation mode gives for ``inputs`` (N, C, H, W): (N, ...), float32."""
    network.eval()
    return torch.cat([network(batch).float() for batch in inputs.split(batch_size)])


def is_correct(network: nn.Module, inputs: Batches, labels: Tensor) -> np.ndarray:
    """Which images are classified correctly: bool (N,)."""
    return (outputs(network, inputs).argmax(1) == labels).numpy()


def features(network: nn.Module, module: nn.Module, inputs: Batches) -> Tensor:
    """What flows into ``module``, a part of ``network``: (N, ...); into its classifier, (N, D)."""
    return torch.cat([seen for batch in inputs.split(BATCH) for _, seen in received(network, [module], batch)])


@torch.no_grad()
def received(network: nn.Module, modules: Iterable[nn.Module], batch: Tensor) -> list[tuple[nn.Module, Tensor]]:
    """Every call of some modules while a network in evaluation mode takes ``batch`` (B, C, H, W), in order.

    With each, a copy of what the module is called with: the network may change it in place later on.
    """
    seen: list[tuple[nn.Module, Tensor]] = []
    handles = [m.register_forward_pre_hook(lambda m, args: seen.append((m, args[0].clone()))) for m in modules]
    try:
        network.eval()(batch)
    finally:
        for handle in handles:
            handle.remove()
    return seen
