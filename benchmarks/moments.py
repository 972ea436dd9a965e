"""The moment pass against a plain forward pass, and how far the ranks move when it takes fewer rows."""

from __future__ import annotations

import time
from collections.abc import Callable

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from utilized_rank.networks.evaluation import Labelled
from utilized_rank.ranks.layers import countable
from utilized_rank.ranks.measure import layer_ranks
from utilized_rank.ranks.moments import FEWEST, Budget, Moments, input_moments
from utilized_rank.ranks.projection import bases
from utilized_rank.ranks.subspaces import energy_rank
from utilized_rank.ranks.trials import Trials
from utilized_rank.report.figures import style
from utilized_rank.study.sections import Measure

from .setting import CALIBRATION, NETWORKS, Setting

TITLE = "Moments: a plain forward pass, the exact pass, the budget"
EPSILON, BATCH, MANY = 0.5, 128, 5
ROWS = Measure.model_fields["rows"].default
SEARCHED = {"ResNet-20": 5000}
NOTE = f"""Ratios are to a plain forward pass over the same {CALIBRATION:,} images. The budget is the default: {ROWS}
rows a dimension, {FEWEST} images at least. Moved: how far k_S, k_T or r of a layer at {EPSILON:g} points lies from the
exact pass, in per cent of min(m, n), and in how many layers any of them differs; beside it, the same for an exact
pass over other images of the same number, which is what a choice of calibration images alone moves. Energy: the same
for k at 99% of the energy. Error: of the products in float32, against the same network in float64, over the largest."""


def measure(setting: Setting) -> pd.DataFrame:
    """One row a network and way of taking moments."""
    rows = []
    images = setting.calibration()
    few = Budget(ROWS, len(images))
    others = setting.dataset.inputs("train")[CALIBRATION : 2 * CALIBRATION]
    others = others.contiguous(memory_format=torch.channels_last)
    for name in NETWORKS:
        network = setting.network(name)
        layers = countable(network).layers
        forward = _fastest(lambda n=network: _forward(n, images))
        passes: dict[str, Callable[[], dict[str, Moments]]] = {
            "exact": lambda n=network, ls=layers: input_moments(n, ls, images.split(BATCH)),
            "budget": lambda n=network, ls=layers: input_moments(n, ls, images.split(BATCH), few),
            "other images": lambda n=network, ls=layers: input_moments(n, ls, others.split(BATCH)),
        }
        exact: pd.DataFrame | None = None
        for way, take in passes.items():
            moments = take()
            seconds = _fastest(take) if way != "other images" else float("nan")
            ranks = _ranks(setting, network, moments, SEARCHED.get(name))
            exact = ranks if exact is None else exact
            moved = (ranks - exact).abs().drop(columns="width").div(exact.width, axis=0) * 100
            searched, energy = moved.filter(regex="^k_s|^k_t|^r"), moved.filter(like="energy")
            rows.append(
                {
                    "network": name,
                    "moments": way,
                    "forward, s": forward,
                    "seconds": seconds,
                    "ratio to forward": seconds / forward,
                    "layers": len(layers),
                    "layers moved": int((searched > 0).any(axis=1).sum()) if len(searched.columns) else np.nan,
                    "moved, mean %": searched.to_numpy().mean() if len(searched.columns) else np.nan,
                    "moved, max %": searched.to_numpy().max() if len(searched.columns) else np.nan,
                    "energy moved, max %": energy.to_numpy().max(),
                    "error of products": _error(network, images[:256]) if way == "exact" else np.nan,
                }
            )
            print(rows[-1], flush=True)
        many = setting.dataset.inputs("train")[: MANY * CALIBRATION].contiguous(memory_format=torch.channels_last)
        forward = _fastest(lambda n=network, m=many: _forward(n, m), 1)
        plenty = Budget(ROWS, len(many))
        seconds = _fastest(lambda n=network, ls=layers, m=many, b=plenty: input_moments(n, ls, m.split(BATCH), b), 1)
        rows.append(
            {
                "network": name,
                "moments": f"budget, {MANY} times the images",
                "forward, s": forward,
                "seconds": seconds,
                "ratio to forward": seconds / forward,
                "layers": len(layers),
            }
        )
    return pd.DataFrame(rows)


@torch.inference_mode()
def _forward(network: nn.Module, images: Tensor) -> None:
    for batch in images.split(BATCH):
        network(batch)


def _fastest(run: Callable[[], object], times: int = 2) -> float:
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def _ranks(setting: Setting, network: nn.Module, moments: dict[str, Moments], searched: int | None) -> pd.DataFrame:
    """Every rank of every layer: at the tolerance where it is searched, and at 99% of the energy."""
    trials = None if searched is None else Trials(network, Labelled(*setting.search(searched)), 2048, "auto")
    rows = []
    for layer in countable(network).layers:
        s, t = bases(layer, moments[layer.name], layer.width)
        row = {"layer": layer.name, "width": layer.width}
        if trials is not None:
            ranks = layer_ranks(layer, s, t, trials, EPSILON, "rank")
            row |= {"k_s": min(ranks.k_s_alone, layer.width), "k_t": min(ranks.k_t_alone, layer.width), "r": ranks.r}
        total = moments[layer.name].second[0].trace()
        kept = s.values[0].cumsum(0) / total
        row["energy_s"] = min(int((kept < 0.99).sum()) + 1, layer.width)
        row["energy_t"] = energy_rank(t.values, 0.99)
        rows.append(row)
    return pd.DataFrame(rows).set_index("layer")


def _error(network: nn.Module, images: Tensor) -> float:
    """The largest error of any product, over the largest product of its layer."""
    single = input_moments(network, countable(network).layers, images.split(BATCH))
    double = network.double()
    exact = input_moments(double, countable(double).layers, images.double().split(BATCH))
    network.float()
    errors = [(single[n].products - m.products).abs().max() / m.products.abs().max() for n, m in exact.items()]
    return float(max(errors))


def draw(table: pd.DataFrame) -> Figure:
    """The ratio of each pass to a plain forward pass."""
    figure, axes = plt.subplots(figsize=(7, 2.8))
    names = list(table.network.unique())
    for offset, (way, colour) in zip((-0.2, 0.2), (("exact", style.BLUE), ("budget", style.ORANGE)), strict=True):
        rows = table[table.moments == way]
        bars = axes.barh(
            [i + offset for i in range(len(rows))], rows["ratio to forward"], 0.36, color=colour, label=way
        )
        axes.bar_label(bars, fmt="%.2f×", padding=3)
    axes.axvline(1, color=style.BLACK, lw=1.2, ls="--", label="plain forward pass")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set(xlabel="time, over that of a plain forward pass", xlim=(0, 1.2 * table["ratio to forward"].max()))
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
