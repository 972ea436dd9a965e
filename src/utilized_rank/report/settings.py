"""What a study was made with: every parameter, what was looked at, and by what machine."""

from __future__ import annotations

from typing import Any

import pandas as pd

from ..base.store import Store
from ..study.config import Study
from ..study.sections import DEFAULT_EPSILONS
from .tables import SEARCHED, result, searches_test

MACHINE = ("device", "processor", "system", "python", "packages")


def settings(study: Study, store: Store, record: dict[str, Any]) -> pd.DataFrame:
    """Table 5: every parameter by its name in params.yaml, defaults included; what was looked at; and by what.

    Args:
        study: its parameters.
        store: its folders.
        record: the provenance.
    """
    found: dict[str, Any] = {"runs": {key: _looked_at(study, store, key) for key in study.runs}}
    if study.measure.by_default:
        by_default = f"by default {[*DEFAULT_EPSILONS]}, none finer than one search image"
        found["tolerances"] = f"{study.measure.epsilons}: {by_default}"
    found["machine"] = {key: record[key] for key in MACHINE if key in record}
    flat = _flatten(study.model_dump(), "") | _flatten(found, "found: ")
    return pd.DataFrame({"parameter": list(flat), "value": [_text(value) for value in flat.values()]})


def _looked_at(study: Study, store: Store, key: str) -> dict[str, Any]:
    """How many images, evaluations and passes one run's numbers rest on."""
    trained, measured = result(store, "train", key), result(store, "measure", key)
    return {
        "calibration images": measured["calibration_images"],
        "search images": measured["search_images"],
        **({"search split": SEARCHED[study.search_from(key)]} if searches_test(study) else {}),
        "test images": trained["test_images"],
        "evaluations of the rank search": measured["evaluations"],
        "passes of the search split": round(measured["passes_of_the_search_split"], 1),
        "precision of the rank search": measured["search_precision"],
    }


def _flatten(value: dict[str, Any], prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        name = f"{prefix}{key}"
        flat |= _flatten(item, f"{name}.") if isinstance(item, dict) and item else {name: item}
    return flat


def _text(value: Any) -> str:
    return "null" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
