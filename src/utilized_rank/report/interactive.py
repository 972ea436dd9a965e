"""Pictures that answer: a page's charts, what may be chosen of each, and the library that draws them, once."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pandas as pd
import vl_convert

from ..base.store import Store
from . import charts, points
from .figures.style import epsilon_label
from .points import AFTER, BEFORE, BUDGET, LAYER_WORDS, NETWORK_WORDS
from .tables import METHOD_NAMES

SECURITY = "script-src 'unsafe-inline'; connect-src 'none'; object-src 'none'; base-uri 'none'"
"""What a page may do: run the scripts that stand in it, without ``eval``, and load nothing more."""


@dataclass(frozen=True)
class Choice:
    """One thing that is chosen of a chart."""

    name: str
    """The column that it filters; or else a signal of the chart."""
    label: str
    values: dict[str, str]
    """What may be chosen, in words; an empty value takes every row."""
    chosen: str
    """At first."""
    signal: bool = False


@dataclass(frozen=True)
class Chart:
    """One picture that answers."""

    name: str
    title: str
    caption: str
    rows: pd.DataFrame
    words: list[str]
    """The columns that are told of a mark, and that stand in the table."""
    choices: list[Choice]
    spec: dict[str, Any]

    def content(self) -> str:
        """Its rows and specification as JSON that can stand in a page."""
        shown = self.rows.astype(object).where(self.rows.notna(), None)
        content = {"columns": list(shown), "rows": shown.to_numpy().tolist(), "words": self.words, "spec": self.spec}
        # In a script's text, "<" could begin its end.
        text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
        return text.replace("<", "\\u003c")


@cache
def library() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script, from the package: nothing is loaded by the page."""
    bundle = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    return "(() => {" + bundle.replace("</script", "<\\/script") + "\n})();"


def of_study(store: Store, labels: dict[str, str], epsilon: float) -> list[Chart]:
    """The charts of one study's page; at first they show a network that has a frontier, if one has.

    Args:
        store: its folders.
        labels: of its runs, by key.
        epsilon: the tolerance at which networks stand beside one another at first.
    """
    networks = points.networks(store, labels)
    beyond = networks.network[networks["listed in"] == "Table 6"]
    return _charts(points.layers(store, labels), networks, epsilon, next(iter(beyond), next(iter(labels.values()))))


def of_studies(studies: dict[str, tuple[Store, dict[str, str]]]) -> list[Chart]:
    """The charts of all studies together: of each by its title its folders, and the labels of its runs by key."""

    def together(table: Callable[[Store, dict[str, str]], pd.DataFrame]) -> pd.DataFrame:
        parts = []
        for title, (store, labels) in studies.items():
            named = {key: f"{title}: {label}" for key, label in labels.items()}
            parts.append(table(store, named).assign(study=title))
        return pd.concat(parts, ignore_index=True)

    layers = together(points.layers)
    epsilons = sorted(layers.tolerance.astype(float).unique())
    return _charts(layers, together(points.networks), epsilons[len(epsilons) // 2], layers.network[0])


def _charts(layers: pd.DataFrame, networks: pd.DataFrame, epsilon: float, network: str) -> list[Chart]:
    """Of one study, or of several where the rows have a column ``study``."""
    several = "study" in layers
    studies = _each(layers.study) if several else {}
    first = next(iter(studies), "")
    one = [Choice("study", "Study", studies, first)] if several else []
    any_of = [Choice("study", "Study", {"": "all"} | studies, "")] if several else []
    tolerances = _tolerances(layers.tolerance)
    names = _each(layers.network)
    methods = {method: METHOD_NAMES[method] for method in _each(networks.method.dropna())}
    ranks = _tolerances(networks.tolerance.dropna())
    costs = {"parameters": "parameters", "flops": "FLOPs"}
    return [
        Chart(
            "layers",
            "Layer by layer",
            "The part of each layer's rank that the network needs; dashed, its mean, the MLU.",
            layers,
            LAYER_WORDS,
            [
                *one,
                Choice("network", "Network", names, network),
                Choice("tolerance", "Tolerance", {"": "all"} | tolerances, ""),
            ],
            charts.utilization(layers),
        ),
        Chart(
            "spread",
            "Network by network",
            "Every layer of every network, coloured from the first to the last; the bar is their mean, the MLU.",
            layers,
            LAYER_WORDS,
            [*any_of, Choice("tolerance", "Tolerance", tolerances, f"{epsilon:g}")],
            charts.spread(layers),
        ),
        Chart(
            "frontier",
            "What it saves, and what it costs",
            "Change of test accuracy with its paired 95% interval against what is kept; hollow before training, full "
            "after it. The vertical axis is linear near zero and logarithmic beyond a point.",
            networks,
            NETWORK_WORDS,
            [
                *any_of,
                Choice("network", "Network", {"": "all"} | names, "" if several else network),
                Choice("method", "Weights", {"": "all"} | methods, "optimal" if several else ""),
                Choice("tolerance", "Ranks", {"": "all"} | ranks, ""),
                Choice("step", "Step", {"": "both", BEFORE: BEFORE, AFTER: AFTER}, AFTER if several else ""),
                Choice("cost", "Kept", costs, "parameters", signal=True),
            ],
            charts.frontier(networks),
        ),
    ]


def _each(column: pd.Series) -> dict[str, str]:
    return {value: value for value in column.unique()}


def _tolerances(column: pd.Series) -> dict[str, str]:
    """Tolerances in their order, then budgets."""
    found = sorted((value for value in column.unique() if value != BUDGET), key=float)
    budgets = {BUDGET: "from a budget"} if BUDGET in set(column) else {}
    return {value: epsilon_label(float(value)) for value in found} | budgets
