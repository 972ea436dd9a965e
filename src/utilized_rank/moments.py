"""Second moments and means of what flows into each layer, streamed over images in float64."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor, nn

from . import correlations
from .correlations import Correlations
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


class Stream:
    """Takes in what flows into one layer, in float64 from the first product on.

    Patches that overlap enough go through :mod:`utilized_rank.correlations`, which is exact and cheaper.
    """

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        self._rows = Moments.zeros(layer.groups, layer.m)
        self._by_size: dict[tuple[int, int], Correlations] = {}

    def add(self, inputs: Tensor) -> None:
        """Take in what the module was called with."""
        module, size = self.layer.module, (inputs.shape[-2], inputs.shape[-1])
        if not isinstance(module, nn.Conv2d) or not correlations.pays(module, *size):
            self._rows.add(self.layer.rows(inputs))
            return
        if size not in self._by_size:
            self._by_size[size] = Correlations(module, *size)
        self._by_size[size].add(inputs)

    def moments(self) -> Moments:
        """Of all that came so far."""
        moments = Moments(self._rows.products.clone(), self._rows.total.clone(), self._rows.count)
        for part in self._by_size.values():
            moments.products[0] += part.products()
            moments.total[0] += part.total()
            moments.count += part.count
        return moments


@torch.inference_mode()
def input_moments(network: nn.Module, layers: list[Layer], batches: Iterable[Tensor]) -> dict[str, Moments]:
    """The moments of every layer's inputs, in one pass over ``batches`` of images (B, C, H, W).

    A layer that is called more than once in a pass (shared weights) adds up over its calls.

    Raises:
        FloatingPointError: a layer received NaN or Inf, or the network gives them; names the layer.
    """
    network.eval()
    streams = {layer.name: Stream(layer) for layer in layers}
    with _watching(layers, streams):
        for batch in batches:
            if not torch.isfinite(network(batch)).all() and layers:
                _refuse(streams)
    moments = {name: stream.moments() for name, stream in streams.items()}
    if not all(torch.isfinite(moment.products).all() for moment in moments.values()):
        _refuse(streams)
    return moments


def _refuse(streams: dict[str, Stream]) -> NoReturn:
    """Name the first layer that received what is not finite, or the last layer, which gave it."""
    for name, stream in streams.items():
        if not torch.isfinite(stream.moments().products).all():
            raise FloatingPointError(f"layer {name} received values that are not finite (NaN or Inf)")
    raise FloatingPointError(f"layer {name} gave values that are not finite (NaN or Inf)")


@contextmanager
def _watching(layers: list[Layer], streams: dict[str, Stream]) -> Iterator[None]:
    def hook(layer: Layer) -> torch.utils.hooks.RemovableHandle:
        return layer.module.register_forward_pre_hook(lambda _, args: streams[layer.name].add(args[0]))

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
