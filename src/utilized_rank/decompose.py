"""From measured ranks to smaller networks: projected, then factorized where that saves weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from . import config, cost
from .compensation import Compensation
from .config import Policy
from .data import Batches, Dataset
from .evaluation import features, is_correct, outputs
from .intervals import paired_change
from .layers import Layer, countable
from .lowrank import (
    FORMS,
    METHODS,
    Factors,
    Fit,
    Target,
    factorized,
    form_of,
    optimal,
    restructure,
    right_singular,
    substitute,
)
from .moments import Moments
from .policies import (
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
from .projection import bases, projected, replaced
from .store import read_tensors, write_network
from .subspaces import Subspace, numerical_rank


@dataclass(frozen=True)
class Decomposed:
    """A network with some layers in two, and how to give another network that form."""

    network: nn.Module
    forms: dict[str, list[Any]]
    """Of each layer in two, by name (see lowrank.restructure)."""


def save(decomposed: Decomposed, path: Path) -> None:
    """Write a decomposed network, with its form in the file's header."""
    write_network(path, decomposed.network, {"forms": decomposed.forms})


def load(network: nn.Module, path: Path) -> nn.Module:
    """A copy of ``network`` in the form and with the weights that :func:`save` wrote."""
    tensors, described = read_tensors(path)
    result = copy.deepcopy(network)
    restructure(result, described["forms"])
    result.load_state_dict(tensors)
    return result.eval()


