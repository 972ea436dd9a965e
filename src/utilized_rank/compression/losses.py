"""What a network loses where one layer is cut: the energy of its outputs, or the divergence of its predictions.

The divergence is measured, or predicted from the curvature and measured where a budget cuts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from itertools import tee
from typing import Protocol

import numpy as np
import torch
from torch import nn

from ..networks.batches import Batches
from ..networks.evaluation import class_dimension
from ..networks.suffix import Suffix, Traced
from ..ranks.curvature import Sample, curvature, sample
from ..ranks.layers import Layer
from ..ranks.projection import replaced
from .costs import Candidate, Choices, Way, spread
from .lowrank import Cut, Factors
from .pairs import bias_of

Table = dict[str, dict[str, np.ndarray]]
"""What the network loses where a layer takes a form at rank 1, 2, ...: by layer and form, float64."""
Points = dict[str, dict[Way, float]]
"""What was measured, by layer, form and rank."""
TOGETHER = 128
"""Inputs of a sample that a network is given at a time."""


class Losses(Protocol):
    """What a budget adds up over the layers, as far as it is known."""

    def table(self, known: Points) -> Table:
        """Of every layer, form and rank, given what was measured of some."""

    def measured(self, choices: Choices) -> Points:
        """What can be known better of these choices; nothing where the table is as good."""


class Fixed:
    """Losses that are known once and for all."""

    def __init__(self, table: Table) -> None:
        self._table = table

    def table(self, known: Points) -> Table:
        """The same, whatever is known."""
        return self._table

    def measured(self, choices: Choices) -> Points:
        """Nothing."""
        return {}


def energy_losses(network: nn.Module, layers: Iterable[Candidate], inputs: Batches, count: int, memory: int) -> Losses:
    """The part of the variance of a layer's outputs that is lost (BALF's energy, relative to the layer's own)."""
    return Fixed({c.layer.name: {form: _relative(cut)[1:] for form, cut in c.cuts.items()} for c in layers})


def divergence_losses(
    network: nn.Module, layers: Iterable[Candidate], inputs: Batches, count: int, memory: int
) -> Losses:
    """The mean Kullback-Leibler divergence of the network's predictions, in nats, with one layer cut.

    Measured in each form at a few ranks, and in between from the lost part of the outputs' variance, on a double
    logarithmic scale. Arguments as of :func:`curvature_losses`.
    """
    return Fixed(_divergences(Divergence(network, sample(network, inputs, count), memory), layers))


def curvature_losses(
    network: nn.Module, layers: Iterable[Candidate], inputs: Batches, count: int, memory: int
) -> Losses:
    """The same divergence as one backward pass predicts it, measured only where a budget cuts.

    Args:
        network: of the layers.
        layers: in the order of calls.
        inputs: that ``count`` of are drawn from, as :func:`utilized_rank.ranks.curvature.sample` does.
        count: inputs on which divergences are taken.
        memory: MiB.
    """
    return Predicted(network, list(layers), sample(network, inputs, count), memory)


LOSSES: dict[str, Callable[[nn.Module, Iterable[Candidate], Batches, int, int], Losses]] = {
    "energy": energy_losses,
    "divergence": divergence_losses,
    "curvature": curvature_losses,
}


class Divergence:
    """Measures the mean divergence of a network's predictions with one layer cut.

    Args:
        network: in evaluation mode from now on.
        some: inputs.
        memory: MiB.
    """

    def __init__(self, network: nn.Module, some: Sample, memory: int) -> None:
        self._traced, self._some, self._memory = Traced(network.eval()), some, memory
        self._classes = class_dimension(some.logits)
        self._before = some.logits.log_softmax(self._classes)

    @torch.inference_mode()
    def of(self, cuts: Iterable[tuple[Layer, Iterable[Factors]]]) -> Iterator[list[float]]:
        """In nats, of each layer in each of some ways; layers in the order of calls."""
        batches = torch.arange(len(self._some.inputs)).split(TOGETHER)
        suffix = Suffix(self._traced, self._some.inputs, batches, self._memory * 2**20)
        for layer, ways in cuts:
            suffix.move_to(layer.name)
            yield [self._with(suffix, layer, factors) for factors in ways]

    def _with(self, suffix: Suffix, layer: Layer, factors: Factors) -> float:
        with cut_to(layer, factors):
            after = torch.cat([suffix.logits(i) for i in range(len(suffix.batches))]).float()
        after = after.log_softmax(self._classes)
        by_position = (self._before.exp() * (self._before - after)).sum(self._classes)  # (N, ...)
        by_input = by_position.reshape(len(by_position), -1).mean(1)
        return float((by_input * self._some.weights.to(by_input)).sum())


def _divergences(divergence: Divergence, layers: Iterable[Candidate]) -> Table:
    """Measured at a few ranks of each form, and interpolated."""
    layers, again = tee(layers)
    found = divergence.of((c.layer, (c.cuts[form].factors(rank) for form, rank in _few(c))) for c in again)
    return {c.layer.name: _interpolated(c, its) for c, its in zip(layers, found, strict=True)}


def _few(candidate: Candidate) -> list[Way]:
    return [(form, rank) for form in candidate.cuts for rank in spread(candidate.saving(form))]


