"""Which form and rank each layer gets: from tolerances that were searched, or from a budget for all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from ..networks import cost
from ..networks.batches import Batches
from ..networks.evaluation import outputs, received
from ..networks.suffix import Suffix, Traced
from ..ranks.layers import Layer, Weighted
from ..ranks.projection import replaced
from ..ranks.rank_search import smallest
from .allocation import Allocation, Options
from .lowrank import FORMS, Cut, Factors, Fit, bias_of, forms_of, largest_saving, pair, saves, weights_a_rank

Way = tuple[str, int]
"""A form and a rank: how a layer is put in two."""
Choices = dict[str, Way]
"""Of each layer that is put in two, by name; the others stay whole."""
POINTS = 7
"""Ranks of a layer at which the divergence and the latency are measured."""
SECONDS = 0.03
"""For which the latency is measured, at each of them."""
STEPS = 200
"""Budgets that a joint search tells apart, from the smallest network to the whole one."""


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


def parameter_costs(network: nn.Module, layers: list[Candidate], images: Tensor) -> Costs:
    """In parameters; what replaces a layer without a bias has one."""

    def of(candidate: Candidate, form: str) -> np.ndarray:
        layer = candidate.layer
        added = layer.groups * layer.n if layer.module.bias is None else 0
        return weights_a_rank(layer, form) * _ranks(candidate, form) + added

    whole = {c.layer.name: c.layer.groups * c.layer.m * c.layer.n for c in layers}
    return Costs(cost.parameters(network), whole, {c.layer.name: {f: of(c, f) for f in c.cuts} for c in layers})


def flop_costs(network: nn.Module, layers: list[Candidate], images: Tensor) -> Costs:
    """In floating point operations for one image, by :func:`utilized_rank.networks.cost.flops_of`."""
    one = images[:1]
    flows = _flows(network, layers, one)

    def of(candidate: Candidate, form: str) -> np.ndarray:
        return of_all_calls(candidate.module(form, 1), candidate.layer.name) * _ranks(candidate, form)

    def of_all_calls(module: nn.Module, name: str) -> int:
        return sum(cost.flops_of(module, inputs) for inputs in flows[name])

    whole = {c.layer.name: of_all_calls(c.layer.module, c.layer.name) for c in layers}
    return Costs(cost.flops(network, one), whole, {c.layer.name: {f: of(c, f) for f in c.cuts} for c in layers})


def latency_costs(network: nn.Module, layers: list[Candidate], images: Tensor) -> Costs:
    """In nanoseconds for ``images``, as measured on this machine at a few ranks, and straight lines between them."""
    flows = _flows(network, layers, images)
    whole: dict[str, int] = {}
    ways: dict[str, dict[str, np.ndarray]] = {}
    for c in layers:
        measured = [(form, rank) for form in c.cuts for rank in _spread(c.saving(form))]
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


COSTS: dict[str, Callable[[nn.Module, list[Candidate], Tensor], Costs]] = {
    "params": parameter_costs,
    "flops": flop_costs,
    "latency": latency_costs,
}


def _ranks(candidate: Candidate, form: str) -> np.ndarray:
    return np.arange(1, candidate.saving(form) + 1, dtype=np.int64)


def _spread(most: int) -> list[int]:
    """A few ranks from 1 to ``most``, evenly on a log scale."""
    return np.unique(np.geomspace(1, most, POINTS).round().astype(int)).tolist() if most else []


def _flows(network: nn.Module, layers: list[Candidate], images: Tensor) -> dict[str, list[Tensor]]:
    """What flows into each layer for ``images``, call by call."""
    name_of: dict[nn.Module, str] = {c.layer.module: c.layer.name for c in layers}
    flows: dict[str, list[Tensor]] = {name: [] for name in name_of.values()}
    for module, inputs in received(network, name_of, images):
        flows[name_of[module]].append(inputs)
    return flows


Losses = dict[str, dict[str, np.ndarray]]
"""What the network loses where a layer takes a form at rank 1, 2, ...: by layer and form, float64."""


def energy_losses(network: nn.Module, layers: list[Candidate], images: Batches, memory: int) -> Losses:
    """The part of the variance of a layer's outputs that is lost (BALF's energy, relative to the layer's own)."""
    return {c.layer.name: {form: _relative(cut)[1:] for form, cut in c.cuts.items()} for c in layers}


