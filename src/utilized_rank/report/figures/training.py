"""Curves of training."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .style import BLACK, BLUE, ORANGE, SERIES


def curve(history: pd.DataFrame) -> Figure:
    """Loss, and accuracy on the search split where it was watched, against epochs."""
    watched = "search_accuracy" in history
    figure, axes = plt.subplots(1, 1 + watched, figsize=(4.2 * (1 + watched), 2.8), squeeze=False)
    axes[0, 0].plot(history.epoch, history.loss, color=BLUE)
    axes[0, 0].set(xlabel="epoch", ylabel="training loss (nats)", title="Loss")
    if watched:
        axes[0, 1].plot(history.epoch, history.search_accuracy, color=ORANGE)
        axes[0, 1].set(xlabel="epoch", ylabel="accuracy, search split (%)", title="Accuracy")
    return figure


def curves(histories: dict[str, pd.DataFrame]) -> Figure:
    """Accuracy on the search split against epochs, one line a network; the dense one is black."""
    figure, axes = plt.subplots(figsize=(6.8, 3.2))
    others = [name for name in histories if name != "dense"]
    for name, history in histories.items():
        number = 0 if name == "dense" else others.index(name)
        colour = BLACK if name == "dense" else SERIES[number % len(SERIES)]
        style = "--" if number >= len(SERIES) else "-"
        axes.plot(history.epoch, history.search_accuracy, style, marker="o", ms=3.5, color=colour, label=name)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="epoch", ylabel="accuracy, search split (%)")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
