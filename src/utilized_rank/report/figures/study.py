"""All networks of a study beside one another."""

from __future__ import annotations

import re
from itertools import cycle

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from .style import BLACK, BLUE, GREEN, GREY, ORANGE, epsilon_colours, epsilon_label, layer_axis, short

KINDS = {"supervised": BLUE, "linear": ORANGE, "finetuned": GREEN}
"""A colour for each kind of training."""
MARKERS = "osD^vP*X<>h"


def ranks(
    layers: dict[str, pd.DataFrame], epsilon: float, before: dict[str, pd.Series], after: dict[str, pd.Series]
) -> Figure:
    """Figure 2: rank of W (dotted) and utilized rank (solid), layer by layer, one panel a network.

    Args:
        layers: of each network by label, as in ``Measurement.layers``.
        epsilon: the tolerance that is shown.
        before: accuracy, images and parameters of the original network, by label.
        after: the same of the decomposed, fine-tuned network.

    The brackets give parameters and accuracy.
    """
    columns = min(2, len(layers))
    rows = -(-len(layers) // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(5.6 * columns, 3.5 * rows), squeeze=False)
    for axes in grid.flat[len(layers) :]:
        axes.remove()
    for axes, (label, table) in zip(grid.flat, layers.items(), strict=False):
        shown = table[table.epsilon == epsilon]
        x = range(len(shown))
        full = np.minimum(shown.m, shown.n)
        axes.plot(x, full, ":", color=GREY, lw=2, label=f"original {_bracket(before[label])}")
        axes.plot(x, shown.r, "-", color=BLUE, label=f"decomposed {_bracket(after[label])}")
        axes.fill_between(x, shown.r, full, color=GREY, alpha=0.12, lw=0)
        layer_axis(axes, [short(name) for name in shown.layer])
        axes.set(ylabel="rank of W, utilized rank", title=label, ylim=(0, 1.28 * full.max()))
        axes.legend(loc="upper left", fontsize=8)
    return figure


def _bracket(row: pd.Series) -> str:
    return f"[{row.parameters / 1e3:,.0f}k, {row.accuracy:.1f}%]"


def frontier(results: pd.DataFrame) -> Figure:
    """Figure 3: change of accuracy against parameters kept; area is FLOPs kept, colour epsilon.

    Args:
        results: one row a network and epsilon, with label, epsilon, change, change_low, change_high,
            parameters_kept and flops_kept (fractions of the original's).
    """
    figure, axes = plt.subplots(figsize=(8.2, 4.6))
    colours = epsilon_colours(list(results.epsilon.unique()))
    markers = dict(zip(results.label.unique(), cycle(MARKERS), strict=False))
    for row in results.itertuples():
        at, colour = row.parameters_kept, colours[row.epsilon]
        axes.plot([at, at], [row.change_low, row.change_high], color=colour, lw=1, alpha=0.6)
        area = 30 + 330 * row.flops_kept
        axes.scatter(at, row.change, s=area, color=colour, marker=markers[row.label], alpha=0.8, ec="white")
    axes.axhline(0, color=BLACK, lw=1)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set(
        xlabel="parameters kept (% of the original)",
        ylabel="change of test accuracy (points, 95% interval)",
        xlim=(0, None),
    )
    handles = [Line2D([], [], marker="o", ls="", color=c, label=epsilon_label(e)) for e, c in colours.items()]
    handles += [Line2D([], [], marker=m, ls="", color=GREY, label=label) for label, m in markers.items()]
    handles += [
        Line2D([], [], marker="o", ls="", mfc="none", color=GREY, ms=(30 + 330 * f) ** 0.5, label=f"{f:.0%} of FLOPs")
        for f in (0.25, 0.75)
    ]
    axes.legend(handles=handles, loc="center left", bbox_to_anchor=(1, 0.5), labelspacing=0.9)
    return figure


def overview(used: pd.DataFrame) -> Figure:
    """Mean layer utilization of every network of every study, a mark a tolerance.

    Args:
        used: one row a study, network and epsilon: study, title, network, training, epsilon, mlu, accuracy.
    """
    titles = dict(zip(used.study, used.title, strict=True))
    counts = [used[used.study == study].network.nunique() for study in titles]
    figure, grid = plt.subplots(
        len(titles),
        1,
        figsize=(8.6, 0.9 + 0.36 * sum(counts) + 0.5 * len(counts)),
        height_ratios=[count + 0.5 for count in counts],
        sharex=True,
        squeeze=False,
    )
    colours = epsilon_colours(list(used.epsilon.unique()))
    for axes, (study, title) in zip(grid[:, 0], titles.items(), strict=True):
        shown = used[used.study == study]
        words = []
        for place, (network, of) in enumerate(shown.groupby("network", sort=False)):
            words.append(f"{network} [{of.accuracy.iloc[0]:.1f}%]")
            axes.axhline(place, color="#E6E6E6", lw=0.8)
            axes.plot(100 * of.mlu, [place] * len(of), color=GREY, lw=1.2)
            axes.scatter(100 * of.mlu, [place] * len(of), s=48, c=of.epsilon.map(colours), ec="white", zorder=3)
        axes.set_yticks(range(len(words)), words, fontsize=8.5)
        axes.set_ylim(len(words) - 0.5, -0.5)
        axes.set_title(title)
        axes.grid(axis="y", visible=False)
    grid[-1, 0].set(xlabel="mean layer utilization (%)", xlim=(0, None))
    handles = [Line2D([], [], marker="o", ls="", color=c, label=epsilon_label(e)) for e, c in colours.items()]
    grid[0, 0].legend(handles=handles, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def comparison(layers: dict[str, pd.DataFrame], epsilon: float, summary: pd.DataFrame, names: dict[str, str]) -> Figure:
    """Utilization layer by layer of one architecture trained three ways, and MLU beside RankMe.

    Args:
        layers: of each kind of training, as in ``Measurement.layers``.
        epsilon: the tolerance of the left panel.
        summary: one row a kind and epsilon: kind, epsilon, mlu, rankme.
        names: of each kind, in words.
    """
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.8), width_ratios=[2.4, 1.2, 0.9])
    for kind, table in layers.items():
        shown = table[table.epsilon == epsilon]
        left.plot(range(len(shown)), 100 * shown.utilization, "o-", ms=4, color=KINDS[kind], label=names[kind])
    layer_axis(left, [short(name) for name in shown.layer])
    left.set(ylabel="utilization (%)", title=f"Layer by layer, {epsilon_label(epsilon)}", ylim=(0, None))
    left.legend(loc="upper left")
    for kind, rows in summary.groupby("kind", sort=False):
        middle.plot(rows.epsilon, 100 * rows.mlu, "o-", color=KINDS[str(kind)])
    middle.set(xlabel="tolerance ε (points)", ylabel="MLU (%)", title="Mean", ylim=(0, None))
    once = summary.drop_duplicates("kind")
    sns.barplot(once, x="kind", y="rankme", hue="kind", palette=KINDS, saturation=1, width=0.6, ax=right)
    words = [re.sub(r" \(.*?\)", "", names[kind]).replace(", ", ",\n") for kind in once.kind]
    right.set_xticks(range(len(once)), words, fontsize=7)
    right.set_xlabel("")
    right.set(ylabel="RankMe of the features", title="RankMe")
    right.grid(axis="x", visible=False)
    return figure
