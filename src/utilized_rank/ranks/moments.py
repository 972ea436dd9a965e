"""Second moments and means of what flows into each layer, streamed over images, summed in float64.

Chunks of images are summed by themselves, and their sums in their order: the same to the bit, wherever that is done.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..networks.batches import Batches, call, count, some_of
from ..networks.devices import CPU, looks, placed, sums_on, truth
from ..networks.each import Each, in_turn, ordered
from ..networks.evaluation import logits_of
from ..networks.hooks import held
from .correlations import TERMS, Correlations, pays
from .layers import Layer

FEWEST = 128
"""Images that a budget never goes below: rows of one image are alike."""
TOGETHER = 128
"""Images of a budget that are multiplied at a time: a few at a time would cost more in calls than in products."""
CHUNK = 512
"""Images that are summed by themselves."""


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
    def zeros(cls, groups: int, m: int, device: torch.device = CPU) -> Moments:
        """Before any row."""
        total = torch.zeros(groups, m, dtype=torch.float64, device=device)
        return cls(total.new_zeros(groups, m, m), total)

    def add(self, rows: Tensor) -> None:
        """Take in more rows, (g, N, m): products in float64, on another device than the processor in float32."""
        self.count += rows.shape[1]
        if rows.device.type == "cpu":
            rows = rows.double()
            self.products.baddbmm_(rows.mT, rows)
            self.total += rows.sum(1)
            return
        for some in rows.float().split(TERMS, 1):
            self.products += (some.mT @ some).to(self.products.device)
            self.total += some.sum(1).to(self.total.device)

    def __iadd__(self, other: Moments) -> Moments:
        """Take in all rows of another sum."""
        self.products += other.products
        self.total += other.total
        self.count += other.count
        return self

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
        return self.second.sub_(mean.unsqueeze(2) * mean.unsqueeze(1))


@dataclass(frozen=True)
class Budget:
    """How much of the calibration images a layer's moment is taken over."""

    rows: int
    """Enough rows, as a multiple of the layer's input width m."""
    images: int
    """That will come in all."""

    def share(self, width: int, rows_per_image: float) -> float:
        """The part of the images that a layer takes in: enough for its rows, and :data:`FEWEST` at least."""
        return min(1.0, max(FEWEST, self.rows * width / rows_per_image) / self.images)


class Stream:
    """Takes in what flows into one layer, or images evenly spread over it until a budget of rows is met.

    Patches that overlap go through :mod:`utilized_rank.ranks.correlations`, which multiplies no two pixels twice, in
    their own precision; other rows are multiplied in float64 (on another device than the processor, in float32).

    Args:
        layer: of a network.
        budget: None takes in every row.
        came: images that others take in, which come before these.
    """

    def __init__(self, layer: Layer, budget: Budget | None, came: int = 0) -> None:
        self.layer = layer
        self.budget = budget
        self._came = came
        self._waiting: list[Tensor] = []
        self._rows: Moments | None = None
        self._by_size: dict[tuple[int, int], Correlations | None] = {}

    def add(self, inputs: Tensor, images: int) -> None:
        """Take in what the module was called with, for so many images."""
        rows = self.layer.row_count(inputs) / images
        share = 1.0 if self.budget is None else self.budget.share(self.layer.m, rows)
        if share == 1:
            self._take(inputs)
            return
        places = np.floor(np.arange(self._came, self._came + len(inputs) + 1) * share + 1e-6)
        self._came += len(inputs)
        if chosen := np.flatnonzero(places[1:] > places[:-1]).tolist():
            self._waiting.append(inputs[chosen])
        if sum(map(len, self._waiting)) >= TOGETHER:
            self._take_waiting()

    def _take_waiting(self) -> None:
        # Convolutions are told apart by the size of their images.
        for _, alike in groupby(self._waiting, lambda inputs: inputs.shape[1:]):
            inputs = torch.cat(list(alike))
            self._take(inputs.contiguous(memory_format=torch.channels_last) if inputs.ndim == 4 else inputs)
        self._waiting = []

    def _take(self, inputs: Tensor) -> None:
        correlations = self._correlations(inputs)
        if correlations is None:
            if self._rows is None:
                self._rows = Moments.zeros(self.layer.groups, self.layer.m, sums_on(inputs.device))
            self._rows.add(self.layer.rows(inputs))
        else:
            correlations.add(inputs)

    def _correlations(self, inputs: Tensor) -> Correlations | None:
        """Those of images of this size, or None where they do not pay."""
        module, size = self.layer.module, (inputs.shape[-2], inputs.shape[-1])
        if not isinstance(module, nn.Conv2d):
            return None
        if size not in self._by_size:
            self._by_size[size] = Correlations(module, *size) if pays(module, *size) else None
        return self._by_size[size]

    def moments(self) -> Moments:
        """Of all that came so far."""
        self._take_waiting()
        whole = Moments.zeros(self.layer.groups, self.layer.m, sums_on(self.layer.module.weight.device))
        for sums in [self._rows, *self._by_size.values()]:
            if isinstance(sums, Correlations):
                whole += Moments(sums.products()[None], sums.total()[None], sums.count)
            elif sums is not None:
                whole += sums
        return whole


