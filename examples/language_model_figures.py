"""The figures of the language model: what its layers use, beside networks of images, and what it loses when smaller."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from utilized_rank.report.figures.frontier import METHODS
from utilized_rank.report.figures.style import AMBER, BLACK, BLUE, GREEN, GREY, ORANGE, PINK, SKY

KINDS = {
    "queries, keys, values": (BLUE, "o"),
    "attention output": (ORANGE, "s"),
    "MLP up": (GREEN, "^"),
    "MLP down": (PINK, "D"),
}
"""A colour and a marker for what a layer of a transformer does, block by block."""
ENDS = "patches, head"
"""What lies before the first block and behind the last one."""
NETWORKS = {"VGG11": (AMBER, "v"), "ResNet-20": (SKY, "P")}
MARKERS = {"compensated": "o", "optimal": "^", "svd": "s"}
"""Of each kind of weights, whose colours are those of the studies."""


def utilization(own: pd.DataFrame, others: pd.DataFrame) -> Figure:
    """Utilization over depth: of the language model at each tolerance, of vision transformers, of convolutions.

    Args:
        own: one row a layer and tolerance: kind, block, tolerance, utilization.
        others: one row a layer and network: data, network, kind, block, utilization; all at one point of accuracy.
    """
    is_vit = others.network == "ViT"
    rows = [list(own.groupby("tolerance", sort=False))]
    rows += [list(others[those].groupby("data", sort=False)) for those in (is_vit, ~is_vit)]
    figure, grid = plt.subplots(3, max(map(len, rows)), figsize=(11, 8.8), sharey=True, squeeze=False)
    for line, tables, draw, title, legend in zip(
        grid,
        rows,
        (_transformer, _transformer, _convolutional),
        ("GPT, {}", "ViT, {}", "CNNs, {}"),
        ("language model", *["images, within\n1 point of accuracy"] * 2),
        strict=True,
    ):
        for axes, (name, table) in zip(line, tables, strict=False):
            draw(axes, table)
            axes.set_title(title.format(name), fontsize=10)
        for axes in line[len(tables) :]:
            axes.set_axis_off()
        line[0].set(ylabel="utilization r / min(m, n) (%)", ylim=(0, 102))
        line[-1].legend(*_named(line), loc="center left", bbox_to_anchor=(1.14, 0.5), title=legend, alignment="left")
    return figure


def _transformer(axes: Axes, table: pd.DataFrame) -> None:
    blocks = sorted(table.block.dropna().unique())
    for kind, (colour, marker) in KINDS.items():
        rows = table[table.kind == kind]
        axes.plot(rows.block, 100 * rows.utilization, color=colour, marker=marker, ms=5, label=kind)
    ends = {"patches": blocks[0] - 1, "head": blocks[-1] + 1}
    for kind, place in ends.items():
        rows = table[table.kind == kind]
        axes.plot([place] * len(rows), 100 * rows.utilization, color=GREY, marker="X", ms=7, ls="", label=ENDS)
    there = {kind: place for kind, place in ends.items() if kind in set(table.kind)}
    axes.set_xticks([*there.values(), *blocks], [*there, *blocks])
    _mean(axes, table.utilization.mean(), BLACK)
    axes.set(xlabel="block", xlim=(blocks[0] - 1.4, blocks[-1] + 1.4))


def _convolutional(axes: Axes, table: pd.DataFrame) -> None:
    for network, rows in table.groupby("network", sort=False):
        colour, marker = NETWORKS[str(network)]
        depth = [100 * place / (len(rows) - 1) for place in range(len(rows))]
        axes.plot(depth, 100 * rows.utilization, color=colour, marker=marker, ms=4, label=network)
        mean = rows.utilization.mean()
        _mean(axes, mean, colour, "bottom" if mean > table.utilization.mean() else "top")
    axes.xaxis.set_major_formatter(PercentFormatter(100, decimals=0))
    axes.set(xlabel="depth (% of the layers)")


def _mean(axes: Axes, share: float, colour: str, align: str = "center") -> None:
    axes.axhline(100 * share, color=colour, ls="--", lw=1, label="mean of the layers")
    axes.annotate(
        f"{100 * share:.0f}%",
        (1, 100 * share),
        (3, 0),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        va=align,
        color=colour,
        fontsize=8,
    )


def _named(line: Iterable[Axes]) -> tuple[list[Artist], list[str]]:
    """What is drawn in a line of panels, each once."""
    found = {label: its for axes in line for its, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    return list(found.values()), list(found)


def compression(made: pd.DataFrame) -> Figure:
    """Perplexity against the parameters kept, one line a method, with paired intervals around the whole network's.

    Args:
        made: as the example's ``compression`` gives it.
    """
    whole = made.iloc[0]
    budgets = made[made.asked.str.endswith("of the parameters")]
    figure, axes = plt.subplots(figsize=(7.4, 4.4))
    for method, marker in MARKERS.items():
        rows = budgets[budgets.method == method]
        if len(rows):
            _intervals(axes, rows, whole.perplexity, color=METHODS[method], marker=marker, ls="-", label=method)
    found = made[made.asked.str.startswith("within")]
    label = ", ".join(found.method + ", " + found.asked)
    _intervals(axes, found, whole.perplexity, color=BLACK, marker="*", ms=12, ls="", label=label)
    axes.axhline(whole.perplexity, color=BLACK, lw=1, label=f"the whole network, {made.parameters[0]:,} parameters")
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set(
        xlabel="parameters kept (% of the whole network's)",
        ylabel="perplexity per byte of the test text\n(paired 95% intervals)",
    )
    axes.legend(loc="upper right")
    return figure


def _intervals(axes: Axes, rows: pd.DataFrame, whole: float, **how: Any) -> None:
    low, high = (whole * (1 + rows[side] / 100) for side in ("low", "high"))
    axes.errorbar(
        rows.parameters_kept, rows.perplexity, [rows.perplexity - low, high - rows.perplexity], capsize=3, **how
    )
