"""Predicted ranks against certified ones, and what the threshold of a tolerance depends on."""

from __future__ import annotations

import math
import time

import matplotlib.pyplot as plt
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import nn

from utilized_rank.networks.evaluation import Labelled, outputs
from utilized_rank.ranks.measure import Measurement
from utilized_rank.ranks.measure import measure as measured
from utilized_rank.ranks.prediction import INPUTS
from utilized_rank.report.figures import style

from .setting import Setting, cases

TITLE = "Prediction: ranks from one backward pass"
EPSILON = 0.5
EPSILONS = [0.25, 0.5, 1.0, 2.0, 4.0]
"""That thresholds are fitted at."""
NOTE = f"""One half of the search images (A) gives certified ranks at {EPSILON:g} points (of the digits, 1), and
predicted ones: from one backward pass over {INPUTS} of them, and verdicts on their probe for a few layers in the
latter half of the network, which fix the divergence up to which a layer passes. The other half (B) gives certified
ranks too: that spread is what the images leave open. Forwards are passes of A by FLOPs, with the first look at A (1),
what is kept of it for later layers (1, or the probe's part) and the backward pass (3 of its images). The threshold is
also fitted at other tolerances. Were a network calibrated, its images evenly spread about the boundary of their two
best classes and the change of its logits small and random, it would be 2ε (ε as a part of 1); with confidences too high
by a temperature T (Guo et al. 2017), 2Tε. Margins and the number of classes do not enter."""


def measure(setting: Setting) -> pd.DataFrame:
    """One row a network, tolerance and layer: certified on each half where that was asked, and predicted."""
    rows: list[dict[str, object]] = []
    for name, its in cases(setting, "VGG11", "ViT"):
        network = its.network(name)
        inputs, labels = its.search(len(its.dataset.splits["search"]))
        half = len(labels) // 2
        a, b = Labelled(inputs[:half], labels[:half]), Labelled(inputs[half:], labels[half:])
        asked = EPSILON if its.name == "cifar10" else 1.0
        found, seconds = {}, {}
        for kind, score, criterion, epsilons in (
            ("A", a, "rank", [asked]),
            ("B", b, "rank", [asked]),
            ("predicted", a, "predicted", [asked]),
            ("thresholds", a, "predicted", [e for e in EPSILONS if e / 100 * half >= 1]),
        ):
            began = time.perf_counter()
            found[kind] = measured(network, score, its.calibration(), epsilons, criterion=criterion)
            seconds[kind] = time.perf_counter() - began
        about = {
            "network": name,
            "data": its.name,
            "classes": len(its.dataset.classes),
            "images": half,
            **temperature_and_margin(network, a),
            **{f"forwards, {kind}": forwards(found[kind], half, kind != "predicted") for kind in ("A", "predicted")},
            **{f"seconds, {kind}": seconds[kind] for kind in ("A", "predicted")},
        }
        predicted = found["predicted"].layers
        wide = predicted[["layer", "m", "n", "k_s", "k_t", "r", "r_low", "r_high"]].assign(epsilon=asked)
        for half_name in ("A", "B"):
            wide[f"r, {half_name}"] = found[half_name].layers.r.to_numpy()
        wide["threshold"] = found["predicted"].thresholds[asked]
        rows += [about | row for row in wide.to_dict("records")]
        rows += [about | {"epsilon": e, "threshold": at} for e, at in found["thresholds"].thresholds.items()]
        print(name, flush=True)
    return pd.DataFrame(rows)


def forwards(found: Measurement, images: int, certified: bool) -> float:
    """Passes of the search images: of the verdicts, and of what comes before them."""
    backward = 3 * min(INPUTS, images) / images
    kept = 1.0 if certified else 0.2
    return float(found.evaluations.forwards.sum()) + 1 + kept + backward


