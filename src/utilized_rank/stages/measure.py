"""Utilization: the moments of every layer, its principal subspaces, and its utilized rank."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
import torch
from torch import nn
from tqdm import tqdm

from ..datasets.data import Dataset, check_resolution
from ..networks.precision import resolved
from ..ranks.layers import Layer, countable
from ..ranks.moments import Budget, Moments, input_moments
from ..ranks.projection import bases
from ..ranks.rank_search import Ranks, search, search_energy, search_utilized
from ..ranks.subspaces import Subspace
from ..ranks.trials import Trials
from ..study import config

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
    search_images: int
    search_correct: int

    def mean_layer_utilization(self) -> dict[float, float]:
        """MLU at each epsilon: the mean of r / min(m, n) over the layers that count."""
        return {float(e): float(rows.utilization.mean()) for e, rows in self.layers.groupby("epsilon")}


def measure(network: nn.Module, dataset: Dataset, parameters: config.Measure) -> Measurement:
    """Measure the utilized rank of every countable layer of ``network``, layer by layer, others intact.

    Raises:
        StudyError: an epsilon is finer than one image of the search split.
        FloatingPointError: a layer receives NaN or Inf.
    """
    check_resolution(len(dataset.splits["search"]), parameters.epsilons)
    selection = countable(network)
    calibration = dataset.inputs("train", parameters.calibration_images)
    budget = None if parameters.rows is None else Budget(parameters.rows, len(calibration))
    moments = input_moments(network, selection.layers, calibration.split(parameters.batch_size), budget)
    uncalled = {layer.name: UNCALLED for layer in selection.layers if not moments[layer.name].count}
    layers = [layer for layer in selection.layers if layer.name not in uncalled]
    moments = {layer.name: moments[layer.name] for layer in layers}
    trials = Trials(
        network, dataset.inputs("search"), dataset.labels("search"), parameters.memory, parameters.precision
    )
    rows = []
    for layer in tqdm(layers, desc="rank search", unit="layer"):
        # No rank beyond min(m, n) is tried, but an energy threshold is a part of all eigenvalues.
        s, t = bases(layer, moments[layer.name], None if parameters.criterion == "energy" else layer.width)
        for epsilon in parameters.epsilons:
            ranks = layer_ranks(layer, s, t, trials, epsilon, parameters.criterion)
            rows.append(_row(layer, epsilon, ranks))
    return Measurement(
        # A side that was not asked for has no rank: a whole number all the same.
        pd.DataFrame(rows).astype({"k_s_alone": "Int64", "k_t_alone": "Int64"}),
        selection.left_out | uncalled,
        trials.table(),
        resolved(parameters.precision),
        moments,
        len(dataset.splits["search"]),
        trials.correct,
    )


def layer_ranks(layer: Layer, s: Subspace, t: Subspace, trials: Trials, epsilon: float, criterion: str) -> Ranks:
    """The ranks of one layer at one tolerance; all 0 for a dead one (no input, or no output, ever)."""
    if float(t.values.sum()) == 0:
        return Ranks(0, 0, 0, 0, 0)

    def passes(k_s: int, k_t: int) -> bool:
        return trials.passes(layer, s, t, k_s, k_t, epsilon)

    def likely(k_s: int, k_t: int) -> bool:
        return trials.likely(layer, s, t, k_s, k_t, epsilon)

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