@torch.inference_mode()
def divergence_losses(network: nn.Module, layers: list[Candidate], images: Batches, memory: int) -> Losses:
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
    before = outputs(network, images, 128).log_softmax(1)
    losses: Losses = {}
    for candidate in layers:
        layer = candidate.layer
        suffix.move_to(layer.name)

        def divergence(factors: Factors, layer: Layer = layer) -> float:
            with _cut(layer, factors):
                after = torch.cat([suffix.logits(i) for i in range(len(suffix.batches))]).float().log_softmax(1)
            return float((before.exp() * (before - after)).sum(1).mean())

        losses[layer.name] = {}
        for form, cut in candidate.cuts.items():
            ranks = _spread(candidate.saving(form))
            lost, found = _relative(cut), [divergence(cut.factors(rank)) for rank in ranks]
            losses[layer.name][form] = _interpolated(lost[1:], lost[ranks].tolist(), found)
    return losses


LOSSES: dict[str, Callable[[nn.Module, list[Candidate], Batches, int], Losses]] = {
    "energy": energy_losses,
    "divergence": divergence_losses,
}


def _cut(layer: Layer, factors: Factors) -> AbstractContextManager[None]:
    """The layer as it would be in two, while the context lasts."""
    bias = bias_of(layer, factors.bias)
    return replaced({layer: factors.matrix()}, {} if bias is None else {layer: bias})


def _relative(cut: Cut) -> np.ndarray:
    return (cut.errors / cut.errors[0].clamp_min(1e-300)).numpy()


LEAST = 1e-12
"""Losses and errors below it are taken for it: a logarithm needs something."""


def _interpolated(at: np.ndarray, lost: list[float], found: list[float]) -> np.ndarray:
    if not lost:
        return np.zeros(len(at))
    order = np.argsort(lost)
    x, y = (np.log(np.maximum(np.array(values)[order], LEAST)) for values in (lost, found))
    return np.exp(np.interp(np.log(np.maximum(at, LEAST)), x, np.maximum.accumulate(y)))


class Budgets:
    """The best choices for every budget, for one kind of cost and one of loss."""

    def __init__(self, layers: list[Candidate], costs: Costs, losses: Losses) -> None:
        # Where they are measured, layers by themselves may take more time than the network.
        self.network = max(costs.network, sum(costs.layers.values()))
        """What the whole network costs."""
        self._fixed = self.network - sum(costs.layers.values())
        self._costs = costs
        self._layers = layers
        self._ways = [[None, *_ways(candidate)] for candidate in layers]
        options = [_options(c, ways, costs, losses) for c, ways in zip(layers, self._ways, strict=True)]
        self._allocation = Allocation(options, sum(costs.layers.values()))
        self.least = self._fixed + self._allocation.least
        """What the smallest network costs."""

    def within(self, amount: int) -> Choices:
        """What loses least and costs ``amount`` at most, everything that is not a choice counted in.

        Raises:
            ValueError: the smallest network costs more.
        """
        amount = min(amount, self.network)
        if amount < self.least:
            kept, asked = self.least / self.network, amount / self.network
            raise ValueError(f"a budget of {asked:.1%} cannot be kept: the smallest network costs {kept:.1%}")
        chosen = self._allocation.within(amount - self._fixed)
        named = zip(self._layers, self._ways, chosen, strict=True)
        return {c.layer.name: way for c, ways, k in named if (way := ways[k]) is not None}

    def cost(self, choices: Choices) -> int:
        """What the whole network costs with these choices."""
        ways = self._costs.ways
        saved = (self._costs.layers[name] - int(ways[name][form][rank - 1]) for name, (form, rank) in choices.items())
        return self.network - sum(saved)

    def steps(self) -> list[int]:
        """Budgets from the smallest network to the whole one, :data:`STEPS` of them and one."""
        return np.linspace(self.least, self.network, STEPS + 1).astype(np.int64).tolist()


def _ways(candidate: Candidate) -> list[Way]:
    return [(form, rank) for form in candidate.cuts for rank in range(1, candidate.saving(form) + 1)]


def _options(candidate: Candidate, ways: list[Way | None], costs: Costs, losses: Losses) -> Options:
    name = candidate.layer.name
    pairs = [
        (costs.layers[name], 0.0)
        if way is None
        else (costs.ways[name][way[0]][way[1] - 1], losses[name][way[0]][way[1] - 1])
        for way in ways
    ]
    return Options(np.array([c for c, _ in pairs], dtype=np.int64), np.array([loss for _, loss in pairs], dtype=float))


