"""Utilization: the moments of every layer, its principal subspaces, and its utilized rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import pandas as pd
import torch
from torch import nn
from tqdm import tqdm

from ..networks.batches import Batches, gathered
from ..networks.evaluation import Labelled, Score
from ..networks.precision import Precision
from .layers import Layer, countable
from .moments import Budget, Moments, input_moments
from .prediction import Curve, Fitted, Guide, Prediction, fitted, guide, handful
from .projection import bases
from .rank_search import Ranks, search, search_energy, search_utilized
from .subspaces import Subspace, energy_rank, output_spectrum, spectrum
from .trials import Recall, Scored, Trials, evaluations_table, trials, worked_out

Criterion = Literal["rank", "utilized", "energy", "predicted"]
"""Search k_S and k_T each on its own; only the smaller of them; or one energy threshold for both. Or predict them from
one backward pass and a handful of layers: none is certified."""
Row = dict[str, Any]
"""Of a table of layers."""
UNREACHED = "no gradient of the predictions reaches it: its rank cannot be predicted"
UNCALLED = "its module is never called: the network reads its weight, or does not use it"


class Unpredictable(ValueError):
    """No rank of a network can be predicted: the message says why, and what to do."""


@dataclass(frozen=True)
class Measurement:
    """What :func:`measure` found."""

    layers: pd.DataFrame
    """One row a layer and epsilon: layer, m, n, groups, epsilon, k_s, k_t, k_s_alone, k_t_alone, r, utilization.

    Predicted ones have a range too: r_low, r_high.
    """
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
    thresholds: dict[float, float]
    """Of predicted ranks, at each epsilon: the divergence in nats up to which a layer is taken to pass."""

    @property
    def predicted(self) -> bool:
        """Whether the ranks are predictions, none of them certified."""
        return RANGE[0] in self.layers

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
    on_layer: Callable[[list[Row]], None] = lambda rows: None,
    partial: bool = False,
    recall: Recall = worked_out,
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
        on_layer: is given the rows of each layer when it is done.
        partial: where it is interrupted from the keyboard, give back the layers that are done.
        recall: what was seen before an interruption.

    Raises:
        FloatingPointError: a layer receives NaN or Inf.
        Unpredictable: ranks are to be predicted, of a network without a gradient.
    """
    inputs = gathered(calibration)
    flows = inputs_of(network, inputs, rows, batch_size)
    begins = guide(network, flows.layers, unseen(score, inputs), batch_size)
    certifies = criterion != "predicted"
    if not certifies:
        flows = _reached(flows, begins)
    verdicts = trials(network, score, memory, precision, certifies, recall)
    thresholds, known = ({}, {}) if certifies else _fitted(flows, begins, verdicts, epsilons)

    def subspaces(layer: Layer) -> tuple[Subspace, Subspace]:
        # No rank beyond min(m, n) is tried, but an energy threshold is a part of all eigenvalues.
        return bases(layer, flows.moments[layer.name], None if criterion == "energy" else layer.width)

    def searched(layer: Layer) -> list[Row]:
        s, t = subspaces(layer)
        ranks = {epsilon: layer_ranks(layer, s, t, verdicts, epsilon, criterion, begins) for epsilon in epsilons}
        return [row(layer, its, epsilon=epsilon) for epsilon, its in ranks.items()]

    def predicted(layer: Layer) -> list[Row]:
        prediction = known.get(layer.name) or begins.prediction(layer, *subspaces(layer))
        return [_predicted(layer, prediction, its, epsilon) for epsilon, its in thresholds.items()]

    left_out = dict(flows.left_out)
    found: list[Row] = []
    with interruptible(flows.layers, found, left_out, partial):
        for layer in tqdm(flows.layers, desc="rank search" if certifies else "prediction", unit="layer"):
            its = searched(layer) if certifies else predicted(layer)
            found += its
            on_layer(its)
    return Measurement(
        # A side that was not asked for has no rank: a whole number all the same.
        pd.DataFrame(found).astype({"k_s_alone": "Int64", "k_t_alone": "Int64"}),
        left_out,
        evaluations_table(verdicts.evaluations),
        verdicts.precision,
        flows.moments,
        verdicts.score,
        len(score) if isinstance(score, Labelled) else None,
        {epsilon: its.threshold for epsilon, its in thresholds.items()},
    )


def _reached(flows: Flows, begins: Guide) -> Flows:
    """The layers that ranks can be predicted of.

    Raises:
        Unpredictable: there is none.
    """
    layers = [layer for layer in flows.layers if begins.knows(layer)]
    if not layers:
        raise Unpredictable("no gradient of the network's predictions reaches a layer: search its ranks instead")
    unreached = {layer.name: UNREACHED for layer in flows.layers if not begins.knows(layer)}
    return Flows(layers, {layer.name: flows.moments[layer.name] for layer in layers}, flows.left_out | unreached)


def _fitted(
    flows: Flows, begins: Guide, verdicts: Trials | Scored, epsilons: Sequence[float]
) -> tuple[dict[float, Fitted], dict[str, Prediction]]:
    """The threshold of each tolerance, from the verdicts on a handful of layers; and what is predicted of those."""
    curves: list[Curve] = []
    predictions: dict[str, Prediction] = {}
    found: dict[float, list[float]] = {epsilon: [] for epsilon in epsilons}
    for layer in tqdm(handful(flows.layers), desc="threshold", unit="layer"):
        s, t = bases(layer, flows.moments[layer.name], layer.width)
        predictions[layer.name] = begins.prediction(layer, s, t)
        curves.append(partial(_utilization, layer, predictions[layer.name]))
        for epsilon in epsilons:
            found[epsilon].append(layer_ranks(layer, s, t, verdicts, epsilon, "rank", begins).r / layer.width)
    return {epsilon: fitted(curves, its) for epsilon, its in found.items()}, predictions


