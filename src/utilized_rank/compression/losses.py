"""What a network loses where one layer is cut: the energy of its outputs, or measured divergence."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

import numpy as np
import torch
from torch import nn

from ..networks.batches import Batches
from ..networks.evaluation import class_dimension, outputs
from ..networks.suffix import Suffix, Traced
from ..ranks.layers import Layer
from ..ranks.projection import replaced
from .costs import Candidate, spread
from .lowrank import Cut, Factors
from .pairs import bias_of

Losses = dict[str, dict[str, np.ndarray]]
"""What the network loses where a layer takes a form at rank 1, 2, ...: by layer and form, float64."""


def energy_losses(network: nn.Module, layers: Iterable[Candidate], images: Batches, memory: int) -> Losses:
    """The part of the variance of a layer's outputs that is lost (BALF's energy, relative to the layer's own)."""
    return {c.layer.name: {form: _relative(cut)[1:] for form, cut in c.cuts.items()} for c in layers}


@torch.inference_mode()
def divergence_losses(network: nn.Module, layers: Iterable[Candidate], images: Batches, memory: int) -> Losses:
    """The mean Kullback-Leibler divergence of the network's predictions, in nats, with one layer cut.

    Measured in each form at a few ranks, and in between from the lost part of the outputs' variance, on a double
    logarithmic scale.

    Args:
        network: of the layers.
        layers: in any order; the order of calls is fastest.
        images: a few hundred.
        memory: MiB.
    """
    suffix = Suffix(Traced(network.eval()), images, torch.arange(len(images)).split(128), memory * 2**20)
    before = outputs(network, images, 128)
    classes = class_dimension(before)
    before = before.log_softmax(classes)
    losses: Losses = {}
    for candidate in layers:
        layer = candidate.layer
        suffix.move_to(layer.name)

        def divergence(factors: Factors, layer: Layer = layer) -> float:
            with cut_to(layer, factors):
                after = torch.cat([suffix.logits(i) for i in range(len(suffix.batches))]).float().log_softmax(classes)
            return float((before.exp() * (before - after)).sum(classes).mean())

        losses[layer.name] = {}
        for form, cut in candidate.cuts.items():
            ranks = spread(candidate.saving(form))
            lost, found = _relative(cut), [divergence(cut.factors(rank)) for rank in ranks]
            losses[layer.name][form] = _interpolated(lost[1:], lost[ranks].tolist(), found)
    return losses


LOSSES: dict[str, Callable[[nn.Module, Iterable[Candidate], Batches, int], Losses]] = {
    "energy": energy_losses,
    "divergence": divergence_losses,
}


def cut_to(layer: Layer, factors: Factors) -> AbstractContextManager[None]:
    """The layer as it would be in two, while the context lasts."""
    bias = bias_of(layer, factors.bias)
    return replaced({layer: factors.matrix()}, {} if bias is None else {layer: bias})


def _relative(cut: Cut) -> np.ndarray:
    return (cut.errors / cut.errors[0].clamp_min(1e-300)).cpu().numpy()


LEAST = 1e-12
"""Losses and errors below it are taken for it: a logarithm needs something."""


def _interpolated(at: np.ndarray, lost: list[float], found: list[float]) -> np.ndarray:
    if not lost:
        return np.zeros(len(at))
    order = np.argsort(lost)
    x, y = (np.log(np.maximum(np.array(values)[order], LEAST)) for values in (lost, found))
    return np.exp(np.interp(np.log(np.maximum(at, LEAST)), x, np.maximum.accumulate(y)))
