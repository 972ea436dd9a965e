"""Beyond the paper: one network at every choice of ranks, with every kind of low-rank weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any

import pandas as pd
import torch
from torch import nn

from ..base.sections import StudyError
from ..compression.compensation import Compensation
from ..compression.lowrank import (
    FORMS,
    Factors,
    Fit,
    Target,
    factorized,
    form_of,
    outputs_kept,
    projection,
    restructure,
    substitute,
    weight_kept,
    weights_a_rank,
)
from ..compression.policies import (
    COSTS,
    LOSSES,
    Budgets,
    Candidate,
    Choices,
    Costs,
    Cumulative,
    Joint,
    Losses,
    candidates,
    independent,
    joint,
)
from ..datasets.data import Dataset
from ..networks.attention import explicit
from ..networks.evaluation import is_correct, received
from ..ranks.layers import Layer, countable
from ..ranks.moments import Moments
from ..ranks.projection import bases
from ..study.sections import Frontier, Policy
from ..study.tolerances import check_resolution
from ..training import models
from ..training.sections import Model
from .decompose import Decomposed


class Compression:
    """The low-rank networks of one measured network.

    Args:
        network: never changed.
        ranks: its utilized ranks, as in ``Measurement.layers``.
        moments: of the inputs of its layers.
        dataset: its calibration images and its search split.
        parameters: what is built, and how.
        memory: MiB that the values that flow into a layer may take.
    """

    def __init__(
        self,
        network: nn.Module,
        ranks: pd.DataFrame,
        moments: dict[str, Moments],
        dataset: Dataset,
        parameters: Frontier,
        memory: int = 2048,
    ) -> None:
        self.network = network.eval()
        self.ranks = ranks
        self.moments = moments
        self.dataset = dataset
        self.parameters = parameters
        self.memory = memory
        self.images = dataset.inputs("train", parameters.images)
        found = [layer for layer in countable(network).layers if layer.name in moments]
        self.layers = {layer.name: layer for layer in in_call_order(network, found, self.images[:1])}
        self.boundaries: dict[str, Joint] = {}
        """What joint searches found, by the name of the policy."""
        self._known: dict[str, Costs] = {}
        self._budgets: dict[str, Budgets] = {}
        self._spent: dict[tuple[str, float], Choices] = {}

    def choices(self, policy: Policy) -> Choices:
        """The form and rank of each layer that ``policy`` puts in two.

        Raises:
            StudyError: a budget that not even the smallest network keeps, or a tolerance finer than one image.
        """
        if policy.budget is not None:
            budgets = self.budgets(policy.kind)
            try:
                return budgets.within(int(policy.amount * budgets.network))
            except ValueError as error:
                raise StudyError(str(error)) from None
        if policy.search == "independent":
            found = self._found(policy)
            ranks = {n: max(1, min(int(found.r[n]), layer.width)) for n, layer in self.layers.items()}
            return independent(ranks, self._candidates, self._costs("flops"))
        where = f"the frontier's {policy.name}"
        check_resolution(len(self.dataset.labels("search")), [policy.amount], where)
        if policy.search == "cumulative":
            return self.cumulative(policy.weights, policy.amount)
        self.boundaries[policy.name] = self.joint(policy.weights, policy.amount)
        return self.boundaries[policy.name].choices

    def dimensions(self, policy: Policy) -> dict[str, tuple[int, int]]:
        """k_S and k_T of P_S W P_T, where ``policy`` says more of them than the rank."""
        if policy.search != "independent":
            return {}
        found = self._found(policy)
        return {name: (int(found.k_s[name]), int(found.k_t[name])) for name in self.layers}

    def _found(self, policy: Policy) -> pd.DataFrame:
        return self.ranks[self.ranks.epsilon == policy.amount].set_index("layer")

    def budgets(self, kind: str) -> Budgets:
        """The best choices for every budget of one kind (see ``policies.COSTS``)."""
        if kind not in self._budgets:
            self._budgets[kind] = Budgets(self._candidates, self._costs(kind), self._losses)
        return self._budgets[kind]

    def joint(self, method: str, epsilon: float) -> Joint:
        """The smallest network by ``method`` within ``epsilon`` points on the search split, all layers replaced.

        Of those on the path of all budgets of parameters, and of the one that a cumulative search finds.
        """
        inputs, labels = self.dataset.inputs("search"), self.dataset.labels("search")
        needed = int(is_correct(self.network, inputs, labels).sum()) - epsilon / 100 * len(labels) - 1e-9

        def passes(choices: Choices) -> bool:
            return int(is_correct(self.build(method, choices).network, inputs, labels).sum()) >= needed

        budgets = self.budgets("params")
        found = joint(budgets, passes)
        if method == "projection":  # which a cumulative search cannot cut
            return found
        other = self.cumulative(method, epsilon)
        if budgets.cost(other) < budgets.cost(found.choices) and passes(other):
            return replace(found, choices=other, cumulative=budgets.cost(other))
        return found

    def build(self, method: str, choices: Choices, dimensions: dict[str, tuple[int, int]] | None = None) -> Decomposed:
        """A copy of the network with layers in two, with the weights of ``method``.

        Args:
            method: one of ``Method``.
            choices: the form and rank of each layer that is put in two.
            dimensions: k_S and k_T of P_S W P_T; of a layer that is not in it both are its rank.
        """

        def cut(fit: Fit) -> Factors:
            form, rank = choices[fit.layer.name]
            return FORMS[form](fit).factors(rank)

        held = {name: (rank, rank) for name, (_, rank) in choices.items()} | (dimensions or {})
        return self._in_turn(copy.deepcopy(self.network), method, {name: held[name] for name in choices}, cut)

    def cumulative(self, method: str, epsilon: float) -> Choices:
        """Ranks that spend ``epsilon`` points on the search split front to back, with the weights of ``method``."""
        if (method, epsilon) not in self._spent:
            self._spent[method, epsilon] = self._spend(method, epsilon)
        return self._spent[method, epsilon]

    def _spend(self, method: str, epsilon: float) -> Choices:
        inputs, labels = self.dataset.inputs("search"), self.dataset.labels("search")
        small = copy.deepcopy(self.network)
        layers, flops = list(self.layers.values()), self._costs("flops")
        search = Cumulative(small, layers, list(self.parameters.forms), flops, inputs, labels, epsilon, self.memory)
        whole = {layer.name: (layer.m, layer.n) for layer in layers}
        made = self._in_turn(small, method, whole, search.choose)
        return {name: (form, rank) for name, (form, rank, _) in made.forms.items()}

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
        for name, layer in self.layers.items():
            factors = choose(fit(layer)) if name in dimensions else None
            if factors is not None:
                two = factorized(layer, factors).eval()
                substitute(small, {name: two})
                forms[name] = form_of(two, factors)
        return Decomposed(small, forms)

    def _fits(self, method: str, small: nn.Module, dimensions: dict[str, tuple[int, int]]) -> Callable[[Layer], Fit]:
        """How ``method`` fits a layer; arguments as in :meth:`_in_turn`."""
        if method == "compensated":
            return Compensation(self.network, small, self.images, self.memory).fit
        if method == "projection":
            return lambda layer: projection(self._target(layer, *dimensions[layer.name]))
        return {"optimal": self._outputs_kept, "svd": weight_kept}[method]

    def _target(self, layer: Layer, k_s: int, k_t: int) -> Target:
        its = self.moments[layer.name]
        k_s, k_t = min(k_s, layer.m), min(k_t, layer.n)
        return Target(layer, its, *bases(layer, its, k_s if k_s < layer.m else 1), k_s, k_t)

    @cached_property
    def _candidates(self) -> list[Candidate]:
        """The layers, and how well each form and rank of them keeps its own outputs."""
        return candidates(map(self._outputs_kept, self.layers.values()), list(self.parameters.forms))

    def _outputs_kept(self, layer: Layer) -> Fit:
        return outputs_kept(layer, self.moments[layer.name])

    @cached_property
    def _losses(self) -> Losses:
        images = self.dataset.inputs("train", self.parameters.loss_images)
        return LOSSES[self.parameters.losses](self.network, self._candidates, images, self.memory)

    def _costs(self, kind: str) -> Costs:
        if kind not in self._known:
            images = self.images[: self.parameters.latency_images]
            self._known[kind] = COSTS[kind](self.network, self._candidates, images)
        return self._known[kind]


def untrained(
    model: Model, shape: tuple[int, int, int], classes: int, split: bool, forms: dict[str, list[Any]]
) -> nn.Module:
    """A network in the forms of a decomposed one, with random weights.

    Args:
        model: of the original.
        shape: channels, height and width of an image.
        classes: how many.
        split: whether fused projections of queries, keys and values are three layers.
        forms: as in ``Decomposed.forms``.
    """
    network = explicit(models.build(model, shape, classes), split)
    restructure(network, forms)
    return network


def in_call_order(network: nn.Module, layers: list[Layer], image: torch.Tensor) -> list[Layer]:
    """The layers in the order of their first calls for ``image`` (1, C, H, W); those never called are left out."""
    of: dict[nn.Module, Layer] = {layer.module: layer for layer in layers}
    return [of[module] for module in dict.fromkeys(module for module, _ in received(network, of, image))]


def boundaries_table(boundaries: dict[str, Joint], parameters: int) -> pd.DataFrame:
    """Every network that a joint search tried: ranks, path, budget (parameters), kept (a part of all), passes."""
    rows = [
        {"ranks": name, "path": path, "budget": budget, "kept": budget / parameters, "passes": passes}
        for name, found in boundaries.items()
        for path, tried in (("budgets", found.tried), ("cumulative", {found.cumulative: True}))
        for budget, passes in sorted((b, p) for b, p in tried.items() if b is not None)
    ]
    return pd.DataFrame(rows, columns=["ranks", "path", "budget", "kept", "passes"])


def choices_table(choices: dict[str, Choices], layers: dict[str, Layer]) -> pd.DataFrame:
    """Every layer at every way of choosing ranks: ranks, layer, m, n, groups, form, rank, weights.

    A whole layer has rank 0 and all of its weights.

    Args:
        choices: by the name of the policy.
        layers: all that might be put in two, by name.
    """
    rows = []
    for name, chosen in choices.items():
        for layer in layers.values():
            form, rank = chosen.get(layer.name, ("whole", 0))
            weights = rank * weights_a_rank(layer, form) if rank else layer.groups * layer.m * layer.n
            size = {"m": layer.m, "n": layer.n, "groups": layer.groups}
            rows.append({"ranks": name, "layer": layer.name, **size, "form": form, "rank": rank, "weights": weights})
    return pd.DataFrame(rows)
