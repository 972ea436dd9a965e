"""What the pictures that answer show: one row a mark, where it stands, and in words what it is."""

from __future__ import annotations

from typing import Any

import pandas as pd

from ..base.store import Store
from .figures.style import short
from .tables import METHOD_NAMES, rows

BUDGET = "budget"
"""In place of a tolerance, of ranks that a budget gives."""
BEFORE, AFTER = "before training", "fine-tuned"


def layers(store: Store, labels: dict[str, str]) -> pd.DataFrame:
    """One row a network, tolerance and layer.

    Columns for the picture: network, tolerance (text), place (a layer's short name), used (percent) and depth (from 0,
    the first layer, to 1); the others are words, of :data:`LAYER_WORDS`.
    """
    parts = []
    for key, label in labels.items():
        table = rows(store, "measure", key)
        number = table.groupby("epsilon").cumcount()
        parts.append(
            pd.DataFrame(
                {
                    "network": label,
                    "tolerance": [f"{epsilon:g}" for epsilon in table.epsilon],
                    "place": table.layer.map(short),
                    "used": (100 * table.utilization).round(2),
                    "depth": (number / max(number.max(), 1)).round(3),
                    "layer": table.layer,
                    "shape": [_shape(row) for row in table.itertuples()],
                    "k_S": table.k_s.map(str),
                    "k_T": table.k_t.map(str),
                    "r": [f"{row.r} of {min(row.m, row.n)}{_range(row)}" for row in table.itertuples()],
                    "utilization": (100 * table.utilization).map("{:.1f}%".format),
                    "ε": table.epsilon.map("{:g} points".format),
                }
            )
        )
    return pd.concat(parts, ignore_index=True)


LAYER_WORDS = ["network", "layer", "shape", "k_S", "k_T", "r", "utilization", "ε"]


def _range(row: Any) -> str:
    return f", predicted ({row.r_low} to {row.r_high})" if hasattr(row, "r_low") else ""


def _shape(row: object) -> str:
    groups = f", {row.groups} groups" if row.groups > 1 else ""  # type: ignore[attr-defined]
    return f"{row.m} × {row.n}{groups}"  # type: ignore[attr-defined]


def networks(store: Store, labels: dict[str, str]) -> pd.DataFrame:
    """One row a network that was made smaller, of the first seed; and the dense one, trained on alike.

    Columns for the picture: network, method, tolerance (text, or :data:`BUDGET`), kind (how ranks were chosen),
    parameters and flops (percent kept), change, low, high; the others are words, of :data:`NETWORK_WORDS`. Method and
    tolerance of the dense network are empty.
    """
    return pd.concat([_made(store, key, label) for key, label in labels.items()], ignore_index=True)


NETWORK_WORDS = ["network", "weights", "ranks", "step", "accuracy", "change of accuracy", "95% interval"]
NETWORK_WORDS += ["parameters kept", "FLOPs kept", "listed in"]


def _made(store: Store, key: str, label: str) -> pd.DataFrame:
    each = pd.concat([rows(store, "decompose", key), rows(store, "finetune", key)], ignore_index=True)
    each["ranks"] = ["all" if pd.isna(epsilon) else f"independent-{epsilon:g}" for epsilon in each.epsilon]
    each["listed in"] = ["Table 2" if method == "dense" else "Table 4" for method in each.method]
    made = each
    if store.report("results", f"frontier-{key}.csv").is_file():
        frontier = rows(store, "frontier", key)
        made = pd.concat([each, frontier[frontier.seed.fillna(0) == 0].assign(**{"listed in": "Table 6"})])
    original = made[made.form == "original"].iloc[0]
    shown = made[made.form.isin(["decomposed", "fine-tuned"])]
    dense = shown.method == "dense"
    kind = shown.ranks.str.partition("-")
    parameters, flops = 100 * shown.parameters / original.parameters, 100 * shown.flops / original.flops
    return pd.DataFrame(
        {
            "network": label,
            "method": shown.method.mask(dense, None),
            "tolerance": kind[2].where(kind[0].isin(["independent", "cumulative", "joint"]), BUDGET).mask(dense, None),
            "kind": kind[0],
            "parameters": parameters.round(3),
            "flops": flops.round(3),
            "change": shown.change.round(3),
            "low": shown.change_low.round(3),
            "high": shown.change_high.round(3),
            "weights": shown.method.map(METHOD_NAMES),
            "ranks": shown.ranks,
            "step": shown.form.map({"decomposed": BEFORE, "fine-tuned": AFTER}),
            "accuracy": shown.accuracy.map("{:.2f}%".format),
            "change of accuracy": shown.change.map("{:+.2f} points".format),
            "95% interval": [f"[{row.change_low:+.2f}, {row.change_high:+.2f}]" for row in shown.itertuples()],
            "parameters kept": parameters.map("{:.1f}%".format),
            "FLOPs kept": flops.map("{:.1f}%".format),
            "listed in": shown["listed in"],
        }
    ).sort_values("parameters", kind="stable")
