"""One network at many sizes: what is kept of each layer, and accuracy against cost."""

from __future__ import annotations

from importlib.resources import files

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, PercentFormatter

from ...training.sections import Model
from .style import AMBER, BLACK, BLUE, GREEN, GREY, ORANGE, PINK, short

METHODS = {
    "compensated": BLUE,
    "optimal": GREEN,
    "projection": ORANGE,
    "svd": PINK,
    "scratch": AMBER,
    "dense": BLACK,
}
"""A colour for each kind of weights."""
NAMES = {"projection": "P_S W P_T", "optimal": "optimum", "svd": "SVD of W", "scratch": "from random weights"}
KINDS = {
    "independent": "o",
    "cumulative": "v",
    "joint": "*",
    "params": "s",
    "flops": "D",
    "latency": "P",
    "all": "X",
}
"""A mark for each way of choosing ranks."""


def published(model: Model, dataset: str) -> pd.DataFrame:
    """Other works' figures for the same network and data set: columns of ``published.csv``."""
    table = pd.read_csv(str(files("utilized_rank.report.figures") / "published.csv"))
    return table[(table.architecture == model.architecture) & (table.dataset == dataset) & (model.width == 1)]


def frontier(results: pd.DataFrame, label: str, others: pd.DataFrame) -> Figure:
    """Change of accuracy against parameters and FLOPs kept, before training (hollow) and after it (full).

    Args:
        results: one row a network: form, method, ranks, change, change_low, change_high, parameters, flops, seed.
        label: of the network.
        others: published figures, as :func:`published` gives them.
    """
    original = results[results.form == "original"].iloc[0]
    shown = results[results.form.isin(["decomposed", "fine-tuned"]) & (results.seed.fillna(0) == 0)]
    figure, panels = plt.subplots(1, 2, figsize=(12, 4.8), sharey=True)
    for axes, cost, words in zip(panels, ("parameters", "flops"), ("parameters", "FLOPs"), strict=True):
        for row in shown.itertuples():
            at, colour = getattr(row, cost) / original[cost], METHODS[row.method]
            axes.plot([at, at], [row.change_low, row.change_high], color=colour, lw=1, alpha=0.5, zorder=1)
            face = colour if row.form == "fine-tuned" else "white"
            kind = KINDS[row.ranks.partition("-")[0]]
            axes.scatter(at, row.change, s=70 if kind == "*" else 34, marker=kind, fc=face, ec=colour, lw=1.2, zorder=2)
        _add_published(axes, others, f"{cost}_kept")
        _points_axis(axes, shown.change_low.min(), shown.change_high.max())
        axes.set(xlabel=f"{words} kept (% of the original)", xlim=(0, 1.05))
    panels[0].set_ylabel("change of test accuracy (points, 95% interval)")
    panels[0].set_title(f"{label}, {original.accuracy:.2f}%")
    panels[1].legend(handles=_handles(shown, others), loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def latency(timed: pd.DataFrame) -> Figure:
    """Change of accuracy before training against measured time, one panel a network.

    Args:
        timed: as ``timings.timed`` gives it.
    """
    labels = list(dict.fromkeys(timed.label))
    figure, grid = plt.subplots(1, len(labels), figsize=(5.6 * len(labels) + 1.6, 4.2), squeeze=False)
    for axes, label in zip(grid[0], labels, strict=True):
        for row in timed[timed.label == label].itertuples():
            axes.plot(
                2 * [row.time_kept], [row.change_low, row.change_high], color=METHODS[row.method], lw=1, alpha=0.5
            )
            marker = KINDS[row.ranks.partition("-")[0]]
            axes.scatter(row.time_kept, row.change, s=34, marker=marker, fc="white", ec=METHODS[row.method], zorder=2)
        axes.axvline(1, color=GREY, lw=1, ls=":")
        _points_axis(axes, timed.change_low.min(), timed.change_high.max())
        axes.set(xlabel="time (% of the original)", title=label)
    grid[0, 0].set_ylabel("change of test accuracy (points, 95% interval)")
    shown = timed.assign(form="decomposed")
    grid[0, -1].legend(handles=_handles(shown, pd.DataFrame({"tuned": []})), loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _points_axis(axes: Axes, low: float, high: float) -> None:
    """Points up and down: linear within one, logarithmic beyond; and percent across."""
    axes.axhline(0, color=BLACK, lw=1)
    axes.set_yscale("symlog", linthresh=1, linscale=0.8)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:+g}" if value else "0"))
    axes.set_yticks([-80, -40, -20, -10, -5, -2, -1, -0.5, 0, 0.5, 1, 2, 5])
    axes.set_ylim(1.15 * min(low, -0.5), max(1.0, 1.3 * high))
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))


def _add_published(axes: Axes, others: pd.DataFrame, column: str) -> None:
    for row in others[others[column].notna()].itertuples():
        at = getattr(row, column)
        axes.plot(at, row.change, "+" if row.tuned == "yes" else "x", color=GREY, ms=7, mew=1.6)
        axes.annotate(row.work, (at, row.change), (5, -3), textcoords="offset points", fontsize=7, color=GREY)


def _handles(shown: pd.DataFrame, others: pd.DataFrame) -> list[Line2D]:
    def mark(label: str, **how: object) -> Line2D:
        return Line2D([], [], ls="", label=label, **how)  # type: ignore[arg-type]

    handles = [mark(NAMES.get(m, m), marker="o", color=c) for m, c in METHODS.items() if m in set(shown.method)]
    kinds = set(shown.ranks.str.partition("-")[0])
    handles += [mark(k, marker=m, color=GREY) for k, m in KINDS.items() if k in kinds and k != "all"]
    handles += [
        mark("before training", marker="o", mfc="white", color=GREY),
        mark("fine-tuned", marker="o", color=GREY),
    ]
    for tuned, words, marker in (("no", "published", "x"), ("yes", "published, fine-tuned", "+")):
        if (others.tuned == tuned).any():
            handles.append(mark(words, marker=marker, color=GREY, mew=1.6))
    return handles


def kept(ranks: pd.DataFrame) -> Figure:
    """The part of each layer's weights that is kept at every choice of ranks, and its form.

    Args:
        ranks: as ``frontier.choices_table`` gives them.
    """
    table = ranks.assign(part=_part(ranks), letter=ranks.form.map({"channel": "c", "spatial": "s", "whole": ""}))
    rows, columns = list(dict.fromkeys(table.ranks)), list(dict.fromkeys(table.layer))
    part = table.pivot(index="ranks", columns="layer", values="part").loc[rows, columns]
    letter = table.pivot(index="ranks", columns="layer", values="letter").loc[rows, columns]
    figure, axes = plt.subplots(figsize=(1.8 + 0.36 * max(12, len(columns)), 1.6 + 0.34 * len(rows)))
    how = {"fmt": "", "cmap": "cividis", "vmin": 0, "vmax": 1, "linewidths": 0.6, "annot_kws": {"fontsize": 7}}
    bar = {"label": "part of its weights kept", "shrink": 0.9}
    sns.heatmap(part, annot=letter, ax=axes, cbar_kws=bar, **how)
    axes.set_xticks(np.arange(len(columns)) + 0.5, [short(name) for name in columns], rotation=90, fontsize=7)
    axes.set_yticks(np.arange(len(rows)) + 0.5, rows, rotation=0, fontsize=8)
    axes.set(xlabel="", ylabel="")
    return figure


def _part(ranks: pd.DataFrame) -> pd.Series:
    return ranks.weights / (ranks.groups * ranks.m * ranks.n)
