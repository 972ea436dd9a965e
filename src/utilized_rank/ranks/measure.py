"""Utilization: the moments of every layer, its principal subspaces, and its utilized rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd
import torch
from torch import nn
from tqdm import tqdm

from ..networks.batches import gathered
from ..networks.evaluation import Labelled, Score
from ..networks.precision import Precision
from .layers import Layer, countable
from .moments import Budget, Moments, input_moments
from .projection import bases
from .rank_search import Ranks, search, search_energy, search_utilized
from .subspaces import Subspace
from .trials import Scored, Trials, evaluations_table, trials

Criterion = Literal["rank", "utilized", "energy"]
"""Search k_S and k_T each on its own; only the smaller of them; or one energy threshold for both."""
UNCALLED = "its module is never called: the network reads its weight, or does not use it"


@dataclass(frozen=True)
class Measurement:
    """What :func:`measure` found."""

    layers: pd.DataFrame
    """One row a layer and epsilon: layer, m, n, groups, epsilon, k_s, k_t, k_s_alone, k_t_alone, r, utilization."""
    left_out: dict[str, str]
    """Layers that do not count, and why."""
    evaluations: pd.DataFrame
    """Every evaluation of the rank search, columns as in ``trials.Evaluation``."""
    precision: str
    """Of the network's arithmetic in the rank search."""
    moments: dict[str, Moments]
    score: float
    """Of the unaltered network on the search split: its accuracy in percent, or what the score gave."""
    search_images: int | None
    """None where the score is not of labels."""

    def mean_layer_utilization(self) -> dict[float, float]:
        """MLU at each epsilon: the mean of r / min(m, n) over the layers that count."""
        return {float(e): float(rows.utilization.mean()) for e, rows in self.layers.groupby("epsilon")}


def measure(
    network: nn.Module,
    score: Score,
    calibration: Any,
    epsilons: Sequence[float],
    *,
    criterion: Criterion = "rank",
    precision: Precision = "auto",
    rows: int | None = 4,
    memory: int = 2048,
    batch_size: int = 128,
) -> Measurement:
    """Measure the utilized rank of every countable layer of ``network``, layer by layer, others intact.

    Args:
        network: in evaluation mode from now on.
        score: inputs of the search split and their labels; or any function of a network, the higher the better.
        calibration: the inputs that second moments are taken over, as :func:`networks.batches.gathered` takes them.
        epsilons: tolerated losses of accuracy on the search split, in percentage points; or of the score, in its unit.
        criterion: which ranks are searched.
        precision: of the network's arithmetic in the search, the unaltered one's too.
        rows: that a layer's moment is taken over, as a multiple of its input width m; all where it is None.
        memory: MiB that the search may use to keep what flows into a layer.
        batch_size: images a batch in the moment pass.

    Raises:
        FloatingPointError: a layer receives NaN or Inf.
    """
    selection, calibration = countable(network), gathered(calibration)
    budget = None if rows is None else Budget(rows, len(calibration))
    moments = input_moments(network, selection.layers, calibration.split(batch_size), budget)
    uncalled = {layer.name: UNCALLED for layer in selection.layers if not moments[layer.name].count}
    layers = [layer for layer in selection.layers if layer.name not in uncalled]
    moments = {layer.name: moments[layer.name] for layer in layers}
    verdicts = trials(network, score, memory, precision)
    found = []
    for layer in tqdm(layers, desc="rank search", unit="layer"):
        # No rank beyond min(m, n) is tried, but an energy threshold is a part of all eigenvalues.
        s, t = bases(layer, moments[layer.name], None if criterion == "energy" else layer.width)
        for epsilon in epsilons:
            found.append(_row(layer, epsilon, layer_ranks(layer, s, t, verdicts, epsilon, criterion)))
    return Measurement(
        # A side that was not asked for has no rank: a whole number all the same.
        pd.DataFrame(found).astype({"k_s_alone": "Int64", "k_t_alone": "Int64"}),
        selection.left_out | uncalled,
        evaluations_table(verdicts.evaluations),
        verdicts.precision,
        moments,
        verdicts.score,
        len(score) if isinstance(score, Labelled) else None,
    )


def layer_ranks(
    layer: Layer, s: Subspace, t: Subspace, verdicts: Trials | Scored, epsilon: float, criterion: Criterion
) -> Ranks:
    """The ranks of one layer at one tolerance; all 0 for a dead one (no input, or no output, ever)."""
    if float(t.values.sum()) == 0:
        return Ranks(0, 0, 0, 0, 0)

    def passes(k_s: int, k_t: int) -> bool:
        return verdicts.passes(layer, s, t, k_s, k_t, epsilon)

    guess = verdicts.likely
    likely = None if guess is None else lambda k_s, k_t: guess(layer, s, t, k_s, k_t, epsilon)
    if criterion == "energy":
        return search_energy(passes, layer.m, layer.n, _over_groups(s), _over_groups(t), likely)
    if criterion == "utilized":
        return search_utilized(passes, layer.m, layer.n, likely)
    return search(passes, layer.m, layer.n, likely)


def _over_groups(subspace: Subspace) -> torch.Tensor:
    return subspace.values.sum(0)


def _row(layer: Layer, epsilon: float, ranks: Ranks) -> dict[str, object]:
    return {
        "layer": layer.name,
        "m": layer.m,
        "n": layer.n,
        "groups": layer.groups,
        "epsilon": epsilon,
        **vars(ranks),
        "utilization": ranks.r / layer.width,
    }
