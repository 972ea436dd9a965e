"""One network made smaller at every choice of ranks, with every kind of low-rank weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, cast

from torch import nn
from tqdm import tqdm

from ..networks.batches import Batches
from ..networks.evaluation import Score, received
from ..ranks.layers import Layer, countable
from ..ranks.moments import Moments
from ..ranks.projection import bases
from ..ranks.trials import Recall, worked_out
from .compensation import Compensation
from .costs import COSTS, Candidate, Choices, Costs, candidates
from .decomposition import Decomposed
from .losses import LOSSES, Losses
from .lowrank import FORMS, METHODS, Factors, Fit, Target, outputs_kept, weight_kept
from .pairs import factorized, form_of, indivisible, substitute
from .policies import Budgets, Cumulative, Joint, descend, independent, joint


class Compression:
    """The low-rank networks of one measured network.

    Args:
        network: never changed.
        moments: of the inputs of its layers.
        inputs: calibration inputs, that weights are compensated on; no labels are used.
        score: of the search split, the higher the better; budgets need none.
        forms: that a layer may take, of ``lowrank.FORMS``.
        losses: what a budget adds up over the layers, of ``losses.LOSSES``.
        loss_inputs: how many of ``inputs`` divergences are taken on, most of them such as the network is unsure of.
        together: inputs at a time, where latency is measured.
        memory: MiB that the values that flow into a layer may take.
        progress: show how far losses and weights are.
        recall: verdicts of searches from before an interruption.
    """

    def __init__(
        self,
        network: nn.Module,
        moments: dict[str, Moments],
        inputs: Batches,
        score: Score | None = None,
        forms: Sequence[str] = ("channel", "spatial"),
        losses: str = "curvature",
        loss_inputs: int = 128,
        together: int = 64,
        memory: int = 2048,
        progress: bool = False,
        recall: Recall = worked_out,
    ) -> None:
        self.network = network.eval()
        self.moments = moments
        self.inputs = inputs
        self.score = score
        self.forms = list(forms)
        self.losses = losses
        self.loss_inputs = loss_inputs
        self.together = together
        self.memory = memory
        self.progress = progress
        self.recall = recall
        found = [layer for layer in countable(network).layers if layer.name in moments]
        self.left_whole = indivisible(network, found, inputs[:1])
        """Layers that cannot be put in two, and why."""
        free = [layer for layer in found if layer.name not in self.left_whole]
        self.layers = {layer.name: layer for layer in in_call_order(network, free, inputs[:1])}
        """The others, in the order of calls."""
        self._known: dict[str, Costs] = {}
        self._budgets: dict[str, Budgets] = {}
        self._spent: dict[tuple[str, float], Choices] = {}
        self._joints: dict[tuple[str, float], Joint] = {}

    def independent(self, ranks: dict[str, int]) -> Choices:
        """Each layer at its utilized rank, by name, where that saves weights."""
        held = {name: max(1, min(ranks[name], layer.width)) for name, layer in self.layers.items()}
        return independent(held, self._candidates, self._costs("flops"))

    def within(self, kind: str, part: float) -> Choices:
        """What loses least and keeps no more than ``part`` of the network's cost of a kind (of ``costs.COSTS``).

        Raises:
            ValueError: the smallest network costs more.
        """
        budgets = self.budgets(kind)
        return budgets.within(int(part * budgets.network))

    def budgets(self, kind: str) -> Budgets:
        """The best choices for every budget of one kind (see ``costs.COSTS``)."""
        if kind not in self._budgets:
            self._budgets[kind] = Budgets(self._candidates, self._costs(kind), self._losses)
        return self._budgets[kind]

    def joint(self, method: str, epsilon: float) -> Joint:
        """The smallest network by ``method`` within ``epsilon`` of the score, all layers replaced.

        From the smallest on the path of all budgets of parameters, or the one that a cumulative search finds, layers
        are made smaller one by one until none can be (see :func:`policies.descend`).
        """
        if (method, epsilon) not in self._joints:
            self._joints[method, epsilon] = self._joint(method, epsilon)
        return self._joints[method, epsilon]

    def _joint(self, method: str, epsilon: float) -> Joint:
        score = self._asked()
        needed = score(self.network) - epsilon - 1e-9
        smallest, its = Decomposed(self.network, {}), cast(Choices, {})  # that passes

        def tried(choices: Choices) -> bool:
            nonlocal smallest
            if smallest.choices() != its:  # its verdict is remembered
                smallest = self.build(method, its)
            made = self._from(smallest, method, choices, {})
            passes = score(made.network) >= needed
            smallest = made if passes else smallest
            return passes

        def passes(choices: Choices) -> bool:
            nonlocal its
            question = ["joint", method, epsilon, [[name, *way] for name, way in choices.items()]]
            verdict = bool(self.recall(question, lambda: tried(choices)))
            its = choices if verdict else its
            return verdict

        budgets = self.budgets("params")
        found = joint(budgets, passes)
        if method != "projection":  # which a cumulative search cannot cut
            other = self.cumulative(method, epsilon)
            if budgets.cost(other) < budgets.cost(found.choices) and passes(other):
                found = replace(found, choices=other, cumulative=budgets.cost(other))
        choices, descent = descend(budgets, found.choices, passes)
        return replace(found, choices=choices, descent=descent)

    def build(self, method: str, choices: Choices, dimensions: dict[str, tuple[int, int]] | None = None) -> Decomposed:
        """A copy of the network with layers in two, with the weights of ``method``.

        Args:
            method: a key of ``lowrank.METHODS``, or ``compensated``.
            choices: the form and rank of each layer that is put in two.
            dimensions: k_S and k_T of P_S W P_T; of a layer that is not in it both are its rank.
        """
        return self._from(Decomposed(self.network, {}), method, choices, dimensions or {})

    def _from(
        self, known: Decomposed, method: str, choices: Choices, dimensions: dict[str, tuple[int, int]]
    ) -> Decomposed:
        """The same from a network of the same method, of which what comes before the first change stays."""
        before, names = known.choices(), list(self.layers)
        first = next((i for i, name in enumerate(names) if before.get(name) != choices.get(name)), len(names))
        kept, anew = names[:first], names[first:]
        small = copy.deepcopy(known.network)
        whole: dict[str, nn.Module] = {n: copy.deepcopy(self.layers[n].module) for n in anew if n in before}
        substitute(small, whole)

        def cut(fit: Fit) -> Factors:
            form, rank = choices[fit.layer.name]
            return FORMS[form](fit, rank).factors(rank)

        held = {name: (rank, rank) for name, (_, rank) in choices.items()} | dimensions
        made = self._in_turn(small, method, {name: held[name] for name in anew if name in choices}, cut)
        return Decomposed(small, {name: known.forms[name] for name in kept if name in before} | made.forms)

    def cumulative(self, method: str, epsilon: float) -> Choices:
        """Ranks that spend ``epsilon`` of the score front to back, with the weights of ``method``."""
        if (method, epsilon) not in self._spent:
            self._spent[method, epsilon] = self._spend(method, epsilon)
        return self._spent[method, epsilon]

    def _spend(self, method: str, epsilon: float) -> Choices:
        def recall(question: list[Any], work_out: Callable[[], bool]) -> Any:
            return self.recall([*question, method], work_out)

        small = copy.deepcopy(self.network)
        layers, flops = list(self.layers.values()), self._costs("flops")
        search = Cumulative(small, layers, self.forms, flops, self._asked(), epsilon, self.memory, recall)
        whole = {layer.name: (layer.m, layer.n) for layer in layers}
        return self._in_turn(small, method, whole, search.choose).choices()

    def _in_turn(
        self,
        small: nn.Module,
        method: str,
        dimensions: dict[str, tuple[int, int]],
        choose: Callable[[Fit], Factors | None],
    ) -> Decomposed:
        """Replace layers of ``small``, a copy of the network, in the order of calls.

        Args:
            small: changed in place.
            method: of the fits.
            dimensions: k_S and k_T, of the layers that may be replaced.
            choose: what replaces a layer; None where it stays whole.
        """
        fit = self._fits(method, small, dimensions)
        forms = {}
        for name, layer in tqdm(self.layers.items(), "weights", leave=False, unit="layer", disable=not self.progress):
            factors = choose(fit(layer)) if name in dimensions else None
            if factors is not None:
                two = factorized(layer, factors).eval()
                substitute(small, {name: two})
                forms[name] = form_of(two, factors)
        return Decomposed(small, forms)

    def _fits(self, method: str, small: nn.Module, dimensions: dict[str, tuple[int, int]]) -> Callable[[Layer], Fit]:
        """How ``method`` fits a layer; arguments as in :meth:`_in_turn`."""
        if method == "compensated":
            return Compensation(self.network, small, self.inputs, self.memory).fit
        quick: dict[str, Callable[[Layer], Fit]] = {"optimal": self._outputs_kept, "svd": weight_kept}  # no bases
        return quick.get(method) or (lambda layer: METHODS[method](self._target(layer, *dimensions[layer.name])))

    def _target(self, layer: Layer, k_s: int, k_t: int) -> Target:
        its = self.moments[layer.name]
        k_s, k_t = min(k_s, layer.m), min(k_t, layer.n)
        return Target(layer, its, *bases(layer, its, k_s if k_s < layer.m else 1), k_s, k_t)

    @cached_property
    def _candidates(self) -> list[Candidate]:
        """The layers, and how well each form and rank of them keeps its own outputs."""
        return candidates(map(self._outputs_kept, self.layers.values()), self.forms)

    def _outputs_kept(self, layer: Layer) -> Fit:
        return outputs_kept(layer, self.moments[layer.name])

    @cached_property
    def _losses(self) -> Losses:
        layers = tqdm(self._candidates, "losses", leave=False, unit="layer", disable=not self.progress)
        return LOSSES[self.losses](self.network, layers, self.inputs, self.loss_inputs, self.memory)

    def _asked(self) -> Score:
        if self.score is None:
            raise ValueError("a search needs a score")
        return self.score

    def _costs(self, kind: str) -> Costs:
        if kind not in self._known:
            self._known[kind] = COSTS[kind](self.network, self._candidates, self.inputs[: self.together])
        return self._known[kind]


def in_call_order(network: nn.Module, layers: list[Layer], inputs: Any) -> list[Layer]:
    """The layers in the order of their first calls for some ``inputs``; those never called are left out."""
    of: dict[nn.Module, Layer] = {layer.module: layer for layer in layers}
    return [of[module] for module in dict.fromkeys(module for module, _ in received(network, of, inputs))]