def _utilization(layer: Layer, prediction: Prediction, threshold: float) -> float:
    return prediction.ranks(threshold).r / layer.width if prediction.whole > 0 else 0.0


RANGE = ["r_low", "r_high"]
"""Columns of a prediction's range."""


def _predicted(layer: Layer, prediction: Prediction, threshold: Fitted, epsilon: float) -> Row:
    if prediction.whole == 0:  # a dead layer
        return row(layer, Ranks(0, 0, 0, 0, 0), epsilon=epsilon) | dict.fromkeys(RANGE, 0)
    ranks, low, high = map(prediction.ranks, (threshold.threshold, threshold.high, threshold.low))
    return row(layer, ranks, epsilon=epsilon) | dict(zip(RANGE, sorted((low.r, high.r)), strict=True))


def unseen(score: Score, calibration: Batches) -> Batches:
    """Inputs that curvature is taken over: those of the search split, which no one trains on, where there is one."""
    return score.inputs if isinstance(score, Labelled) else calibration


@contextmanager
def interruptible(
    layers: list[Layer], found: list[Row], left_out: dict[str, str], partial: bool = True
) -> Iterator[None]:
    """Where it is interrupted from the keyboard, go on with the layers that were found: the others are left out.

    Raises:
        KeyboardInterrupt: none was found, or it is not ``partial``.
    """
    try:
        yield
    except KeyboardInterrupt:
        if not partial or not found:
            raise
        done = {its["layer"] for its in found}
        left_out |= {layer.name: "the search was interrupted before it" for layer in layers if layer.name not in done}


@dataclass(frozen=True)
class Flows:
    """What flows into the layers of a network that count."""

    layers: list[Layer]
    moments: dict[str, Moments]
    left_out: dict[str, str]
    """Layers that do not count, and why."""


def inputs_of(network: nn.Module, calibration: Batches, rows: int | None, batch_size: int = 128) -> Flows:
    """The second moments of every layer that counts; arguments as of :func:`measure`.

    Raises:
        FloatingPointError: a layer receives NaN or Inf.
    """
    selection = countable(network)
    budget = None if rows is None else Budget(rows, len(calibration))
    moments = input_moments(network, selection.layers, calibration.split(batch_size), budget)
    layers = [layer for layer in selection.layers if moments[layer.name].count]
    uncalled = {layer.name: UNCALLED for layer in selection.layers if not moments[layer.name].count}
    return Flows(layers, {layer.name: moments[layer.name] for layer in layers}, selection.left_out | uncalled)


def energy_ranks(layer: Layer, moments: Moments, energy: float, centred: bool = False) -> Ranks:
    """The smallest k_S and k_T that hold the fraction ``energy`` of the variance: no labels, no search.

    Args:
        layer: of a network.
        moments: of its inputs.
        energy: above 0, up to 1.
        centred: of the deviations from the mean rather than of the values. The k_T over n is then layer saturation
            (Shenk et al. 2019, arXiv 1907.08589).
    """
    second = moments.centred if centred else moments.second
    values = spectrum(second), output_spectrum(second, layer.weight())
    k_s, k_t = (energy_rank(its, energy) for its in values)
    return Ranks(k_s, k_t, k_s, k_t, min(k_s, k_t, layer.width))


def layer_ranks(
    layer: Layer,
    s: Subspace,
    t: Subspace,
    verdicts: Trials | Scored,
    epsilon: float,
    criterion: Criterion,
    guide: Guide | None = None,
) -> Ranks:
    """The ranks of one layer at one tolerance; all 0 for a dead one (no input, or no output, ever).

    A guide says where to begin, and learns from the verdicts: fewer are asked, and what is found is certified as ever.
    """
    if float(t.values.sum()) == 0:
        return Ranks(0, 0, 0, 0, 0)
    known = guide if guide is not None and guide.knows(layer) else None

    def passes(k_s: int, k_t: int) -> bool:
        verdict = verdicts.passes(layer, s, t, k_s, k_t, epsilon)
        if known is not None:
            known.learn(layer, s, t, k_s, k_t, epsilon, verdict)
        return verdict

    likely, predicted = (
        None if guess is None else lambda k_s, k_t, guess=guess: guess(layer, s, t, k_s, k_t, epsilon)
        for guess in (verdicts.likely, None if known is None else known.predicted)
    )
    if criterion == "energy":
        return search_energy(passes, layer.m, layer.n, _over_groups(s), _over_groups(t), likely, predicted)
    if criterion == "utilized":
        return search_utilized(passes, layer.m, layer.n, likely, predicted)
    return search(passes, layer.m, layer.n, likely, predicted)


def _over_groups(subspace: Subspace) -> torch.Tensor:
    return subspace.values.sum(0)


def row(layer: Layer, ranks: Ranks, **about: float) -> Row:
    """One row of a table of layers: layer, m, n, groups, what else is said of it, its ranks and its utilization."""
    return {
        "layer": layer.name,
        "m": layer.m,
        "n": layer.n,
        "groups": layer.groups,
        **about,
        **vars(ranks),
        "utilization": ranks.r / layer.width,
    }
