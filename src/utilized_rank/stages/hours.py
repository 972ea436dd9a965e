"""How long forward passes take on a device: from a benchmark of it, or from a few that are timed here and now."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import torch

from ..base import runtime
from ..base.files import read_table
from ..base.sections import StudyError
from ..networks import cost
from ..networks.evaluation import BATCH
from ..study.config import Study
from ..study.results import Result
from ..training import models
from ..training.sections import Model
from .plan import Scale

BENCHMARK = Path("reports", "benchmarks", "gpu.csv")
SECONDS = 0.25
"""That a pass of a batch takes at least, before it tells a rate."""


class Speed(Result):
    """A row of the benchmark; only plain forward passes have FLOPs a second."""

    device: str
    kind: str
    network: str
    work: str
    images: int | None = None
    seconds: float | None = None
    images_a_second: float | None = None
    ratio: float | None = None
    flops_a_second: float | None
    peak_mib: float | None = None


def rates(study: Study, scale: Scale, asked: str, root: Path) -> tuple[dict[Model, float], str]:
    """How many images a second each architecture of a study takes on a device, and how that is known.

    Args:
        study: its parameters.
        scale: of its images.
        asked: the device, as of :func:`utilized_rank.base.runtime.device`.
        root: the project's root, where a benchmark may lie.

    Raises:
        StudyError: the device is not here, and no benchmark of its kind is.
    """
    every = {made.model for made in study.pretrained.values()} | {run.model for run in study.runs.values()}
    speeds = _benchmarked(root / BENCHMARK)
    try:
        device = runtime.device(asked)
        name = runtime.device_name(device)
    except StudyError as error:
        name = next((name for name, kind in speeds.index if kind == asked.partition(":")[0]), "")
        if not name:
            raise StudyError(
                f"{error}; and no benchmark of one is here: `make bench ONLY=gpu` on a machine that has it writes "
                f"{BENCHMARK}"
            ) from None
        device = torch.device("cpu")
    known = speeds[speeds.index.get_level_values("device") == name]
    if len(known):
        flops = {model: _flops(model, scale) for model in every}
        return {model: float(known.iloc[0]) / flops[model] for model in every}, f"the benchmark of {name}"
    torch.set_num_threads(study.threads)
    return {model: _timed(model, scale, device) for model in every}, f"passes that were timed on {name}"


def _benchmarked(path: Path) -> pd.Series:
    """FLOPs a second of plain forward passes, by the name and kind of the device: the mean over networks."""
    if not path.is_file():
        empty = pd.MultiIndex.from_tuples([], names=["device", "kind"])
        return pd.Series([], index=empty, dtype=float)
    table = read_table(path, Speed)
    return table[table.work == "forward"].groupby(["device", "kind"]).flops_a_second.mean()


def _flops(model: Model, scale: Scale) -> int:
    with torch.device("meta"):
        network = models.build(model, scale.shape, scale.classes).eval()
        return cost.flops(network, torch.empty(1, *scale.shape))


def _timed(model: Model, scale: Scale, device: torch.device) -> float:
    network = models.build(model, scale.shape, scale.classes).eval().to(device)
    count = 1
    while True:
        (seconds,) = cost.latencies([network], torch.randn(count, *scale.shape, device=device), 0)
        if seconds >= SECONDS or count >= BATCH:
            return count / seconds
        count = min(BATCH, 4 * count)


def with_hours(table: pd.DataFrame, study: Study, its: dict[Model, float]) -> pd.DataFrame:
    """The plan of a study with one column more: hours, of forward passes alone."""
    of = {("pretrain", name): made.model for name, made in study.pretrained.items()}
    of |= {(stage, name): run.model for name, run in study.runs.items() for stage in table.stage.unique()}
    seconds = [row.passes / its[of[row.stage, row.run]] if row.passes else 0.0 for row in table.itertuples()]
    return table.assign(hours=[value / 3600 for value in seconds])