class Decomposition:
    """The low-rank networks of one measured network.

    Args:
        network: never changed.
        ranks: its utilized ranks, as in ``Measurement.layers``.
        moments: of the inputs of its layers.
        dataset: its calibration images and its search split.
        parameters: how it is decomposed.
        memory: MiB that the values that flow into a layer may take.
    """

    def __init__(
        self,
        network: nn.Module,
        ranks: pd.DataFrame,
        moments: dict[str, Moments],
        dataset: Dataset,
        parameters: config.Decompose,
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
        self.bases: dict[str, tuple[Subspace, Subspace]] = {
            name: bases(layer, moments[name], self._dimensions(layer)) for name, layer in self.layers.items()
        }

    def _dimensions(self, layer: Layer) -> int:
        """The largest k_S that was found, other than the whole input."""
        found = self.ranks.k_s[self.ranks.layer == layer.name]
        return int(found[found < layer.m].max()) if (found < layer.m).any() else 1

    def _target(self, layer: Layer, k_s: int, k_t: int) -> Target:
        s, t = self.bases[layer.name]
        if len(s.values[0]) < k_s < layer.m:  # a rank beyond those that were measured
            s = bases(layer, self.moments[layer.name], k_s)[0]
        return Target(layer, self.moments[layer.name], s, t, k_s, k_t)

    def targets(self, epsilon: float) -> dict[str, Target]:
        """Every layer with the utilized ranks at ``epsilon``, in the order of calls."""
        at = self.ranks[self.ranks.epsilon == epsilon].set_index("layer")
        return {n: self._target(layer, int(at.k_s[n]), int(at.k_t[n])) for n, layer in self.layers.items()}

    def projected_weights(self, epsilon: float) -> dict[Layer, Tensor]:
        """W' = P_S W P_T of every layer, (g, m, n)."""
        found = self.targets(epsilon).values()
        return {t.layer: projected(t.layer.weight(), t.s, t.t, t.k_s, t.k_t) for t in found}

    @cached_property
    def _candidates(self) -> list[Candidate]:
        """The layers and how well each form and rank of them keeps its own outputs."""
        fits = [optimal(self._target(layer, layer.m, layer.n)) for layer in self.layers.values()]
        return candidates(fits, list(self.parameters.forms))

    def _costs(self, kind: str) -> Costs:
        if kind not in self._costs_found:
            images = self.images[: self.parameters.latency_images]
            self._costs_found[kind] = COSTS[kind](self.network, self._candidates, images)
        return self._costs_found[kind]

    @cached_property
    def _costs_found(self) -> dict[str, Costs]:
        return {}

    @cached_property
    def _losses(self) -> Losses:
        images = self.images[: self.parameters.loss_images]
        return LOSSES[self.parameters.losses](self.network, self._candidates, images, self.memory)

    def choices(self, policy: Policy) -> Choices:
        """The form and rank of each layer that ``policy`` puts in two.

        Raises:
            StudyError: a budget that not even the smallest network keeps.
        """
        if policy.budget is not None:
            budgets = Budgets(self._candidates, self._costs(policy.kind), self._losses)
            return budgets.within(int(policy.amount * budgets.network))
        if policy.search == "independent":
            ranks = {name: target.rank for name, target in self.targets(policy.amount).items()}
            return independent(ranks, self._candidates, self._costs("flops"))
        if policy.search == "cumulative":
            return self._cumulative(policy.weights, policy.amount)
        return self.joint(policy.weights, policy.amount).choices

    def joint(self, method: str, epsilon: float) -> Joint:
        """The smallest network by ``method`` within ``epsilon`` points on the search split, all layers replaced."""
        inputs, labels = self.dataset.inputs("search"), self.dataset.labels("search")
        spare = epsilon / 100 * len(labels)
        needed = int(is_correct(self.network, inputs, labels).sum()) - spare - 1e-9

        def passes(choices: Choices) -> bool:
            return int(is_correct(self.build(method, choices).network, inputs, labels).sum()) >= needed

        return joint(Budgets(self._candidates, self._costs("params"), self._losses), passes)

    def _cumulative(self, method: str, epsilon: float) -> Choices:
        inputs, labels = self.dataset.inputs("search"), self.dataset.labels("search")
        small = copy.deepcopy(self.network)
        layers, flops = list(self.layers.values()), self._costs("flops")
        search = Cumulative(small, layers, list(self.parameters.forms), flops, inputs, labels, epsilon, self.memory)
        targets = {name: self._target(layer, layer.m, layer.n) for name, layer in self.layers.items()}
        made = self._in_turn(small, method, targets, search.choose)
        return {name: (form, rank) for name, (form, rank, _) in made.forms.items()}

    def build(self, method: str, choices: Choices, epsilon: float | None = None) -> Decomposed:
        """A copy of the network with layers in two, with the weights of ``method``.

        Args:
            method: one of ``lowrank.METHODS``, or ``compensated``.
            choices: the form and rank of each layer that is put in two, where that is also faster if
                ``objective`` asks for it.
            epsilon: the tolerance whose (k_S, k_T) W' is projected on; both are the rank where it is None.
        """
        if epsilon is None:
            chosen = {n: self._target(self.layers[n], *_sides(self.layers[n], r)) for n, (_, r) in choices.items()}
        else:
            chosen = {name: target for name, target in self.targets(epsilon).items() if name in choices}

        def choose(fit: Fit) -> Factors:
            form, rank = choices[fit.layer.name]
            return FORMS[form](fit).factors(rank)

        return self._in_turn(copy.deepcopy(self.network), method, chosen, choose)

    def _in_turn(
        self, small: nn.Module, method: str, targets: dict[str, Target], choose: Callable[[Fit], Factors | None]
    ) -> Decomposed:
        """Replace layers of ``small``, a copy of the network, in the order of calls."""
        compensation = Compensation(self.network, small, self.images, self.memory) if method == "compensated" else None
        forms = {}
        for name, layer in self.layers.items():
            if name not in targets:
                continue
            factors = choose(METHODS[method](targets[name]) if compensation is None else compensation.fit(layer))
            if factors is None:
                continue
            two = factorized(layer, factors).eval()
            if self.parameters.objective == "parameters" or self._is_faster(layer, two):
                substitute(small, {name: two})
                forms[name] = form_of(two, factors)
        return Decomposed(small, forms)

    def _is_faster(self, layer: Layer, two: nn.Module) -> bool:
        inputs = features(self.network, layer.module, self.images[: self.parameters.latency_images])
        dense, decomposed = cost.latencies([layer.module, two], inputs)
        return decomposed < dense

    def weight_ranks(self, epsilon: float) -> pd.DataFrame:
        """Numerical rank of W and of W' layer by layer: layer, width, rank_before, rank_after, r."""
        rows = []
        for target in self.targets(epsilon).values():
            layer = target.layer
            after = projected(layer.weight(), target.s, target.t, target.k_s, target.k_t)
            rows.append(
                {
                    "layer": layer.name,
                    "width": layer.width,
                    "rank_before": max(numerical_rank(w) for w in layer.weight()),
                    "rank_after": max(numerical_rank(w) for w in after),
                    "r": min(target.k_s, target.k_t, layer.width),
                }
            )
        return pd.DataFrame(rows)


def _sides(layer: Layer, rank: int) -> tuple[int, int]:
    """(k_S, k_T) of a rank by itself."""
    return min(rank, layer.m), min(rank, layer.n)


@torch.no_grad()
def in_call_order(network: nn.Module, layers: list[Layer], image: Tensor) -> list[Layer]:
    """The layers in the order of their first calls for ``image`` (1, C, H, W); those never called are left out."""
    calls: list[Layer] = []
    handles = [layer.module.register_forward_hook(lambda *_, layer=layer: calls.append(layer)) for layer in layers]
    try:
        network.eval()(image)
    finally:
        for handle in handles:
            handle.remove()
    return list(dict.fromkeys(calls))


def agreement(network: nn.Module, weights: dict[Layer, Tensor], inputs: Batches) -> float:
    """Relative error of the logits when ``weights`` stand in for the network's own: ||z - z'|| / ||z||."""
    before = outputs(network, inputs)
    with replaced(weights):
        after = outputs(network, inputs)
    return float((before - after).norm() / before.norm())


def assess(network: nn.Module, inputs: Batches, labels: Tensor, reference: np.ndarray, **about: Any) -> dict[str, Any]:
    """One row of a results table: accuracy, its change against ``reference`` and what the network costs.

    Args:
        network: to be looked at.
        inputs: normalised test images, (N, C, H, W).
        labels: int64 (N,).
        reference: bool (N,), the images that the reference network gets right.
        about: further columns.
    """
    right = is_correct(network, inputs, labels)
    change = paired_change(reference, right)
    return {
        **about,
        "accuracy": 100 * float(right.mean()),
        "images": len(right),
        "change": change.points,
        "change_low": change.low,
        "change_high": change.high,
        "parameters": cost.parameters(network),
        "flops": cost.flops(network, inputs[:1]),
    }


def latency(original: nn.Module, decomposed: nn.Module, images: Tensor) -> dict[str, float]:
    """How long both networks take for ``images``, in seconds, and the FLOPs of the second over those of the first."""
    before, after = cost.latencies([original, decomposed.eval()], images)
    kept = cost.flops(decomposed, images[:1]) / cost.flops(original, images[:1])
    return {"images": len(images), "original": before, "decomposed": after, "flops_kept": kept}


def results_table(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """The rows of :func:`assess`; the epsilon of a network that has none is missing."""
    table = pd.DataFrame(rows)
    return table.astype({"epsilon": float})


def sweep(
    layer: Layer, s: Subspace, t: Subspace, points: int, accuracy: Callable[[], float], generator: torch.Generator
) -> pd.DataFrame:
    """Figure 1: accuracy against the dimensions kept in one layer, for five kinds of subspace.

    Args:
        layer: whose weight is replaced, and put back.
        s: principal subspace of its inputs.
        t: principal subspace of its outputs.
        points: how many numbers of dimensions to try, from 1 to min(m, n), evenly on a log scale.
        accuracy: of the network as it stands, in percent.
        generator: of the random subspace.

    Returns one row a subspace and k: subspace, k, accuracy.
    """
    weight, width = layer.weight().double(), layer.width
    shape = (layer.groups, layer.n, layer.n)
    random = torch.linalg.qr(torch.randn(shape, generator=generator, dtype=torch.float64)).Q
    singular = right_singular(weight)

    def onto(basis: Tensor, k: int) -> Tensor:
        return weight @ basis[..., :k] @ basis[..., :k].mT

    kinds: dict[str, Callable[[int], Tensor]] = {
        "inputs only": lambda k: projected(weight, s, t, k, layer.n),
        "outputs only": lambda k: projected(weight, s, t, layer.m, k),
        "both": lambda k: projected(weight, s, t, k, k),
        "SVD of W": lambda k: onto(singular, k),
        "random": lambda k: onto(random, k),
    }
    rows = []
    for k in np.unique(np.geomspace(1, width, points).round().astype(int)).tolist():
        for kind, matrix in kinds.items():
            with replaced({layer: matrix(k)}):
                rows.append({"subspace": kind, "k": k, "accuracy": accuracy()})
    return pd.DataFrame(rows)


def spectra(layer: Layer, target: Target) -> pd.DataFrame:
    """Singular values of W and of W', each over the largest of W: dimension, W, projected."""
    before = torch.linalg.svdvals(layer.weight().double()).amax(0)
    after = torch.linalg.svdvals(projected(layer.weight(), target.s, target.t, target.k_s, target.k_t)).amax(0)
    dimension = np.arange(1, len(before) + 1)
    return pd.DataFrame(
        {"dimension": dimension, "W": (before / before[0]).numpy(), "projected": (after / before[0]).numpy()}
    )
