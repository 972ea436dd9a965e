"""One network, layer by layer."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .style import (
    AMBER,
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PINK,
    epsilon_colours,
    epsilon_label,
    layer_axis,
    short,
)

SUBSPACES = {
    "inputs only": (BLUE, "o"),
    "outputs only": (ORANGE, "s"),
    "both": (BLACK, "D"),
    "SVD of W": (PINK, "^"),
    "random": (GREY, "x"),
}


def utilization(layers: pd.DataFrame) -> Figure:
    """Utilization of each layer, one line an epsilon, and its mean (the MLU) dashed."""
    figure, axes = plt.subplots(figsize=(8, 3.4))
    for epsilon, colour in epsilon_colours(list(layers.epsilon.unique())).items():
        rows = layers[layers.epsilon == epsilon]
        mean = 100 * rows.utilization.mean()
        label = f"{epsilon_label(epsilon)}: MLU {mean:.0f}%{_range(axes, rows, colour)}"
        axes.plot(range(len(rows)), 100 * rows.utilization, "o-", ms=4, color=colour, label=label)
        axes.axhline(mean, color=colour, ls="--", lw=1)
    layer_axis(axes, [short(name) for name in rows.layer])
    axes.set(ylabel="utilization r / min(m, n) (%)", ylim=(0, 103))
    axes.legend(loc="upper right", bbox_to_anchor=(1, 1.15), ncols=3)
    return figure


def _range(axes: Axes, rows: pd.DataFrame, colour: str) -> str:
    """Where ranks are predicted, shade their range, and say so."""
    if "r_low" not in rows:
        return ""
    low, high = (100 * rows[end] / rows[["m", "n"]].min(axis=1) for end in ("r_low", "r_high"))
    axes.fill_between(range(len(rows)), low, high, color=colour, alpha=0.15, lw=0)
    return ", predicted"


def utilizations(layers: dict[str, pd.DataFrame]) -> Figure:
    """Rank of W (dotted) and utilized rank (solid), layer by layer, as parts of the width: one panel a network.

    Args:
        layers: of each network by label, as in :class:`utilized_rank.Utilization`.
    """
    figure, grid = plt.subplots(len(layers), 1, figsize=(8, 3.2 * len(layers)), squeeze=False)
    for axes, (label, table) in zip(grid.flat, layers.items(), strict=True):
        x, width = range(len(table)), table[["m", "n"]].min(axis=1)
        mean = 100 * table.utilization.mean()
        axes.plot(x, 100 * table.weight_rank / width, ":", color=GREY, lw=2, label="rank of W")
        mlu = f"utilized rank r: MLU {mean:.1f}%{_range(axes, table, BLUE)}"
        axes.plot(x, 100 * table.utilization, "o-", ms=4, color=BLUE, label=mlu)
        axes.axhline(mean, color=BLUE, ls="--", lw=1)
        layer_axis(axes, [short(name) for name in table.layer])
        axes.set(ylabel="rank / min(m, n) (%)", ylim=(0, 103), title=label)
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
    return figure


def search_work(evaluations: pd.DataFrame) -> Figure:
    """What the rank search of each layer cost: guesses, and verdicts on the whole search split."""
    figure, axes = plt.subplots(figsize=(8, 3.2))
    names = list(evaluations.layer.unique())
    bottom = pd.Series(0.0, index=names)
    for certified, label, colour in ((True, "certifying", BLUE), (False, "guessing", AMBER)):
        work = evaluations[evaluations.certified == certified].groupby("layer").forwards.sum()
        work = work.reindex(names, fill_value=0.0)
        axes.bar(range(len(names)), work, bottom=bottom, color=colour, label=label, width=0.7)
        bottom += work
    layer_axis(axes, [short(name) for name in names])
    axes.set(ylabel="passes of the search split\nthrough the network")
    axes.legend(loc="upper right", ncols=2)
    return figure


def layer_experiments(
    spectra: pd.DataFrame, sweep: pd.DataFrame, accuracy: float, layer: str, ranks: dict[float, int]
) -> Figure:
    """Figure 1: what one layer's weight has, and what of it the network needs.

    Args:
        spectra: singular values of W and W' (decompose.spectra).
        sweep: accuracy against kept dimensions (decompose.sweep).
        accuracy: of the unaltered network on the same images, in percent.
        layer: its name.
        ranks: its utilized rank at each epsilon.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 3.6))
    visible = spectra.clip(lower=1e-8)
    left.semilogy(spectra.dimension, visible.W, color=GREY, ls=":", lw=2.4, label="W")
    left.semilogy(spectra.dimension, visible.projected, color=GREEN, label="W′ = P$_S$ W P$_T$")
    left.set(xlabel="dimension", ylabel="singular value / largest of W", title="Spectrum")
    left.set_ylim(bottom=max(1e-8, 0.3 * float(visible[["W", "projected"]].min().min())))
    left.legend(loc="center right")
    for kind, (colour, marker) in SUBSPACES.items():
        rows = sweep[sweep.subspace == kind]
        right.plot(rows.k, rows.accuracy, color=colour, marker=marker, ms=4.5, label=kind)
    right.axhline(accuracy, color=AMBER, ls="--", lw=1.2, label="unaltered network")
    for epsilon, colour in epsilon_colours(list(ranks)).items():
        right.axvline(max(ranks[epsilon], 1), color=colour, lw=1, ls=":")
    right.set_xscale("log", base=2)
    right.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    right.set(xlabel="dimensions kept k (log scale)", ylabel="accuracy, search split (%)", title=f"Layer {layer}")
    right.set_ylim(0, 103)
    right.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def weight_ranks(ranks: pd.DataFrame) -> Figure:
    """Numerical rank of W and W' beside the utilized rank, layer by layer."""
    figure, axes = plt.subplots(figsize=(8, 3.4))
    x = range(len(ranks))
    axes.plot(x, ranks.rank_before, ":", color=GREY, lw=2.4, label="rank of W")
    axes.plot(x, ranks.rank_after, "o", color=GREEN, ms=7, mfc="none", label="rank of W′")
    axes.plot(x, ranks.r, "-", color=BLUE, label="min(k$_S$, k$_T$)")
    layer_axis(axes, [short(name) for name in ranks.layer])
    axes.set(ylabel="rank", ylim=(0, None))
    axes.legend(loc="upper left")
    return figure
