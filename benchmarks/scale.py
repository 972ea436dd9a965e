"""How a rank search gets shorter with workers: the tasks of real searches, scheduled on 1 to 512 of them."""

from __future__ import annotations

import heapq
import time
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import nn

from utilized_rank.networks.evaluation import Labelled, outputs
from utilized_rank.networks.precision import autocast
from utilized_rank.ranks.measure import measure as measured
from utilized_rank.ranks.prediction import handful
from utilized_rank.report.figures import style

from .setting import Setting, cases

TITLE = "Workers: a simulation from real tasks"
EPSILON = 0.5
NETWORKS = ("ResNet-20", "ViT")
LARGE = "ViT-L/16"
BLOCKS = 24
"""Of :data:`LARGE`."""
WORKERS = [2**i for i in range(10)]
NOTE = f"""A layer is a task. What each takes, in passes of the search split through the whole network, is measured at
{EPSILON:g} points: what was asked of the layer (by FLOPs), and one more pass through what comes before it, which a
worker cannot take over from another. A worker's first task takes a pass more, of the unaltered network. A few layers
are searched first, as the others begin where they end; then each task goes to the worker that is free first, those of
the first layers before the others. {LARGE} ({BLOCKS} blocks) is no measurement: each of its layers takes what the layer
of that kind takes at that depth of the small ViT. Sending and starting are not in it."""


def measure(setting: Setting) -> pd.DataFrame:
    """One row a layer: the passes that its search took, and the part of the network that comes before it."""
    rows = []
    for name, its in cases(setting, "ViT"):
        if name not in NETWORKS:
            continue
        network, (inputs, labels) = its.network(name), its.search(its.sizes()[0])
        found = measured(network, Labelled(inputs, labels), its.calibration(), [EPSILON])
        looked = found.evaluations.query("images > 0")
        share = (looked.forwards * len(labels) / looked.images).groupby(looked.layer).first()
        passes, seconds = (found.evaluations.groupby("layer")[column].sum() for column in ("forwards", "seconds"))
        about = {"network": name, "images": len(labels), "pass": _pass(network, inputs)}
        for layer in found.layers.layer:
            took = {"before": 1 - share[layer], "passes": passes[layer], "seconds": seconds[layer]}
            rows.append({"layer": layer, **about, **took})
        print(name, found.evaluations.forwards.sum(), flush=True)
    return pd.DataFrame(rows)


def _pass(network: nn.Module, inputs: torch.Tensor) -> float:
    """Seconds of a pass of the search split."""
    began = time.perf_counter()
    with autocast("auto"):
        outputs(network, inputs, 64)
    return time.perf_counter() - began


def larger(table: pd.DataFrame) -> pd.DataFrame:
    """The tasks of :data:`LARGE`, from those of the small ViT."""
    small = table[table.network == "ViT"]
    blocks = small[small.layer.str.startswith("blocks.")].copy()
    where = blocks.layer.str.extract(r"blocks\.(\d+)\.(.+)")
    blocks["depth"], blocks["kind"] = where[0].astype(int) / where[0].astype(int).max(), where[1]
    depths = np.linspace(0, 1, BLOCKS)
    rows = [small[small.layer.str.startswith("patch_embed")]]
    for block, depth in enumerate(depths):
        for kind, its in blocks.groupby("kind", sort=False):
            values = {column: np.interp(depth, its.depth, its[column]) for column in ("before", "passes")}
            rows.append(pd.DataFrame([{"layer": f"blocks.{block}.{kind}", **values}]))
    rows.append(small[small.layer.str.match(r"head")])
    return pd.concat(rows).assign(network=LARGE)


def schedule(phases: Sequence[Sequence[float]], workers: int, first: float) -> float:
    """When the last task ends, each begun in turn by the worker that is free first.

    Args:
        phases: what each task takes; those of a phase wait for all of the one before.
        workers: how many.
        first: what a worker's first task takes beyond.
    """
    fresh, end = workers, 0.0
    for tasks in phases:
        free = [(end, False)] * (workers - fresh) + [(end, True)] * fresh  # one that has begun before goes first
        for task in tasks:
            when, its_first = heapq.heappop(free)
            fresh -= its_first
            heapq.heappush(free, (when + task + first * its_first, False))
        end = max(when for when, _ in free)
    return end


def makespans(table: pd.DataFrame) -> pd.DataFrame:
    """Passes of the search split until the last layer is done, by network and number of workers."""
    rows = []
    for name, its in pd.concat([table, larger(table)]).groupby("network", sort=False):
        tasks = (its.before + its.passes).tolist()
        few = handful(range(len(tasks)))
        phases = [[tasks[i] for i in few], [task for i, task in enumerate(tasks) if i not in few]]
        for workers in WORKERS:
            passes = schedule(phases, workers, 1)
            rows.append({"network": name, "layers": len(tasks), "workers": workers, "passes": passes})
    found = pd.DataFrame(rows)
    found["times sooner"] = found.groupby("network").passes.transform("first") / found.passes
    return found


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Workers against times."""
    found = makespans(table)
    wide = found.pivot(index="workers", columns="network", values="passes")[[*NETWORKS, LARGE]]
    return wide.round(1).reset_index()


def draw(table: pd.DataFrame) -> Figure:
    """How many times sooner the search ends."""
    figure, axes = plt.subplots(figsize=(6.5, 3.6))
    found = makespans(table)
    for name, its in found.groupby("network", sort=False):
        axes.plot(its.workers, its["times sooner"], "o-", label=f"{name}, {its.layers.iloc[0]} layers")
    axes.plot(WORKERS, WORKERS, ":", color=style.GREY, label="as many times sooner as workers")
    axes.set(xscale="log", yscale="log", xlabel="workers", ylabel="times sooner than one", ylim=(0.9, 200))
    axes.set_xticks(WORKERS, [str(w) for w in WORKERS])
    axes.legend(loc="upper left")
    return figure
