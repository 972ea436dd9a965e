"""All of a study at once: its tables by name, and its headline numbers."""

from __future__ import annotations

from typing import Any

import pandas as pd

from ..base.store import Store
from ..study.config import Study
from .settings import settings
from .tables import (
    best,
    by_training,
    compression,
    frontier,
    frontier_seeds,
    methods,
    repeats,
    result,
    rows,
    supervision,
    training_name,
    tuned,
    utilization,
)


def sheets(study: Study, store: Store, record: dict[str, Any], all_steps: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Every table of the report that has rows, by the name of its file.

    Args:
        study: its parameters.
        store: its folders.
        record: the provenance.
        all_steps: as :func:`steps` gives them.
    """
    made = {
        "table1-utilization": utilization(study, store),
        "repeats": repeats(study, store, all_steps),
        "table2-compression": compression(all_steps, best(study)),
        "table3-training": by_training(study, store),
        "table4-methods": methods(all_steps),
        "table5-settings": settings(study, store, record),
        "table6-frontier": frontier(study, store),
        "frontier-seeds": frontier_seeds(study, store),
    }
    return {name: sheet for name, sheet in made.items() if len(sheet)}


def summary(study: Study, store: Store, all_steps: pd.DataFrame) -> dict[str, Any]:
    """The headline numbers of every run: accuracy, MLU, and what is kept and lost after fine-tuning.

    Of a run that has a frontier, too: by weights, choice of ranks and step, of the first seed.
    """
    runs: dict[str, Any] = {}
    how = ", MLU predicted" if study.measure.criterion == "predicted" else ""
    low_rank = tuned(study, all_steps)
    for key in study.runs:
        compressed = {f"{row.epsilon:g}": _kept_and_lost(row) for row in low_rank[low_rank.run == key].itertuples()}
        runs[key] = {
            "label": study.runs[key].label,
            "training": training_name(study, study.runs[key]) + how,
            "supervision": supervision(study, study.runs[key]),
            "test_accuracy": result(store, "train", key)["test_accuracy"],
            "mlu": result(store, "measure", key)["mlu"],
            "finetuned": compressed,
        }
    for key in study.frontier:
        made = rows(store, "frontier", key)
        whole = made[made.form == "original"].iloc[0]
        kept = {"parameters_kept": made.parameters / whole.parameters, "flops_kept": made.flops / whole.flops}
        made = made.assign(**kept)[(made.seed.fillna(0) == 0) & (made.form != "original")]
        of: dict[str, dict[str, Any]] = {method: {} for method in made.method.unique()}
        for row in made.itertuples():
            of[row.method].setdefault(row.ranks, {})[row.form] = _kept_and_lost(row)
        runs[key]["frontier"] = of
    return runs


def _kept_and_lost(row: Any) -> dict[str, float]:
    return {
        name: getattr(row, name) for name in ("parameters_kept", "flops_kept", "change", "change_low", "change_high")
    }
