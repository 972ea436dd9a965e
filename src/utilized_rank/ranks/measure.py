"""Utilization: the moments of every layer, its principal subspaces, and its utilized rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..networks.batches import Batches, gathered
from ..networks.devices import device_of
from ..networks.each import Each, in_turn
from ..networks.evaluation import Labelled, Score
from ..networks.precision import Precision, resolved
from .curvature import Curvature
from .layers import Layer, countable
from .moments import Budget, Moments, chunked_moments
from .prediction import Fitted, Guide, Prediction, fitted, handful, predictable
from .projection import bases
from .rank_search import Ranks, search, search_energy, search_utilized
from .subspaces import Subspace, energy_rank, output_spectrum, spectrum
from .trials import Evaluation, Recall, Scored, Trials, evaluations_table, trials, worked_out

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
    each: Each = in_turn,
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
        each: where moments and curvature are summed, and layers are searched.

    Raises:
        FloatingPointError: a layer receives NaN or Inf.
        Unpredictable: ranks are to be predicted, of a network without a gradient.
    """
    inputs = gathered(calibration)
    flows = inputs_of(network, inputs, rows, batch_size, each)
    curvatures = predictable(network, flows.layers, unseen(score, inputs), batch_size, each)
    certifies = criterion != "predicted"
    if not certifies:
        flows = _reached(flows, curvatures)
    layers = {layer.name: layer for layer in flows.layers}
    work = each(Search, Asked(network, flows.layers, score, tuple(epsilons), criterion, precision, memory, recall))
    left_out, found, table = dict(flows.left_out), dict[str, Found](), list[Row]()
    thresholds: dict[float, Fitted] = {}

    def done(rows: list[Row]) -> None:
        table.extend(rows)
        on_layer(rows)

    def search(some: list[Layer], title: str) -> None:
        starts = {epsilon: its.threshold for epsilon, its in thresholds.items()}
        # For a trial all that comes after a layer is run: the first ones take longest, and begin first.
        known = {x.name: Known(x.name, flows.moments[x.name], curvatures.get(x.name), starts) for x in some}
        for name, its in work(known, title, "layer"):
            found[name] = its
            _remember(recall, its)
            if certifies:
                done([row(layers[name], ranks, epsilon=epsilon) for epsilon, ranks in its.ranks.items()])

    with interruptible(flows.layers, table, left_out, partial):
        few = handful(flows.layers)
        search(few, "rank search of a few layers")
        thresholds = _fitted([(layer, found[layer.name]) for layer in few], epsilons)
        if certifies:
            search([layer for layer in flows.layers if layer not in few], "rank search")
        else:
            for layer in tqdm(flows.layers, desc="prediction", unit="layer"):
                known = found[layer.name].prediction if layer in few else None
                prediction = known or _prediction(layer, flows, curvatures)
                done([_predicted(layer, prediction, its, epsilon) for epsilon, its in thresholds.items()])
    places = {name: place for place, name in enumerate(layers)}
    evaluations = [evaluation for name in layers if name in found for evaluation in found[name].evaluations]
    return Measurement(
        # A side that was not asked for has no rank: a whole number all the same.
        pd.DataFrame(sorted(table, key=lambda row: places[row["layer"]])).astype(dict.fromkeys(ALONE, "Int64")),
        left_out,
        evaluations_table(evaluations),
        resolved(precision, device_of(network).type),
        flows.moments,
        next(iter(found.values())).score,
        len(score) if isinstance(score, Labelled) else None,
        {} if certifies else {epsilon: its.threshold for epsilon, its in thresholds.items()},
    )


ALONE = ["k_s_alone", "k_t_alone"]
"""Columns of what each side needs by itself."""


@dataclass(frozen=True)
class Asked:
    """What is asked of every layer of a network; see :func:`measure`."""

    network: nn.Module
    layers: list[Layer]
    score: Score
    epsilons: tuple[float, ...]
    criterion: Criterion
    precision: Precision
    memory: int
    recall: Recall


@dataclass(frozen=True)
class Known:
    """What is known of a layer before any trial."""

    name: str
    moments: Moments
    curvature: Tensor | None
    """None where there is no prediction."""
    thresholds: dict[float, float]
    """By tolerance, the divergence in nats at which its boundaries are expected; none of the first layers."""


