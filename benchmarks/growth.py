"""Time and peak memory of the rank search as search images and networks grow: a process of its own for each."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from utilized_rank.networks.evaluation import Labelled
from utilized_rank.networks.precision import autocast, resolved
from utilized_rank.ranks.layers import countable
from utilized_rank.ranks.measure import layer_ranks
from utilized_rank.ranks.moments import input_moments
from utilized_rank.ranks.prediction import Guide, Prediction, predictable
from utilized_rank.ranks.projection import bases
from utilized_rank.ranks.trials import Trials, evaluations_table
from utilized_rank.report.figures import style

from .setting import NETWORKS, Setting, setting

TITLE = "Growth: search images, networks, memory"
EPSILON = 0.5
NOTE = f"""The whole search at {EPSILON:g} points, moments and bases not counted. Memory is the peak of the
process during the search, less what it held before (images, network, bases); the budget is what the search may
keep of intermediate values. The largest number of images is the search split and its mirror image. With a
budget of 256 MiB the early layers do not fit: what is over it is computed from the images again."""


def measure(setting: Setting) -> pd.DataFrame:
    """One row a network, number of images and precision."""
    small, middle, large = setting.sizes()
    cases = [("ResNet-20", count, "auto", 2048) for count in (small, middle, large)]
    cases += [("ResNet-20", small, "auto", 256)]
    cases += [(name, small // 2, "auto", 2048) for name in NETWORKS]
    rows = []
    for case in cases:
        command = [sys.executable, "-m", "benchmarks.growth", *map(str, case)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(rows[-1], flush=True)
    return pd.DataFrame(rows)


def one(setting: Setting, name: str, count: int, precision: str, memory: int) -> dict[str, object]:
    """The row of one search."""
    network = setting.network(name)
    inputs, labels = setting.search(count)
    layers = countable(network).layers
    moments = input_moments(network, layers, setting.calibration().split(128))
    subspaces = {layer.name: bases(layer, moments[layer.name], layer.width) for layer in layers}
    del moments
    with autocast(precision):
        network(inputs[:64])
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before, began = _memory("VmRSS"), time.perf_counter()
    trials = Trials(network, Labelled(inputs, labels), memory, precision)
    curvatures = predictable(network, layers, inputs, 128)
    for layer in layers:
        both = subspaces[layer.name]
        layer_ranks(layer, *both, trials, EPSILON, "rank", Guide(Prediction(layer, *both, curvatures[layer.name])))
    seconds = time.perf_counter() - began
    return {
        "network": name,
        "search images": count,
        "precision": resolved(precision),
        "layers": len(layers),
        "seconds": seconds,
        "ms an image": 1000 * seconds / count,
        "forwards, by FLOPs": float(evaluations_table(trials.evaluations).forwards.sum()),
        "peak memory, MiB": _memory("VmHWM") - before,
        "budget, MiB": memory,
    }


def _memory(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def draw(table: pd.DataFrame) -> Figure:
    """Seconds and memory against search images."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4))
    usual = table[table["budget, MiB"] == 2048]
    for (name, precision), rows in usual.groupby(["network", "precision"], sort=False):
        label = f"{name}, {precision}"
        left.plot(rows["search images"], rows.seconds, "o-", label=label)
        right.plot(rows["search images"], rows["peak memory, MiB"], "o-", label=label)
    first = usual.iloc[0]
    ends = [0, usual["search images"].max()]
    left.plot(ends, [x * first["ms an image"] / 1000 for x in ends], ":", color=style.GREY, label="linear")
    right.axhline(2048, ls="--", lw=1.2, color=style.BLACK, label="budget")
    for axes in (left, right):
        axes.locator_params(axis="x", nbins=5)
    left.set(xlabel="search images", ylabel="seconds", ylim=(0, None))
    right.set(xlabel="search images", ylabel="peak memory (MiB)", ylim=(0, None))
    right.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


if __name__ == "__main__":
    name, count, precision, memory = sys.argv[1:]
    print(json.dumps(one(setting(), name, int(count), precision, int(memory))))