def temperature_and_margin(network: nn.Module, search: Labelled) -> dict[str, float]:
    """What divides the logits for the best likelihood of the labels; and the margins of the two best classes."""
    logits = outputs(network, search.inputs).double()
    best = logits.topk(2).values
    margin = best[:, 0] - best[:, 1]
    grid = torch.linspace(math.log(0.1), math.log(10), 400).exp()
    surprise = torch.stack([nn.functional.cross_entropy(logits / t, search.labels) for t in grid])
    return {
        "temperature": float(grid[surprise.argmin()]),
        "median margin": float(margin.median()),
        "within a margin of 1": float((margin < 1).double().mean()),
    }


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """MLU as certified on each half and as predicted, and what each costs."""
    rows = []
    for name, its in table[table.layer.notna()].groupby("network", sort=False):
        width = its[["m", "n"]].min(axis=1)
        share = {kind: 100 * its[column] / width for kind, column in RANKS.items()}
        first = its.iloc[0]
        rows.append(
            {
                "network": name,
                "ε": first.epsilon,
                "images": int(first.images),
                "MLU % certified, A": share["A"].mean(),
                "certified, B": share["B"].mean(),
                "predicted, A": share["predicted"].mean(),
                "from": share["low"].mean(),
                "to": share["high"].mean(),
                "mean |predicted - A|, points": (share["predicted"] - share["A"]).abs().mean(),
                "mean |B - A|, points": (share["B"] - share["A"]).abs().mean(),
                "A within the range": f"{int(its['r, A'].between(its.r_low, its.r_high).sum())} of {len(its)}",
                "forwards, A": first["forwards, A"],
                "forwards, predicted": first["forwards, predicted"],
                "part of the forwards %": 100 * first["forwards, predicted"] / first["forwards, A"],
                "threshold, nats": first.threshold,
                "2Tε": 2 * first.temperature * first.epsilon / 100,
            }
        )
    return pd.DataFrame(rows)


RANKS = {"A": "r, A", "B": "r, B", "predicted": "r", "low": "r_low", "high": "r_high"}


def draw(table: pd.DataFrame) -> Figure:
    """Layer by layer, predicted against certified; and the threshold against the tolerance and what it is over 2Tε."""
    layers = table[table.layer.notna()]
    names = list(layers.network.unique())
    colours = dict(zip(names, [style.BLUE, style.ORANGE, style.GREEN, style.PINK], strict=False))
    across = math.ceil((len(names) + 2) / 2)
    figure, both = plt.subplots(2, across, figsize=(4 * across, 6.4), layout="constrained")
    grid = both.flat[: len(names) + 2]
    for axes in both.flat[len(names) + 2 :]:
        axes.set_axis_off()
    for axes, name in zip(grid, names, strict=False):
        its = layers[layers.network == name]
        width = its[["m", "n"]].min(axis=1)
        x = range(len(its))
        axes.fill_between(x, 100 * its.r_low / width, 100 * its.r_high / width, color=style.GREY, alpha=0.3, lw=0)
        axes.plot(x, 100 * its["r, A"] / width, "o-", ms=3, color=style.BLACK, label="certified, A")
        axes.plot(x, 100 * its["r, B"] / width, ":", color=style.BLACK, label="certified, B")
        axes.plot(x, 100 * its.r / width, "o-", ms=3, color=colours[name], label="predicted, A")
        axes.set(title=name, xlabel="layer", ylabel="utilization (%)", ylim=(0, 103))
        axes.legend(fontsize=7, loc="upper left")
    fits = table[table.layer.isna()]
    by_tolerance, by_law = grid[-2:]
    for name, its in fits.groupby("network", sort=False):
        tolerated = its.epsilon / 100
        by_tolerance.loglog(its.epsilon, its.threshold, "o-", ms=4, color=colours[name], label=name)
        law = 2 * its.temperature * tolerated
        label = f"T = {its.temperature.iloc[0]:.2f}"
        by_law.semilogx(its.epsilon, its.threshold / law, "o-", ms=4, color=colours[name], label=label)
    by_tolerance.loglog(EPSILONS, [2 * e / 100 for e in EPSILONS], "--", color=style.GREY, label="2ε")
    by_tolerance.set(xlabel="tolerance (points)", ylabel="threshold (nats)")
    by_law.axhline(1, ls="--", color=style.GREY)
    by_law.set(xlabel="tolerance (points)", ylabel="threshold / 2Tε", ylim=(0, None))
    for axes in (by_tolerance, by_law):
        axes.legend(fontsize=7)
        axes.set_xticks(EPSILONS, [f"{epsilon:g}" for epsilon in EPSILONS])
        axes.minorticks_off()
    return figure
