"""What a layer costs in each form and rank: parameters, FLOPs, measured time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from ..networks import cost
from ..networks.batches import first
from ..networks.evaluation import received
from ..ranks.layers import Layer
from .lowrank import FORMS, Cut, Fit, forms_of, largest_saving, weights_a_rank
from .pairs import pair

Way = tuple[str, int]
"""A form and a rank: how a layer is put in two."""
Choices = dict[str, Way]
"""Of each layer that is put in two, by name; the others stay whole."""
POINTS = 7
"""Ranks of a layer at which the divergence and the latency are measured."""
SECONDS = 0.03
"""For which the latency is measured, at each of them."""


@dataclass(frozen=True)
class Candidate:
    """A layer and its cuts, by form."""

    layer: Layer
    cuts: dict[str, Cut]

    def saving(self, form: str) -> int:
        """The largest rank at which a form holds fewer weights than the layer; 0 where none does."""
        return min(len(self.cuts[form].errors) - 1, largest_saving(self.layer, form))

    def module(self, form: str, rank: int) -> nn.Sequential:
        """Two layers of this form and rank, with random weights and a bias."""
        return pair(self.layer.module, form, rank, bias=True).eval()


def candidates(fits: Iterable[Fit], forms: list[str]) -> list[Candidate]:
    """The layers with their cuts in those of ``forms`` that they can take."""
    return [Candidate(fit.layer, {f: FORMS[f](fit) for f in forms_of(fit.layer) if f in forms}) for fit in fits]


@dataclass(frozen=True)
class Costs:
    """What a network costs, its layers, and what would replace them; in whole numbers of one unit."""

    network: int
    layers: dict[str, int]
    """Each layer as it is."""
    ways: dict[str, dict[str, np.ndarray]]
    """By layer and form, at the ranks 1, 2, ... that save weights: int64."""


def parameter_costs(network: nn.Module, layers: list[Candidate], images: Any) -> Costs:
    """In parameters; what replaces a layer without a bias has one."""

    def of(candidate: Candidate, form: str) -> np.ndarray:
        layer = candidate.layer
        added = layer.groups * layer.n if layer.module.bias is None else 0
        return weights_a_rank(layer, form) * _ranks(candidate, form) + added

    whole = {c.layer.name: c.layer.groups * c.layer.m * c.layer.n for c in layers}
    return Costs(cost.parameters(network), whole, {c.layer.name: {f: of(c, f) for f in c.cuts} for c in layers})


def flop_costs(network: nn.Module, layers: list[Candidate], images: Any) -> Costs:
    """In floating point operations for one image, by :func:`utilized_rank.networks.cost.flops_of`."""
    one = first(images, 1)
    flows = _flows(network, layers, one)

    def of(candidate: Candidate, form: str) -> np.ndarray:
        return of_all_calls(candidate.module(form, 1), candidate.layer.name) * _ranks(candidate, form)

    def of_all_calls(module: nn.Module, name: str) -> int:
        return sum(cost.flops_of(module, inputs) for inputs in flows[name])

    whole = {c.layer.name: of_all_calls(c.layer.module, c.layer.name) for c in layers}
    return Costs(cost.flops(network, one), whole, {c.layer.name: {f: of(c, f) for f in c.cuts} for c in layers})


def latency_costs(network: nn.Module, layers: list[Candidate], images: Any) -> Costs:
    """In nanoseconds for ``images``, as measured on this machine at a few ranks, and straight lines between them."""
    flows = _flows(network, layers, images)
    whole: dict[str, int] = {}
    ways: dict[str, dict[str, np.ndarray]] = {}
    for c in layers:
        measured = [(form, rank) for form in c.cuts for rank in spread(c.saving(form))]
        modules = [c.layer.module, *(c.module(*way) for way in measured)]
        times = np.sum([cost.latencies(modules, inputs, SECONDS) for inputs in flows[c.layer.name]], axis=0)
        whole[c.layer.name] = round(1e9 * times[0])
        ways[c.layer.name] = {
            form: np.interp(
                _ranks(c, form),
                [rank for f, rank in measured if f == form],
                [1e9 * time for (f, _), time in zip(measured, times[1:], strict=True) if f == form],
            ).astype(np.int64)
            if c.saving(form)
            else np.empty(0, np.int64)
            for form in c.cuts
        }
    return Costs(round(1e9 * cost.latencies([network], images)[0]), whole, ways)


COSTS: dict[str, Callable[[nn.Module, list[Candidate], Any], Costs]] = {
    "params": parameter_costs,
    "flops": flop_costs,
    "latency": latency_costs,
}


def _ranks(candidate: Candidate, form: str) -> np.ndarray:
    return np.arange(1, candidate.saving(form) + 1, dtype=np.int64)


def spread(most: int) -> list[int]:
    """A few ranks from 1 to ``most``, evenly on a log scale."""
    return np.unique(np.geomspace(1, most, POINTS).round().astype(int)).tolist() if most else []


def _flows(network: nn.Module, layers: list[Candidate], images: Any) -> dict[str, list[Tensor]]:
    """What flows into each layer for ``images``, call by call."""
    name_of: dict[nn.Module, str] = {c.layer.module: c.layer.name for c in layers}
    flows: dict[str, list[Tensor]] = {name: [] for name in name_of.values()}
    for module, inputs in received(network, name_of, images):
        flows[name_of[module]].append(inputs)
    return flows
