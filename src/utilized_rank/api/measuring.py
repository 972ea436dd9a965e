"""Measure anyone's network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd
from torch import nn
from tqdm import tqdm

from ..networks.evaluation import Score
from ..networks.precision import Precision
from ..ranks import measure as library
from ..ranks.layers import Layer, countable
from ..ranks.measure import RANGE, Criterion, Row
from ..ranks.subspaces import numerical_rank
from .given import InputError, check_start, check_tolerance, checked, inputs_of, labelled, standard
from .utilization import Utilization


def measure(
    network: nn.Module,
    search: Any = None,
    calibration: Any = None,
    *,
    epsilon: float | None = None,
    energy: float | None = None,
    score: Score | None = None,
    centred: bool = False,
    criterion: Criterion = "rank",
    precision: Precision = "float32",
    rows: int | None = 4,
    memory: int = 2048,
    batch_size: int = 128,
    on_layer: Callable[[Row], None] = lambda row: None,
) -> Utilization:
    """Measure the utilized rank of every layer of ``network`` that counts, one by one, the others intact.

    With ``epsilon``, ranks are searched: the smallest with which the score stays within it (Garg et al. 2024). With
    ``energy`` they are those that hold this fraction of the variance of a layer's inputs and outputs: sooner, without
    labels.

    Interrupted from the keyboard, it gives back the layers that are done.

    Args:
        network: never changed; a copy is measured, in evaluation mode, on its device and in its type.
        search: inputs and labels that ranks are searched on: a ``DataLoader`` or any other iterable of pairs (read once
            and kept), or one pair of tensors.
        calibration: inputs that second moments are taken over, likewise; those of ``search`` where it is None. Labels
            are left away. Inputs may be tensors, tuples, or dictionaries by the names of arguments.
        epsilon: tolerated loss: in percentage points of accuracy, or in the unit of ``score``.
        energy: fraction of the variance, above 0, up to 1.
        score: any function of a network, the higher the better, in place of the accuracy on ``search``.
        centred: with ``energy``: of the deviations from the mean rather than of the values.
        criterion: with ``epsilon``: which ranks are searched (see :data:`utilized_rank.ranks.measure.Criterion`). Where
            a search takes too long, "predicted" says what it would find, each rank with a range: from one backward
            pass, and verdicts on five layers that fix how much may be lost.
        precision: of the network's arithmetic in the search.
        rows: that a layer's moment is taken over, as a multiple of its width m; all where it is None.
        memory: MiB that the search may use to keep what flows into a layer.
        batch_size: inputs at a time.
        on_layer: is given the row of each layer when it is done.

    Raises:
        InputError: what was given cannot be measured; says what to do.
        FloatingPointError: a layer receives NaN or Inf.
    """
    if (epsilon is None) == (energy is None):
        raise InputError("give epsilon=, a tolerated loss, or energy=, a fraction of the variance (and not both)")
    if energy is not None and not 0 < energy <= 1:
        raise InputError(f"energy={energy:g} is no fraction: it lies above 0, up to 1")
    if epsilon is not None:
        check_tolerance(epsilon)
    if criterion == "predicted" and energy is not None:
        raise InputError("ranks at energy= are exact, and need no search: criterion='predicted' goes with epsilon=")
    goal = None if epsilon is None else goal_of(network, search, score)
    inputs = inputs_of(search if calibration is None else calibration, network, "calibration")
    its, stay = standard(network, inputs[:1])
    layers = {layer.name: layer for layer in countable(its).layers}
    if not layers:
        raise InputError(f"no layer of the network counts: {_told(countable(its).left_out | stay)}")
    found: list[Row] = []

    def done(layer: Layer, ranks: Row) -> None:
        found.append(_row(layer, ranks))
        on_layer(found[-1])

    if goal is not None:
        assert epsilon is not None
        check_start(goal, its)
        try:
            whole = library.measure(
                its,
                goal,
                inputs,
                [epsilon],
                criterion=criterion,
                precision=precision,
                rows=rows,
                memory=memory,
                batch_size=batch_size,
                on_layer=lambda of: done(layers[of[0]["layer"]], of[0]),
                partial=True,
            )
        except library.Unpredictable as error:
            raise InputError(f"criterion={criterion!r}: {error}") from None
        about: dict[str, Any] = {"epsilon": epsilon, "score": whole.score, "search": whole.search_images}
        left_out, moments = whole.left_out, whole.moments
    else:
        assert energy is not None
        flows = library.inputs_of(its, inputs, rows, batch_size)
        left_out, moments, about = dict(flows.left_out), flows.moments, {"energy": energy}
        with library.interruptible(flows.layers, found, left_out):
            for layer in tqdm(flows.layers, desc="eigenvalues", unit="layer"):
                done(layer, vars(library.energy_ranks(layer, moments[layer.name], energy, centred)))
    if not found:
        raise InputError(f"no layer of the network counts: {_told(left_out | stay)}")
    found.sort(key=lambda row: [*layers].index(row["layer"]))  # some were done before others
    return Utilization(pd.DataFrame(found), left_out | stay, moments, len(inputs), **about)


def goal_of(network: nn.Module, search: Any, score: Score | None) -> Score:
    """What a search asks of the network: ``score`` where there is one, else the accuracy on ``search``.

    Raises:
        InputError: there is neither.
    """
    if score is not None:
        return checked(score)
    if search is None:
        raise InputError("a search needs search=, inputs with labels, or score=, any function of a network")
    return labelled(search, network, "search")


def _row(layer: Layer, ranks: Row) -> Row:
    width = {"m": layer.m, "n": layer.n, "groups": layer.groups}
    return {
        "layer": layer.name,
        "shape": "×".join(map(str, layer.module.weight.shape)),
        **width,
        "weight_rank": max(map(numerical_rank, layer.weight())),
        **{name: ranks[name] for name in ("k_s", "k_t", "r", *RANGE) if name in ranks},
        "utilization": ranks["r"] / layer.width,
    }


def _told(left_out: dict[str, str]) -> str:
    return "; ".join(f"{name} ({why})" for name, why in [*left_out.items()][:3]) or "it has none"
