"""What a network predicts, the features it predicts from, and how good it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .batches import Batches, call
from .devices import placed
from .hooks import held

BATCH = 256


def logits_of(given: Any) -> Tensor:
    """The tensor of predictions in what a network gives: itself, or the first of a tuple or a dictionary."""
    while not isinstance(given, Tensor):
        given = next(iter(given.values() if hasattr(given, "values") else given))
    return given


def class_dimension(logits: Tensor) -> int:
    """Where the classes lie: behind the positions of sequences (B, L, C), else before those of images (B, C, H, W)."""
    return -1 if logits.ndim == 3 else 1


@torch.inference_mode()
def outputs(network: nn.Module, inputs: Batches, batch_size: int = BATCH) -> Tensor:
    """What a network in evaluation mode gives for ``inputs`` (N, ...): (N, ...), float32, on its device."""
    network.eval()
    return torch.cat([logits_of(call(network, placed(batch, network))).float() for batch in inputs.split(batch_size)])


def is_correct(network: nn.Module, inputs: Batches, labels: Tensor) -> np.ndarray:
    """Which inputs are classified correctly: bool (N,)."""
    found = outputs(network, inputs).argmax(1)
    return (found == labels.to(found.device)).cpu().numpy()


Score = Callable[[nn.Module], float]
"""How good a network is, the higher the better: an accuracy, a negative perplexity, a mean IoU."""


@dataclass(frozen=True)
class Labelled:
    """Inputs whose labels are known; as a :data:`Score`, the accuracy in percent."""

    inputs: Batches
    labels: Tensor
    """int64 (N,)."""

    def __len__(self) -> int:
        return len(self.labels)

    def __call__(self, network: nn.Module) -> float:
        """The accuracy of ``network``, in percent."""
        return 100 * float(is_correct(network, self.inputs, self.labels).mean())


def features(network: nn.Module, module: nn.Module, inputs: Batches) -> Tensor:
    """What flows into ``module``, a part of ``network``: (N, ...); into its classifier, (N, D)."""
    return torch.cat([seen for batch in inputs.split(BATCH) for _, seen in received(network, [module], batch)])


@torch.no_grad()
def received(network: nn.Module, modules: Iterable[nn.Module], batch: Any) -> list[tuple[nn.Module, Tensor]]:
    """Every call of some modules while a network in evaluation mode takes ``batch``, in order.

    With each, a copy of what the module is called with: the network may change it in place later on.
    """
    seen: list[tuple[nn.Module, Tensor]] = []
    with held(m.register_forward_pre_hook(lambda m, args: seen.append((m, args[0].clone()))) for m in modules):
        call(network.eval(), placed(batch, network))
    return seen