@dataclass(frozen=True)
class Joint:
    """The boundary that a joint search found."""

    choices: Choices
    budget: int
    """The smallest of :meth:`Budgets.steps` that passed."""
    tried: dict[int, bool]
    """Budgets and their verdicts: the step below :attr:`budget` failed, unless there is none."""
    cumulative: int | None = None
    """What :attr:`choices` cost where they are those of a cumulative search, which passed and cost less."""


def joint(budgets: Budgets, passes: Callable[[Choices], bool]) -> Joint:
    """The smallest budget at which the network passes with all layers replaced, by bisection.

    The whole network passes without being asked.
    """
    steps = budgets.steps()
    tried: dict[int, bool] = {}

    def verdict(step: int) -> bool:
        tried[steps[step]] = passes(budgets.within(steps[step]))
        return tried[steps[step]]

    found = smallest(verdict, -1, STEPS)
    return Joint(budgets.within(steps[found]) if found < STEPS else {}, steps[found], tried)


def independent(ranks: dict[str, int], layers: list[Candidate], flops: Costs) -> Choices:
    """Each layer at its utilized rank, where two layers of it hold fewer weights than the one.

    Args:
        ranks: of the channel form, by layer.
        layers: with their cuts. Where another form is closer at no more FLOPs, it is taken instead.
        flops: their costs.
    """
    some = [c for c in layers if c.layer.name in ranks and saves(c.layer, "channel", ranks[c.layer.name])]
    return {c.layer.name: closest(c, ranks[c.layer.name], flops) for c in some}


def closest(candidate: Candidate, rank: int, flops: Costs) -> Way:
    """The form, and its rank, of least error among those with no more FLOPs than the channel form at ``rank``."""
    ways = flops.ways[candidate.layer.name]
    most = ways["channel"][rank - 1]
    affordable = {form: int(np.searchsorted(its, most, side="right")) for form, its in ways.items()} | {"channel": rank}
    errors = {form: float(candidate.cuts[form].errors[r]) for form, r in affordable.items() if r > 0}
    form = min(errors, key=errors.__getitem__)
    return form, affordable[form]


class Cumulative:
    """Spends a tolerance along the network: after layer i of n, at most i / n of it is gone.

    Args:
        network: the one whose layers are being replaced, in evaluation mode.
        layers: in the order of calls.
        flops: their costs.
        inputs: images of the search split, normalised, (N, C, H, W).
        labels: int64 (N,).
        epsilon: in percentage points.
        memory: MiB.
    """

    def __init__(
        self,
        network: nn.Module,
        layers: list[Layer],
        forms: list[str],
        flops: Costs,
        inputs: Batches,
        labels: Tensor,
        epsilon: float,
        memory: int,
    ) -> None:
        self._places = {layer.name: i + 1 for i, layer in enumerate(layers)}
        self._network, self._forms, self._flops = network, forms, flops
        self._labels = labels
        self._batches = torch.arange(len(labels)).split(128)
        self._suffix = Suffix(Traced(network.eval()), inputs, self._batches, memory * 2**20)
        self._correct = self._count()
        self._spare = epsilon / 100 * len(labels)

    @torch.inference_mode()
    def _count(self) -> int:
        """Images that the network classifies correctly as it stands."""
        found = (self._suffix.logits(i).argmax(1) for i in range(len(self._batches)))
        return sum(int((f == self._labels[b]).sum()) for f, b in zip(found, self._batches, strict=True))

    def choose(self, fit: Fit) -> Factors | None:
        """The smallest rank at which the network so far is within its part of the tolerance; None: whole."""
        layer = fit.layer
        candidate = candidates([fit], self._forms)[0]
        needed = self._correct - self._spare * self._places[layer.name] / len(self._places)
        self._suffix.move_to(layer.name)
        inside = Layer(layer.name, cast(Weighted, self._network.get_submodule(layer.name)))

        def factors(rank: int) -> Factors:
            form, its = closest(candidate, rank, self._flops)
            return candidate.cuts[form].factors(its)

        def passes(rank: int) -> bool:
            with _cut(inside, factors(rank)):
                return self._count() >= needed - 1e-9

        most = candidate.saving("channel")
        rank = smallest(passes, 0, most + 1)
        return factors(rank) if rank <= most else None
