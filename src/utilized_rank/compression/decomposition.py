"""From measured ranks to smaller networks: projected, then factorized where that saves weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from ..networks import cost
from ..networks.batches import Batches
from ..networks.evaluation import features, outputs
from ..ranks.layers import Layer, countable
from ..ranks.moments import Moments
from ..ranks.projection import bases, projected, replaced
from ..ranks.subspaces import Subspace, numerical_rank
from .lowrank import METHODS, Channel, Target, right_singular, saves
from .pairs import factorized, form_of, indivisible, substitute


@dataclass(frozen=True)
class Decomposed:
    """A network with some layers in two, and how to give another network that form."""

    network: nn.Module
    forms: dict[str, list[Any]]
    """Of each layer in two, by name (see pairs.restructure)."""

    def choices(self) -> dict[str, tuple[str, int]]:
        """The form and rank of each layer in two, by name."""
        return {name: (form, rank) for name, (form, rank, _) in self.forms.items()}


class Decomposition:
    """The low-rank networks of one measured network.

    Args:
        network: never changed.
        layers: its utilized ranks, as in ``Measurement.layers``.
        moments: of the inputs of its layers.
        images: an example of what it is called with, (N, C, H, W).
        faster: put a layer in two only where that is faster on the images.
    """

    def __init__(
        self,
        network: nn.Module,
        layers: pd.DataFrame,
        moments: dict[str, Moments],
        images: Tensor,
        faster: bool = False,
    ) -> None:
        self.network = network
        self.images = images
        self.faster = faster
        self.layers = {layer.name: layer for layer in countable(network).layers if layer.name in moments}
        self.ranks = layers
        self.moments = moments
        self.bases: dict[str, tuple[Subspace, Subspace]] = {
            name: bases(layer, moments[name], self._dimensions(layer)) for name, layer in self.layers.items()
        }

    def _dimensions(self, layer: Layer) -> int:
        """The largest k_S that was found, other than the whole input."""
        found = self.ranks.k_s[self.ranks.layer == layer.name]
        return int(found[found < layer.m].max()) if (found < layer.m).any() else 1

    def targets(self, epsilon: float) -> list[Target]:
        """Every layer with the ranks found at ``epsilon``."""
        rows = self.ranks[self.ranks.epsilon == epsilon]
        return [
            Target(self.layers[row.layer], self.moments[row.layer], *self.bases[row.layer], row.k_s, row.k_t)
            for row in rows.itertuples()
        ]

    def projected_weights(self, epsilon: float) -> dict[Layer, Tensor]:
        """W' = P_S W P_T of every layer, (g, m, n)."""
        return {t.layer: projected(t.layer.weight(), t.s, t.t, t.k_s, t.k_t) for t in self.targets(epsilon)}

    def build(self, method: str, epsilon: float) -> Decomposed:
        """A copy of the network with every layer in two where that saves weights (and time), by ``method``."""
        can_save = [t for t in self.targets(epsilon) if saves(t.layer, "channel", t.rank)]
        chosen = [t for t in can_save if t.layer.name not in self._indivisible]
        factors = {t.layer.name: Channel(METHODS[method](t)).factors(t.rank) for t in chosen}
        network = copy.deepcopy(self.network)
        pairs = {name: factorized(self.layers[name], factor) for name, factor in factors.items()}
        if self.faster:
            pairs = {name: two for name, two in pairs.items() if self._is_faster(self.layers[name], two)}
        substitute(network, dict(pairs))
        return Decomposed(network, {name: form_of(two, factors[name]) for name, two in pairs.items()})

    @cached_property
    def _indivisible(self) -> dict[str, str]:
        return indivisible(self.network, list(self.layers.values()), self.images[:1])

    def _is_faster(self, layer: Layer, two: nn.Module) -> bool:
        inputs = features(self.network, layer.module, self.images)
        dense, decomposed = cost.latencies([layer.module, two.eval()], inputs)
        return decomposed < dense

    def weight_ranks(self, epsilon: float) -> pd.DataFrame:
        """Numerical rank of W and of W' layer by layer: layer, width, rank_before, rank_after, r."""
        rows = []
        for target in self.targets(epsilon):
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


def agreement(network: nn.Module, weights: dict[Layer, Tensor], inputs: Batches) -> float:
    """Relative error of the logits when ``weights`` stand in for the network's own: ||z - z'|| / ||z||."""
    before = outputs(network, inputs)
    with replaced(weights):
        after = outputs(network, inputs)
    return float((before - after).norm() / before.norm())


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