class Predicted:
    """Divergences from the curvature of the network (see :mod:`utilized_rank.ranks.curvature`), and what was measured.

    A quadratic knows which layers, forms and ranks lose little, but not how much those lose that lose much: on a double
    logarithmic scale, what is measured lies about a line over what is predicted, steeper than one. The line is fitted
    to all that was measured; a layer's own points say how far from it the layer lies.

    Args:
        network: in evaluation mode from now on.
        layers: in the order of calls; those that no gradient reaches are measured.
        some: inputs.
        memory: MiB.
    """

    def __init__(self, network: nn.Module, layers: list[Candidate], some: Sample, memory: int) -> None:
        found = curvature(network, [candidate.layer for candidate in layers], some.inputs, some.weights)
        self._divergence = Divergence(network, some, memory)
        self._layers = {candidate.layer.name: candidate for candidate in layers}
        self._predicted: Table = {
            name: {form: (cut.lost(found[name])[1:] / 2).cpu().numpy() for form, cut in candidate.cuts.items()}
            for name, candidate in self._layers.items()
            if name in found
        }
        others = [candidate for name, candidate in self._layers.items() if name not in found]
        self._others = _divergences(self._divergence, others) if others else {}
        self._measured: dict[tuple[str, Way], float] = {}

    def measured(self, choices: Choices) -> Points:
        """The divergence at each of the choices, by itself."""
        new = {name: way for name, way in choices.items() if (name, way) not in self._measured}
        cuts = [
            (c.layer, [c.cuts[new[name][0]].factors(new[name][1])]) for name, c in self._layers.items() if name in new
        ]
        for (layer, _), (found,) in zip(cuts, self._divergence.of(cuts) if cuts else [], strict=True):
            self._measured[layer.name, new[layer.name]] = found
        return {name: {way: self._measured[name, way]} for name, way in choices.items()}

    def table(self, known: Points) -> Table:
        """As predicted; where something was measured, that, and what follows from it for the rest."""
        points = {
            name: [(form, self._predicted[name][form][rank - 1], its) for (form, rank), its in ways.items()]
            for name, ways in known.items()
            if name in self._predicted
        }
        if not any(points.values()):
            return self._predicted | self._others
        x, y = np.array([(predicted, its) for ways in points.values() for _, predicted, its in ways]).T
        line = Line(x, y)
        return {
            name: {form: line.through(values, points.get(name, []), form) for form, values in forms.items()}
            for name, forms in self._predicted.items()
        } | self._others


class Line:
    """A line through logarithms: of what was measured over what was predicted.

    Args:
        predicted: (K,), none below zero.
        measured: (K,).
    """

    def __init__(self, predicted: np.ndarray, measured: np.ndarray) -> None:
        # What is far below the others is noise, and says nothing of them.
        self._floors = [max(FAINT * float(values.mean()), LEAST) for values in (predicted, measured)]
        x, y = self._log(predicted, 0), self._log(measured, 1)
        varies = float(np.square(x - x.mean()).sum())
        slope = float(((x - x.mean()) * (y - y.mean())).sum()) / varies if varies > 0 else 1.0
        self.slope = min(max(slope, 1.0), STEEPEST)
        self._start = float(y.mean() - self.slope * x.mean())

    def _log(self, values: np.ndarray, axis: int) -> np.ndarray:
        return np.log(np.maximum(values, 0) + self._floors[axis])

    def _of(self, x: np.ndarray) -> np.ndarray:
        return self._start + self.slope * x

    def through(self, predicted: np.ndarray, points: list[tuple[str, float, float]], form: str) -> np.ndarray:
        """What is expected of a layer in one form, (K,), where ``points`` of it (form, predicted, measured) are known.

        The distance from the line is the one of the points of this form, and in between on straight lines; where there
        are none, the mean of those of others; and none where there are no points at all.
        """
        x = self._log(predicted, 0)
        own = sorted((p, m) for f, p, m in points if f == form)
        at, beside = self._beside(own or [(p, m) for _, p, m in points])
        distance = np.interp(x, at, beside) if own else beside.mean() if points else 0.0
        return np.maximum(np.exp(self._of(x) + distance) - self._floors[1], 0)

    def _beside(self, points: list[tuple[float, float]]) -> tuple[np.ndarray, np.ndarray]:
        """Where points (predicted, measured) lie along the line, and how far from it: (K,), (K,)."""
        predicted, measured = np.array(points).reshape(-1, 2).T
        at = self._log(predicted, 0)
        return at, self._log(measured, 1) - self._of(at)


def cut_to(layer: Layer, factors: Factors) -> AbstractContextManager[None]:
    """The layer as it would be in two, while the context lasts."""
    bias = bias_of(layer, factors.bias)
    return replaced({layer: factors.matrix()}, {} if bias is None else {layer: bias})


def _relative(cut: Cut) -> np.ndarray:
    return (cut.errors / cut.errors[0].clamp_min(1e-300)).cpu().numpy()


LEAST = 1e-12
"""Losses and errors below it are taken for it: a logarithm needs something."""
FAINT = 1e-3
"""Part of the mean loss of a layer below which losses are not told apart."""
STEEPEST = 2.0
"""How fast what is measured may grow with what is predicted, on a double logarithmic scale."""


def _interpolated(candidate: Candidate, found: list[float]) -> dict[str, np.ndarray]:
    """What a layer loses in each form, (K,), from a few ranks, over the lost part of its outputs' variance."""
    losses = {}
    for form, cut in candidate.cuts.items():
        lost = _relative(cut)
        at = [(lost[rank], its) for (f, rank), its in zip(_few(candidate), found, strict=True) if f == form]
        losses[form] = _between(lost[1:], *np.array(at).T) if at else np.zeros(len(lost) - 1)
    return losses


def _between(at: np.ndarray, lost: np.ndarray, found: np.ndarray) -> np.ndarray:
    order = np.argsort(lost)
    x, y = (np.log(np.maximum(values[order], LEAST)) for values in (lost, found))
    return np.exp(np.interp(np.log(np.maximum(at, LEAST)), x, np.maximum.accumulate(y)))
