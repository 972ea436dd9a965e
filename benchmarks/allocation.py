"""Budgets by what single layers lose, in three ways: what they take, and what the networks then lose."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from utilized_rank.compression.compressor import Compression
from utilized_rank.networks.evaluation import is_correct
from utilized_rank.networks.intervals import paired_change
from utilized_rank.ranks.measure import inputs_of
from utilized_rank.report.figures import style
from utilized_rank.training import models
from utilized_rank.training.sections import Model

from .setting import Setting, cases

TITLE = "Allocation: what a budget adds up"
WAYS = {"energy": 0, "divergence": 500, "curvature": 128}
"""Losses, and on how many inputs they are taken."""
PARTS = (0.76, 0.7, 0.6, 0.5, 0.4, 0.35)
DEPTHS = (20, 32, 56, 110)
MEASURED_TO = 56
"""Depth up to which losses are measured throughout, too: beyond that it takes too long."""
NOTE = f"""Each layer's form and rank for a budget of parameters, by dynamic programming over losses of single layers:
BALF's energy; the divergence of the predictions, measured at a few ranks of every layer and form on
{WAYS["divergence"]} inputs; and the same from one backward pass, measured where the budget cuts, on
{WAYS["curvature"]} inputs (the default). Moments are not counted, all else is. Left: points lost by compensated
weights, untrained, with paired 95% intervals (public networks on the test images of CIFAR-10, the ViT on digits).
Right: seconds for half of the parameters as networks grow deeper (random weights)."""


def measure(setting: Setting) -> pd.DataFrame:
    """One row a network, way and budget."""
    rows = []
    for name, its in cases(setting, "ViT"):
        network = its.network(name)
        test, labels = its.search(len(its.dataset.splits["search"]))
        before = is_correct(network, test, labels)
        for losses, made, spent in _ways(network, its.calibration(), list(WAYS)):
            for part in PARTS:
                began = time.perf_counter()
                choices = made.within("params", part)
                allocated = time.perf_counter() - began
                small = made.build("compensated", choices).network
                change = paired_change(before, is_correct(small, test, labels))
                row = {"network": name, "losses": losses, "parameters kept": part, "seconds": spent + allocated}
                rows.append(row | {"change": change.points, "low": change.low, "high": change.high})
                spent = 0.0  # what is common to all budgets counts once
                print(rows[-1], flush=True)
    for depth in DEPTHS:
        torch.manual_seed(0)
        network = models.build(
            Model(architecture=f"resnet{depth}"), setting.dataset.shape, len(setting.dataset.classes)
        )
        some = [losses for losses in WAYS if losses != "divergence" or depth <= MEASURED_TO]
        for losses, made, spent in _ways(network.eval(), setting.calibration(), some):
            began = time.perf_counter()
            made.within("params", 0.5)
            seconds = spent + time.perf_counter() - began
            rows.append({"network": f"ResNet-{depth}, random weights", "losses": losses, "depth": depth})
            rows[-1] |= {"parameters kept": 0.5, "seconds": seconds}
            print(rows[-1], flush=True)
    return pd.DataFrame(rows)


def _ways(network: nn.Module, images: Tensor, some: list[str]) -> Iterator[tuple[str, Compression, float]]:
    """Each of some ways, and the seconds that it takes before any budget is asked for."""
    moments = inputs_of(network, images, rows=4).moments
    for losses in some:
        made = Compression(network, moments, images, losses=losses, loss_inputs=WAYS[losses])
        began = time.perf_counter()
        made.budgets("params")
        yield losses, made, time.perf_counter() - began


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Seconds of each way, all budgets together, and points lost at each."""
    rows: list[dict[str, Any]] = []
    for (network, losses), its in table.groupby(["network", "losses"], sort=False):
        lost = {
            f"points at {part:.0%}": change for part, change in zip(its["parameters kept"], its.change, strict=True)
        }
        rows.append({"network": network, "losses": losses, "seconds": its.seconds.sum()} | lost)
    return pd.DataFrame(rows)


def draw(table: pd.DataFrame) -> Figure:
    """Points lost against parameters kept, and seconds against depth."""
    points = table[table.change.notna()]
    networks = points.network.nunique()
    figure, axes = plt.subplots(1, networks + 1, figsize=(3.7 * (networks + 1), 3.4), layout="constrained")
    colours = dict(zip(WAYS, (style.ORANGE, style.BLACK, style.BLUE), strict=True))
    for (name, rows), where in zip(points.groupby("network", sort=False), axes[:-1], strict=True):
        for shift, (losses, its) in enumerate(rows.groupby("losses", sort=False)):
            where.errorbar(
                100 * its["parameters kept"] + 0.5 * (shift - 1),
                its.change,
                yerr=[its.change - its.low, its.high - its.change],
                fmt="o-",
                ms=4,
                lw=1.2,
                capsize=2,
                color=colours[losses],
                label=losses,
            )
        where.set(title=name, xlabel="parameters kept (%)", ylabel="change of accuracy (points)")
        where.invert_xaxis()
    axes[0].legend(loc="lower left")
    for losses, its in table[table.depth.notna()].groupby("losses", sort=False):
        axes[-1].loglog(its.depth, its.seconds, "o-", ms=4, color=colours[losses], label=losses)
    axes[-1].set_xticks(DEPTHS, [str(depth) for depth in DEPTHS])
    axes[-1].minorticks_off()
    axes[-1].set(title="half of the parameters", xlabel="depth of the ResNet (layers)", ylabel="seconds (log scale)")
    return figure
