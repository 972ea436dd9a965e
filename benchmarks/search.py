"""The rank search against plain bisection: same network, images, bases and threads; layer by layer in turns."""

from __future__ import annotations

import time
from dataclasses import asdict

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from utilized_rank.networks.evaluation import Labelled
from utilized_rank.networks.precision import autocast, resolved
from utilized_rank.ranks.layers import Layer, countable
from utilized_rank.ranks.measure import layer_ranks
from utilized_rank.ranks.moments import input_moments
from utilized_rank.ranks.prediction import Guide, Prediction, predictable
from utilized_rank.ranks.projection import bases
from utilized_rank.ranks.rank_search import Ranks
from utilized_rank.ranks.subspaces import Subspace
from utilized_rank.ranks.trials import Trials
from utilized_rank.report.figures import style

from .plain import Plain
from .setting import Setting

TITLE = "Search: plain bisection against ours"
EPSILON, MEMORY, BATCH = 0.5, 2048, 128
PLAIN = {"plain": "float32", "plain, default precision": "auto"}
OURS = {
    "ours, default precision": ("auto", "rank", True),
    "ours": ("float32", "rank", True),
    "ours, no prediction": ("float32", "rank", False),
    "ours, utilized rank only": ("float32", "utilized", True),
}
COLOURS = [style.GREY, style.SKY, style.ORANGE, style.BLUE, style.PINK, style.GREEN]
NOTE = f"""Plain bisection evaluates the whole network on the whole search split for every candidate. Ours gives
certified boundaries too: k passes and k − 1 fails on the whole split. It begins where the curvature of the network
predicts the boundary, which takes a pass forward and back beforehand; without that prediction it bisects by the probe
alone. Layer by layer the searches take turns.
Tolerance {EPSILON:g} points. A forward-equivalent is one pass of the split through the network in the same precision.
Where the ranks differ, passing is not monotone in k and both are boundaries (for the utilized rank alone, compared is
min(k_S, k_T) of each side by itself)."""


class Ours:
    """The package's search, with its seconds."""

    def __init__(self, setting: Setting, images: int, precision: str, criterion: str, predicts: bool) -> None:
        self.criterion, self.precision = criterion, precision
        network = setting.network("ResNet-20")
        layers = countable(network).layers
        self.layers = {layer.name: layer for layer in layers}
        inputs, labels = setting.search(images)
        self.trials = Trials(network, Labelled(inputs, labels), MEMORY, precision)
        self.curvatures = predictable(network, layers, inputs, BATCH) if predicts else {}

    def ranks(self, name: str, s: Subspace, t: Subspace) -> Ranks:
        """Of one layer."""
        layer, g = self.layers[name], self.curvatures.get(name)
        guide = None if g is None else Guide(Prediction(layer, s, t, g))
        return layer_ranks(layer, s, t, self.trials, EPSILON, self.criterion, guide)

    @property
    def evaluations(self) -> int:
        """So far."""
        return len(self.trials.evaluations)


class Bisection:
    """Plain bisection, with its seconds."""

    def __init__(self, setting: Setting, images: int, precision: str) -> None:
        self.precision = precision
        network = setting.network("ResNet-20")
        self.layers = {layer.name: layer for layer in countable(network).layers}
        with autocast(precision):
            began = time.perf_counter()
            self.plain = Plain(network, *setting.search(images))
            self.forward = time.perf_counter() - began

    def ranks(self, name: str, s: Subspace, t: Subspace) -> Ranks:
        """Of one layer."""
        with autocast(self.precision):
            return self.plain.ranks(self.layers[name], s, t, EPSILON)

    @property
    def evaluations(self) -> int:
        """So far."""
        return self.plain.evaluations


