"""Second moments and means of what flows into each layer, streamed over images in float64."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .layers import Layer


@dataclass
class Moments:
    """Sums over the rows s (1 x m) that a layer received; memory does not grow with their number."""

    products: Tensor
    """Sum of s^T s, float64, (g, m, m)."""
    total: Tensor
    """Sum of s, float64, (g, m)."""
    count: int = 0
    """Rows seen."""

    @classmethod
    def zeros(cls, groups: int, m: int) -> Moments:
        """Before any row."""
        return cls(torch.zeros(groups, m, m, dtype=torch.float64), torch.zeros(groups, m, dtype=torch.float64))

    def add(self, rows: Tensor) -> None:
        """Take in more rows, (g, N, m)."""
        rows = rows.double()
        self.products.baddbmm_(rows.mT, rows)
        self.total += rows.sum(1)
        self.count += rows.shape[1]

    @property
    def second(self) -> Tensor:
        """C_S = E[s^T s], (g, m, m)."""
        return self.products / max(1, self.count)

    @property
    def mean(self) -> Tensor:
        """Mu = E[s], (g, m)."""
        return self.total / max(1, self.count)

    @property
    def centred(self) -> Tensor:
        """C_S - mu^T mu, the covariance, (g, m, m)."""
        mean = self.mean
        return self.second - mean.unsqueeze(2) * mean.unsqueeze(1)


@torch.inference_mode()
def input_moments(network: nn.Module, layers: list[Layer], batches: Iterable[Tensor]) -> dict[str, Moments]:
    """The moments of every layer's inputs, in one pass over ``batches`` of images (B, C, H, W).

    A layer that is called more than once in a pass (shared weights) adds up over its calls.

    Raises:
        FloatingPointError: a layer received NaN or Inf; names the layer.
    """
    network.eval()
    moments = {layer.name: Moments.zeros(layer.groups, layer.m) for layer in layers}
    with _watching(layers, moments):
        for batch in batches:
            network(batch)
    for name, moment in moments.items():
        if not torch.isfinite(moment.products).all():
            raise FloatingPointError(f"layer {name} received values that are not finite (NaN or Inf)")
    return moments


@contextmanager
def _watching(layers: list[Layer], moments: dict[str, Moments]) -> Iterator[None]:
    def hook(layer: Layer) -> torch.utils.hooks.RemovableHandle:
        return layer.module.register_forward_pre_hook(lambda _, args: moments[layer.name].add(layer.rows(args[0])))

    handles = [hook(layer) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def to_tensors(moments: dict[str, Moments]) -> dict[str, Tensor]:
    """Flat tensors for the disk."""
    flat: dict[str, Tensor] = {}
    for name, moment in moments.items():
        flat[f"{name}.products"] = moment.products
        flat[f"{name}.total"] = moment.total
        flat[f"{name}.count"] = torch.tensor(moment.count)
    return flat


def from_tensors(flat: dict[str, Tensor]) -> dict[str, Moments]:
    """Undo :func:`to_tensors`."""
    names = [key.removesuffix(".products") for key in flat if key.endswith(".products")]
    return {n: Moments(flat[f"{n}.products"], flat[f"{n}.total"], int(flat[f"{n}.count"])) for n in names}