@dataclass(frozen=True)
class Found:
    """What the search of one layer found."""

    ranks: dict[float, Ranks]
    """At each tolerance."""
    prediction: Prediction | None
    """Of one of the first layers, for thresholds to be fitted to; None of the others."""
    evaluations: list[Evaluation]
    """In order."""
    answers: list[tuple[Any, Any]]
    """With their questions: for the recall of whoever asked for the search, which may be in another process."""
    score: float
    """Of the unaltered network."""


class Search:
    """Searches layers of a network, each as if it were the only one: their order changes nothing."""

    def __init__(self, asked: Asked) -> None:
        self._asked = asked
        self._layers = {layer.name: layer for layer in asked.layers}
        self._certifies = asked.criterion != "predicted"
        self._answers: list[tuple[Any, Any]] = []
        self._verdicts = trials(
            asked.network, asked.score, asked.memory, asked.precision, self._certifies, self._recalled
        )

    def _recalled(self, question: Any, work_out: Callable[[], Any]) -> Any:
        answer = self._asked.recall(question, work_out)
        self._answers.append((question, answer))
        return answer

    def __call__(self, known: Known) -> Found:
        """The ranks of one layer, and what they rest on."""
        layer, criterion = self._layers[known.name], self._asked.criterion
        self._verdicts.forget()
        self._answers = []
        # No rank beyond min(m, n) is tried, but an energy threshold is a part of all eigenvalues.
        s, t = bases(layer, known.moments, None if criterion == "energy" else layer.width)
        prediction = None if known.curvature is None else Prediction(layer, s, t, known.curvature)
        guide = None if prediction is None else Guide(prediction, known.thresholds)
        asked = criterion if self._certifies else "rank"
        ranks = {e: layer_ranks(layer, s, t, self._verdicts, e, asked, guide) for e in self._asked.epsilons}
        first = None if known.thresholds else prediction
        return Found(ranks, first, self._verdicts.evaluations, self._answers, self._verdicts.score)


def _remember(recall: Recall, found: Found) -> None:
    """Make known here what was asked for a layer, maybe in another process."""
    for question, answer in found.answers:

        def known(answer: Any = answer) -> Any:
            return answer

        recall(question, known)


def _prediction(layer: Layer, flows: Flows, curvatures: Curvature) -> Prediction:
    return Prediction(layer, *bases(layer, flows.moments[layer.name], layer.width), curvatures[layer.name])


def _reached(flows: Flows, curvatures: Curvature) -> Flows:
    """The layers that ranks can be predicted of.

    Raises:
        Unpredictable: there is none.
    """
    layers = [layer for layer in flows.layers if layer.name in curvatures]
    if not layers:
        raise Unpredictable("no gradient of the network's predictions reaches a layer: search its ranks instead")
    unreached = {layer.name: UNREACHED for layer in flows.layers if layer.name not in curvatures}
    return Flows(layers, {layer.name: flows.moments[layer.name] for layer in layers}, flows.left_out | unreached)


def _fitted(found: list[tuple[Layer, Found]], epsilons: Sequence[float]) -> dict[float, Fitted]:
    """The threshold of each tolerance, from what was found of some layers; nothing where none has a prediction."""
    some = [(layer, its.ranks, its.prediction) for layer, its in found if its.prediction is not None]
    curves = [partial(_utilization, layer, prediction) for layer, _, prediction in some]
    return {e: fitted(curves, [ranks[e].r / layer.width for layer, ranks, _ in some]) for e in epsilons if some}


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


def inputs_of(
    network: nn.Module, calibration: Batches, rows: int | None, batch_size: int = 128, each: Each = in_turn
) -> Flows:
    """The second moments of every layer that counts; arguments as of :func:`measure`.

    Raises:
        FloatingPointError: a layer receives NaN or Inf.
    """
    selection = countable(network)
    budget = None if rows is None else Budget(rows, len(calibration))
    moments = chunked_moments(network, selection.layers, calibration, budget, batch_size, each)
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

    def passes(k_s: int, k_t: int) -> bool:
        verdict = verdicts.passes(layer, s, t, k_s, k_t, epsilon)
        if guide is not None:
            guide.learn(k_s, k_t, epsilon, verdict)
        return verdict

    guess = verdicts.likely
    likely = None if guess is None else lambda k_s, k_t: guess(layer, s, t, k_s, k_t, epsilon)
    predicted = None if guide is None else lambda k_s, k_t: guide.predicted(k_s, k_t, epsilon)
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
