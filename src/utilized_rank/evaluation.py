"""What a network predicts, and the features it predicts from."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from .data import Batches

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
    seen: list[Tensor] = []
    hook = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        outputs(network, inputs)
    finally:
        hook.remove()
    return torch.cat(seen)
