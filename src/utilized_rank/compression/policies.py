"""Which form and rank each layer gets: from tolerances that were searched, or from a budget for all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import numpy as np
from torch import nn

from ..networks.evaluation import Score
from ..networks.standing import Standing
from ..ranks.layers import Layer, Weighted
from ..ranks.rank_search import smallest
from .allocation import Allocation, Options
from .costs import Candidate, Choices, Costs, Way, candidates
from .losses import Losses, cut_to
from .lowrank import Factors, Fit, saves

STEPS = 200
"""Budgets that a joint search tells apart, from the smallest network to the whole one."""


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
        forms: that a layer may take.
        flops: their costs.
        score: of the search split, the higher the better.
        epsilon: in percentage points of accuracy, or in the unit of the score.
        memory: MiB.
    """

    def __init__(
        self,
        network: nn.Module,
        layers: list[Layer],
        forms: list[str],
        flops: Costs,
        score: Score,
        epsilon: float,
        memory: int,
    ) -> None:
        self._places = {layer.name: i + 1 for i, layer in enumerate(layers)}
        self._network, self._forms, self._flops = network, forms, flops
        self._standing = Standing(network, score, memory)
        self._before = self._standing.now()
        self._epsilon = epsilon

    def choose(self, fit: Fit) -> Factors | None:
        """The smallest rank at which the network so far is within its part of the tolerance; None: whole."""
        layer = fit.layer
        candidate = candidates([fit], self._forms)[0]
        needed = self._before - self._epsilon * self._places[layer.name] / len(self._places)
        self._standing.turn_to(layer.name)
        inside = Layer(layer.name, cast(Weighted, self._network.get_submodule(layer.name)))

        def factors(rank: int) -> Factors:
            form, its = closest(candidate, rank, self._flops)
            return candidate.cuts[form].factors(its)

        def passes(rank: int) -> bool:
            with cut_to(inside, factors(rank)):
                return self._standing.now() >= needed - 1e-9

        most = candidate.saving("channel")
        rank = smallest(passes, 0, most + 1)
        return factors(rank) if rank <= most else None