def measure(setting: Setting) -> pd.DataFrame:
    """One row a search and layer (the first, without a name, is what comes before any layer)."""
    images = setting.sizes()[0]
    network = setting.network("ResNet-20")
    layers: list[Layer] = countable(network).layers
    moments = input_moments(network, layers, setting.calibration().split(BATCH))
    makers = {name: (lambda p=p: Bisection(setting, images, p)) for name, p in PLAIN.items()}
    makers |= {name: (lambda how=how: Ours(setting, images, *how)) for name, how in OURS.items()}
    searches, rows = {}, []
    for name, make in makers.items():
        began = time.perf_counter()
        searches[name] = make()
        rows.append({"search": name, "layer": "", "seconds": time.perf_counter() - began, "evaluations": 1})
    for layer in layers:
        s, t = bases(layer, moments[layer.name], layer.width)
        for name, search in searches.items():
            before, began = search.evaluations, time.perf_counter()
            ranks = search.ranks(layer.name, s, t)
            seconds = time.perf_counter() - began
            rows.append(
                {
                    "search": name,
                    "layer": layer.name,
                    "m": layer.m,
                    "n": layer.n,
                    **asdict(ranks),
                    "evaluations": search.evaluations - before,
                    "seconds": seconds,
                }
            )
        print(layer.name, flush=True)
    for name, search in searches.items():
        if isinstance(search, Bisection):
            rows.append({"search": name, "layer": "one forward pass", "seconds": search.forward})
    table = pd.DataFrame(rows)
    table["precision"] = table.search.map({name: resolved(search.precision) for name, search in searches.items()})
    table["images"] = images
    return table


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Seconds of each search, against plain bisection in float32 and in the same precision, and whether it agrees."""
    forward = table[table.layer == "one forward pass"].set_index("precision").seconds
    work = table[table.layer != "one forward pass"]
    seconds = work.groupby("search", sort=False).seconds.sum()
    precision = table.groupby("search").precision.first()
    layers = table[table.m.notna()].set_index("layer")
    rows = []
    for name in seconds.index:
        reference = next(plain for plain in PLAIN if precision[plain] == precision[name])
        its, plain = layers[layers.search == name], layers[layers.search == reference]
        if "only" in name:
            least = plain[["k_s_alone", "k_t_alone", "m", "n"]].min(axis=1)
            agree = its.r == least
        else:
            columns = ["k_s", "k_t", "k_s_alone", "k_t_alone", "r"]
            agree = (its[columns] == plain[columns]).all(axis=1)
        rows.append(
            {
                "search": name,
                "precision": precision[name],
                "images": int(table.images.iloc[0]),
                "seconds": seconds[name],
                "times faster than plain, float32": seconds["plain"] / seconds[name],
                "same precision": seconds[reference] / seconds[name],
                "evaluations": int(work[work.search == name].evaluations.sum()),
                "forward-equivalents a layer": seconds[name] / forward[precision[name]] / len(its),
                "layers with the ranks of bisection": f"{int(agree.sum())} of {len(its)}",
            }
        )
    return pd.DataFrame(rows)


def ranks_side_by_side(table: pd.DataFrame) -> pd.DataFrame:
    """The ranks (k_S, k_T) of every search, one row a layer."""
    layers = table[table.m.notna()]
    text = layers.apply(lambda row: f"{row.k_s:.0f}, {row.k_t:.0f}", axis=1)
    wide = layers.assign(ranks=text).pivot(index="layer", columns="search", values="ranks")
    names = list(layers.layer.unique())
    return wide.loc[names, [name for name in [*PLAIN, *OURS] if name in wide]].reset_index()


def draw(table: pd.DataFrame) -> Figure:
    """Total seconds, and seconds layer by layer."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), width_ratios=(1, 1.5))
    totals = summary(table).set_index("search")
    by_name = dict(zip([*PLAIN, *OURS], COLOURS, strict=True))
    colours = {name: by_name[name] for name in totals.index}
    labels = [f"{name}\n({precision})" for name, precision in totals.precision.items()]
    bars = left.barh(labels, totals.seconds, color=list(colours.values()))
    faster = totals["times faster than plain, float32"]
    left.bar_label(
        bars, [f"{s:.0f} s" + (f" ({f:.1f}×)" if f > 1.01 else "") for s, f in zip(totals.seconds, faster, strict=True)]
    )
    left.invert_yaxis()
    left.set(xlabel="seconds, all layers", xlim=(0, 1.25 * totals.seconds.max()))
    left.tick_params(axis="y", labelsize=8)
    left.grid(axis="y", visible=False)
    layers = table[table.m.notna()]
    names = list(layers.layer.unique())
    for name, colour in colours.items():
        rows = layers[layers.search == name]
        right.semilogy(range(len(rows)), rows.seconds, "o-", ms=3.5, color=colour, label=name)
    style.layer_axis(right, [style.short(name) for name in names])
    right.set(ylabel="seconds (log scale)")
    return figure
