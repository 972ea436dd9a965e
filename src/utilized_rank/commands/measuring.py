"""The commands ``measure`` and ``compare``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import torch
from torch import nn

from ..api.folders import check_free, new_folder
from ..api.measuring import measure as measured
from ..base.files import read_json, read_table, write_json, write_table
from ..base.sections import StudyError
from ..networks.batches import Batches
from ..networks.evaluation import Labelled, features, received
from ..networks.precision import Precision
from ..ranks.measure import Criterion
from ..ranks.subspaces import effective_rank
from ..report.figures import style
from ..report.figures.layers import utilizations
from ..training.models import classifier
from .folder import images, provenance
from .models import check_classes, named

RECORD, TABLE, FIGURE = "utilization.json", "utilization.csv", "utilization.svg"


def measure(
    model: str,
    folder: Path,
    checkpoint: Path | None,
    out: Path | None,
    device: torch.device,
    prepared: dict[str, Any],
    epsilon: float | None,
    energy: float | None,
    calibration: int,
    held_out: int,
    criterion: Criterion,
    precision: Precision,
) -> str:
    """Measure a named network on a folder of images; returns what the terminal shows.

    Raises:
        StudyError: what was named cannot be measured.
        InputError: likewise.
    """
    if out is not None:
        check_free(out)
    its = named(model, checkpoint, prepared)
    how = its.preparation
    held_out = 0 if epsilon is None else held_out
    dataset = images(folder, how, device, train=calibration, held_out=held_out, halves=False)
    network, inputs = its.network.to(device), dataset.inputs("train")
    search = None
    if epsilon is not None:
        check_classes(its, dataset.classes, folder)
        search = Labelled(dataset.inputs("search"), dataset.labels("search"))
    found = measured(network, search, inputs, epsilon=epsilon, energy=energy, criterion=criterion, precision=precision)
    rank_me = _rank_me(network, inputs)
    lines = [repr(found), *([] if rank_me is None else [f"RankMe of the features: {rank_me:.1f}"])]
    if out is not None:
        style.use()
        about = provenance(model, checkpoint, folder, how, device)
        with new_folder(out) as partial:
            write_json(partial / RECORD, found.record() | {"rank_me": rank_me, "provenance": about})
            write_table(partial / TABLE, found.layers)
            style.save(utilizations({its.name: found.layers}), partial / FIGURE)
        lines.append(f"written: {out}")
    return "\n".join(lines)


def _rank_me(network: nn.Module, inputs: Batches) -> float | None:
    """RankMe of what flows into the classifier; None where that is not one vector an image, or zero."""
    try:
        head = classifier(network)
    except StudyError:
        return None
    if not received(network, [head], inputs[:1]):  # a part that inputs do not reach
        return None
    seen = features(network, head, inputs)
    found = effective_rank(seen) if seen.ndim == 2 and len(seen) == len(inputs) else math.nan
    return found if math.isfinite(found) else None


def compare(first: Path, second: Path, out: Path | None) -> str:
    """Two networks that were measured, side by side; returns what the terminal shows.

    Args:
        first: a folder that ``measure --out`` wrote.
        second: another.
        out: of the figure, an SVG file; none where it is None.

    Raises:
        StudyError: a folder is none of these, or both are one.
    """
    records = [_record(folder) for folder in (first, second)]
    if first.resolve() == second.resolve():
        raise StudyError(f"{first} and {second} are one folder: name two")
    names = (first.name, second.name) if first.name != second.name else (first, second)
    labels = [f"{name}: {of['provenance']['model']}" for name, of in zip(names, records, strict=True)]
    tables = dict(zip(labels, (read_table(folder / TABLE) for folder in (first, second)), strict=True))
    summary = pd.DataFrame(
        {
            label: {
                "MLU": f"{record['mlu']:.1%}",
                "at": _at(record),
                "layers": str(len(table)),
                "RankMe": "" if record["rank_me"] is None else f"{record['rank_me']:.1f}",
            }
            for (label, table), record in zip(tables.items(), records, strict=True)
        }
    )
    shown = [summary.to_string()]
    one, other = tables.values()
    if list(one.layer) == list(other.layer):
        columns = {label: table.utilization.map("{:.1%}".format) for label, table in tables.items()}
        difference = (other.utilization - one.utilization).map("{:+.1%}".format)
        shown += ["", pd.DataFrame({"layer": one.layer, **columns, "difference": difference}).to_string(index=False)]
    if _at(records[0]) != _at(records[1]):
        shown += ["", "They were measured at different tolerances, or one is predicted: their MLUs do not compare."]
    if out is not None:
        style.use()
        style.save(utilizations(tables), out)
        shown.append(f"written: {out}")
    plt.close("all")
    return "\n".join(shown)


def _at(record: dict[str, Any]) -> str:
    if record["epsilon"] is None:
        return f"energy {record['energy']:g}"
    return f"ε = {record['epsilon']:g}{', predicted' if record.get('predicted') else ''}"


def _record(folder: Path) -> dict[str, Any]:
    if not (folder / RECORD).is_file() or not (folder / TABLE).is_file():
        raise StudyError(
            f"{folder} has no {RECORD} and {TABLE}, as `utilized-rank measure MODEL --out {folder}` writes"
        )
    found = read_json(folder / RECORD)
    if not isinstance(found, dict) or not {"mlu", "energy", "epsilon", "rank_me", "provenance"} <= found.keys():
        raise StudyError(f"{folder / RECORD} is none that `utilized-rank measure` wrote")
    return found