@dataclass(frozen=True)
class Calibration:
    """What moments are taken over, and of which layers; see :func:`chunked_moments`."""

    network: nn.Module
    layers: list[Layer]
    inputs: Batches
    budget: Budget | None
    batch_size: int

    def over(self, some: slice) -> dict[str, Moments]:
        """The moments over some of the images."""
        batches = some_of(self.inputs, some).split(self.batch_size)
        return input_moments(self.network, self.layers, batches, self.budget, some.start)


@torch.inference_mode()
def chunked_moments(
    network: nn.Module,
    layers: list[Layer],
    inputs: Batches,
    budget: Budget | None,
    batch_size: int = 128,
    each: Each = in_turn,
) -> dict[str, Moments]:
    """The same as :func:`input_moments`, chunk by chunk, wherever these are summed.

    Raises:
        FloatingPointError: as there.
    """
    firsts = range(0, len(inputs), CHUNK)
    chunks = {f"of images from {first}": slice(first, min(first + CHUNK, len(inputs))) for first in firsts}
    work = each(attrgetter("over"), Calibration(network, layers, inputs, budget, batch_size))
    sums: dict[str, Moments] = {}
    for chunk in ordered(work(chunks, "second moments", "chunk"), chunks):
        for name, its in chunk.items():
            if name in sums:
                sums[name] += its
            else:
                sums[name] = its
    return sums


@torch.inference_mode()
def input_moments(
    network: nn.Module, layers: list[Layer], batches: Iterable[Any], budget: Budget | None = None, came: int = 0
) -> dict[str, Moments]:
    """The moments of every layer's inputs, in one pass over ``batches`` of inputs (B, ...).

    A layer that is called more than once in a pass (shared weights) adds up over its calls. Without a
    ``budget`` every row counts; ``came`` images are taken in by others, before these.

    Raises:
        FloatingPointError: a layer received NaN or Inf, or the network gives them; names the layer.
    """
    network.eval()
    streams = {layer.name: Stream(layer, budget, came) for layer in layers}
    waiting: list[tuple[Any, Tensor]] = []  # batches whose outputs have not been looked at
    for batch in batches:
        batch = placed(batch, network)
        with _watching(streams, count(batch)):
            outputs = logits_of(call(network, batch))
        waiting.append((batch, torch.isfinite(outputs).all()))
        if len(waiting) >= looks(outputs.device):
            _look(network, layers, waiting)
    _look(network, layers, waiting)
    moments = {name: stream.moments() for name, stream in streams.items()}
    _check(moments)
    return moments


def _look(network: nn.Module, layers: list[Layer], waiting: list[tuple[Any, Tensor]]) -> None:
    """Whether what came of some batches is finite, at once; they wait no longer."""
    if layers and waiting and not truth(torch.stack([finite for _, finite in waiting]).all()):
        _refuse(network, layers, next(batch for batch, finite in waiting if not finite))
    waiting.clear()


def _refuse(network: nn.Module, layers: list[Layer], batch: Any) -> NoReturn:
    """Name the first layer that receives what is not finite in this batch, or the last layer, which gives it."""
    streams = {layer.name: Stream(layer, None) for layer in layers}
    with _watching(streams, count(batch)):
        call(network, batch)
    _check({name: stream.moments() for name, stream in streams.items()})
    raise FloatingPointError(f"layer {layers[-1].name} gave values that are not finite (NaN or Inf)")


def _check(moments: dict[str, Moments]) -> None:
    for name, moment in moments.items():
        # What is not finite shows in its own square and in the total.
        whole = torch.isfinite(moment.total).all() & torch.isfinite(moment.products.diagonal(0, 1, 2)).all()
        if not truth(whole):
            raise FloatingPointError(f"layer {name} received values that are not finite (NaN or Inf)")


def _watching(streams: dict[str, Stream], images: int) -> AbstractContextManager[None]:
    def hook(stream: Stream) -> RemovableHandle:
        return stream.layer.module.register_forward_pre_hook(lambda _, args: stream.add(args[0], images))

    return held(map(hook, streams.values()))


def to_tensors(moments: dict[str, Moments]) -> dict[str, Tensor]:
    """Flat tensors for the disk."""
    flat: dict[str, Tensor] = {}
    for name, moment in moments.items():
        flat[f"{name}.products"] = moment.products
        flat[f"{name}.total"] = moment.total
        flat[f"{name}.count"] = torch.tensor(moment.count)
    return flat


def from_tensors(flat: dict[str, Tensor], device: torch.device = CPU) -> dict[str, Moments]:
    """Undo :func:`to_tensors`, for a network on ``device``."""
    names = [key.removesuffix(".products") for key in flat if key.endswith(".products")]
    there = sums_on(device)
    return {
        n: Moments(flat[f"{n}.products"].to(there), flat[f"{n}.total"].to(there), int(flat[f"{n}.count"]))
        for n in names
    }
