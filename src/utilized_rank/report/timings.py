"""How long networks take, as measured on one machine at one moment: no result of a study."""

from __future__ import annotations

import numpy as np
import pandas as pd

from ..base.files import read_table
from ..base.store import Store
from ..study.config import Study
from ..study.results import Timed
from .tables import METHOD_NAMES, rows


def timings(store: Store, stage: str, key: str) -> pd.DataFrame:
    """How long the low-rank networks took that ``decompose`` or ``frontier`` made of one run, as measured here.

    Columns as in ``decompose.latency``, with method, and epsilon or ranks; empty where nothing was timed here. Results
    may have come from a cache since: times of networks that are not those of the results are left out.
    """
    path = store.data("timings", f"{stage}-{key}.csv")
    if not path.is_file():
        return pd.DataFrame()
    made = rows(store, stage, key)
    of = ["ranks" if "ranks" in made else "epsilon", "method"]
    kept = made[made.form == "decomposed"].assign(kept=made.flops / made[made.form == "original"].flops.iloc[0])
    times = read_table(path, Timed).merge(kept[[*of, "kept"]], on=of)
    return times[np.isclose(times.flops_kept, times.kept)].drop(columns="kept")


def latencies(study: Study, store: Store) -> pd.DataFrame:
    """How long each low-rank network takes beside its original: one row a network, choice of ranks and method."""
    parts = []
    for stage, keys in (("decompose", study.runs), ("frontier", study.frontier)):
        for key in keys:
            timed = timings(store, stage, key)
            if len(timed):
                parts.append(
                    pd.DataFrame(
                        {
                            "network": study.runs[key].label,
                            "ranks": timed.ranks if "ranks" in timed else [f"ε = {e:g}" for e in timed.epsilon],
                            "weights": timed.method.map(METHOD_NAMES),
                            "images at a time": timed.images,
                            "original, ms": 1000 * timed.original,
                            "decomposed, ms": 1000 * timed.decomposed,
                            "time kept %": 100 * timed.decomposed / timed.original,
                            "FLOPs kept %": 100 * timed.flops_kept,
                        }
                    )
                )
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def timed(study: Study, store: Store) -> pd.DataFrame:
    """The frontier's networks before training whose time was taken here: their results, label and time_kept."""
    parts = []
    for key in study.frontier:
        times = timings(store, "frontier", key)
        if len(times):
            times["time_kept"] = times.decomposed / times.original
            made = rows(store, "frontier", key)
            made = made[made.form == "decomposed"].assign(label=study.runs[key].label)
            parts.append(made.merge(times[["ranks", "method", "time_kept"]], on=["ranks", "method"]))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()
