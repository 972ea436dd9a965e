"""Which form and rank each layer gets: from tolerances that were searched, or from a budget for all of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import cast

import numpy as np
from torch import nn

from ..networks.evaluation import Score
from ..networks.standing import Standing
from ..ranks.layers import Layer, Weighted
from ..ranks.rank_search import smallest
from ..ranks.trials import Recall, worked_out
from .allocation import Allocation, Options
from .costs import Candidate, Choices, Costs, Way, candidates
from .losses import Losses, Points, Table, cut_to
from .lowrank import Factors, Fit, saves

STEPS = 200
"""Budgets that a joint search tells apart, from the smallest network to the whole one."""
ROUNDS = 3
"""How often predicted losses are measured at what a budget chose."""
WORTH = 0.05
"""Part of the loss by which a new choice must be thought better for another round."""


class Budgets:
    """The best choices for every budget, for one kind of cost and one of loss."""

    def __init__(self, layers: list[Candidate], costs: Costs, losses: Losses) -> None:
        # Where they are measured, layers by themselves may take more time than the network.
        self.network = max(costs.network, sum(costs.layers.values()))
        """What the whole network costs."""
        self._fixed = self.network - sum(costs.layers.values())
        self._costs = costs
        self._layers = layers
        self._losses = losses
        self._ways = [_ways(candidate) for candidate in layers]
        self._unmeasured = losses.table({})
        self._allocation = self._allocated(self._unmeasured, self.network)
        self.least = self._fixed + self._allocation.least
        """What the smallest network costs."""

    def _allocated(self, losses: Table, most: int) -> Allocation:
        """For budgets up to ``most``."""
        pairs = zip(self._layers, self._ways, strict=True)
        return Allocation([_options(c, ways, self._costs, losses) for c, ways in pairs], most - self._fixed)

    def within(self, amount: int) -> Choices:
        """What loses least and costs ``amount`` at most, everything that is not a choice counted in.

        Where losses are predicted they are measured at what was chosen, and chosen anew, a few times: what was measured
        to lose least is given back.

        Raises:
            ValueError: the smallest network costs more.
        """
        amount = min(amount, self.network)
        if amount < self.least:
            kept, asked = self.least / self.network, amount / self.network
            raise ValueError(f"a budget of {asked:.1%} cannot be kept: the smallest network costs {kept:.1%}")
        choices, _ = self._chosen(self._allocation, amount)
        best, least, known = choices, math.inf, cast(Points, {})
        for _ in range(ROUNDS):
            found = self._losses.measured(choices)
            if not found:
                break
            loss = sum(its for ways in found.values() for its in ways.values())
            if loss < least:
                best, least = choices, loss
            known = {name: known.get(name, {}) | found.get(name, {}) for name in known | found}
            choices, expected = self._chosen(self._allocated(self._losses.table(known), amount), amount)
            if expected > (1 - WORTH) * least:
                break
        return best

    def _chosen(self, allocation: Allocation, amount: int) -> tuple[Choices, float]:
        """What is best within a budget, and what it is thought to lose."""
        chosen = allocation.within(amount - self._fixed)
        named = zip(self._layers, self._ways, chosen, strict=True)
        return {c.layer.name: ways[k - 1] for c, ways, k in named if k}, allocation.loss(chosen)

    def cost(self, choices: Choices) -> int:
        """What the whole network costs with these choices."""
        return self.network - sum(self._spent(name, None) - self._spent(name, way) for name, way in choices.items())

    def _spent(self, name: str, way: Way | None) -> int:
        """On one layer; None: whole."""
        return self._costs.layers[name] if way is None else int(self._costs.ways[name][way[0]][way[1] - 1])

    def cheaper(self, choices: Choices, name: str) -> list[Way]:
        """What costs less than a layer's choice, dearest first, and is beaten by no other in both cost and loss."""
        own = self._spent(name, choices.get(name))
        return [way for cost, way in self._fronts[name] if cost < own]

    @cached_property
    def _fronts(self) -> dict[str, list[tuple[int, Way]]]:
        """Of each layer its ways that no other one beats in both cost and loss, dearest first."""
        return {c.layer.name: self._front(c.layer.name, ways) for c, ways in zip(self._layers, self._ways, strict=True)}

    def _front(self, name: str, ways: list[Way]) -> list[tuple[int, Way]]:
        by_cost = sorted((self._spent(name, way), self.loss(name, way), way) for way in ways)
        front, least = [], math.inf
        for cost, loss, way in by_cost:
            if loss < least:
                front.append((cost, way))
                least = loss
        return front[::-1]

    @property
    def names(self) -> list[str]:
        """Of the layers."""
        return [candidate.layer.name for candidate in self._layers]

    def gain(self, choices: Choices, name: str, way: Way) -> float:
        """What is saved by giving a layer a cheaper way, over what is thought to be lost by it."""
        own = choices.get(name)
        saved = self._spent(name, own) - self._spent(name, way)
        return saved / max(self.loss(name, way) - self.loss(name, own), 1e-300)

    def loss(self, name: str, way: Way | None) -> float:
        """What the network is thought to lose with one layer in two (None: whole), before anything is measured."""
        return 0.0 if way is None else float(self._unmeasured[name][way[0]][way[1] - 1])

    def steps(self) -> list[int]:
        """Budgets from the smallest network to the whole one, :data:`STEPS` of them and one."""
        return np.linspace(self.least, self.network, STEPS + 1).astype(np.int64).tolist()


