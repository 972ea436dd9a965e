"""The study of the committed revision, in a fresh clone: cold, again, and after one change."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from utilized_rank.base.files import read_json
from utilized_rank.report.figures import style

from .setting import ROOT, Setting

TITLE = "Pipeline: the digits study"
CHANGE = "runs.vgg11.finetune.epochs=1"
NOTE = """Wall time in a fresh clone with an empty cache, the environment set up already. Stages: what the executed
notebooks took, by stage, in the cold run; the rest is DVC, and starting the commands."""


def measure(setting: Setting) -> pd.DataFrame:
    """One row a command, and one a stage of the cold run."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder, "clone")
        _call(["git", "clone", "--quiet", str(ROOT), str(clone)], ROOT)
        commands = {
            "cold": ["dvc", "repro", "--no-run-cache"],
            "nothing to do": ["dvc", "repro"],
            "one change": ["dvc", "exp", "run", "-S", CHANGE],
        }
        for name, command in commands.items():
            rows.append({"what": name, "kind": "command", "seconds": _call(command, clone)})
            print(rows[-1], flush=True)
            if name == "cold":
                rows += [
                    {"what": path.stem, "kind": "stage", "seconds": read_json(path)["seconds"]}
                    for path in sorted(clone.glob("data/digits/timings/*.json"))
                ]
    return pd.DataFrame(rows)


def _call(command: list[str], folder: Path) -> float:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    # The clone's own code, whatever copy of the package is installed.
    surroundings = os.environ | {"PATH": path, "PYTHONPATH": str(folder / "src"), "DVC_NO_ANALYTICS": "1"}
    began = time.perf_counter()
    subprocess.run(command, cwd=folder, env=surroundings, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Commands, and stages summed over the runs they are for."""
    stages = table[table.kind == "stage"]
    by_stage = stages.groupby(stages.what.str.split("-").str[0], sort=False).seconds.agg(["sum", "size"])
    commands = table.loc[table.kind == "command", ["what", "seconds"]]
    parts = by_stage.reset_index().set_axis(["what", "seconds", "notebooks"], axis=1)
    parts["what"] = "of cold: " + parts.what
    return pd.concat([commands, parts], ignore_index=True)


def draw(table: pd.DataFrame) -> Figure:
    """The cold run, stage by stage."""
    figure, axes = plt.subplots(figsize=(8, 2.6))
    stages = table[table.kind == "stage"]
    left = 0.0
    names = list(dict.fromkeys(stages.what.str.split("-").str[0]))
    for name, colour in zip(names, [*style.SERIES, style.GREY, style.BLACK], strict=False):
        seconds = stages[stages.what.str.split("-").str[0] == name].seconds.sum()
        axes.barh(["cold"], [seconds], left=left, color=colour, label=f"{name}, {seconds:.0f} s")
        left += seconds
    total = float(table[table.what == "cold"].seconds.iloc[0])
    axes.barh(["cold"], [total - left], left=left, color="#DDDDDD", label=f"DVC and starting, {total - left:.0f} s")
    for name in ("one change", "nothing to do"):
        seconds = float(table[table.what == name].seconds.iloc[0])
        bars = axes.barh([name], [seconds], color=style.GREY)
        axes.bar_label(bars, fmt="%.0f s", padding=3)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set(xlabel="seconds")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    return figure