def _ways(candidate: Candidate) -> list[Way]:
    return [(form, rank) for form in candidate.cuts for rank in range(1, candidate.saving(form) + 1)]


def _options(candidate: Candidate, ways: list[Way], costs: Costs, losses: Table) -> Options:
    """The layer as it is, and then each of the ways."""
    name = candidate.layer.name
    spent = [costs.layers[name], *(costs.ways[name][form][rank - 1] for form, rank in ways)]
    lost = [0.0, *(losses[name][form][rank - 1] for form, rank in ways)]
    return Options(np.array(spent, dtype=np.int64), np.array(lost, dtype=float))


@dataclass(frozen=True)
class Step:
    """One network that was tried with some layers smaller than in the smallest that had passed."""

    cuts: Choices
    """The forms and ranks of those layers."""
    cost: int
    """What the network costs."""
    passes: bool


@dataclass(frozen=True)
class Joint:
    """The boundary that a joint search found."""

    choices: Choices
    budget: int
    """The smallest of :meth:`Budgets.steps` that passed."""
    tried: dict[int, bool]
    """Budgets and their verdicts: the step below :attr:`budget` failed, unless there is none."""
    cumulative: int | None = None
    """What a cumulative search's choices cost where they passed and cost less."""
    descent: list[Step] = field(default_factory=list)
    """Layers made smaller from there on: in the end no layer's next cheaper choice passes."""


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


def descend(budgets: Budgets, start: Choices, passes: Callable[[Choices], bool]) -> tuple[Choices, list[Step]]:
    """Make layers smaller, as long as the whole network passes.

    Those that save most for the least that is thought to be lost come first, half of all at once, half of that where it
    fails, and twice as many where it passes; each in steps that double while they pass. In the end the next cheaper
    choice of every layer has failed by itself beside the others as they then are; choices that another one beats in
    both cost and loss are left out.

    Args:
        budgets: of the layers.
        start: choices that pass.
        passes: the verdict on the network with these choices.
    """
    choices, tried, passed = dict(start), cast(list[Step], []), 0
    stride = dict.fromkeys(budgets.names, 1)
    failed: dict[str, int] = {}  # by layer, how many had passed when its next cheaper choice last failed
    together = max(1, len(stride) // 2)
    while cheaper := {
        name: its for name in budgets.names if failed.get(name) != passed and (its := budgets.cheaper(choices, name))
    }:
        # Those that failed beside larger ones are asked again when all others are done.
        offers = {n: its[min(stride[n], len(its)) - 1] for n, its in cheaper.items() if n not in failed} or {
            n: its[0] for n, its in cheaper.items()
        }
        best = sorted(offers, key=lambda n: budgets.gain(choices, n, offers[n]), reverse=True)[:together]
        cuts = {name: offers[name] for name in best}
        smaller = choices | cuts
        tried.append(Step(cuts, budgets.cost(smaller), passes(smaller)))
        if tried[-1].passes:
            choices, passed, together = smaller, passed + 1, 2 * len(cuts)
            stride |= {name: 2 * stride[name] for name in cuts}
            failed = {name: its for name, its in failed.items() if name not in cuts}
            continue
        together = max(1, len(cuts) // 2)
        stride |= dict.fromkeys(cuts, 1)
        if len(cuts) == 1 and offers[best[0]] == cheaper[best[0]][0]:
            failed[best[0]] = passed
    return choices, tried


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
        recall: verdicts from before an interruption.
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
        recall: Recall = worked_out,
    ) -> None:
        self._recall = recall
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

        def tried(rank: int) -> bool:
            with cut_to(inside, factors(rank)):
                return self._standing.now() >= needed - 1e-9

        def passes(rank: int) -> bool:
            question = ["cumulative", layer.name, rank, needed]
            return bool(self._recall(question, lambda: tried(rank)))

        most = candidate.saving("channel")
        rank = smallest(passes, 0, most + 1)
        return factors(rank) if rank <= most else None
