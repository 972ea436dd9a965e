"""How every figure looks, and how it is saved: vector, colour-blind-safe, the same bytes each time."""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib as mpl
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from ...base.files import whole

# Okabe and Ito 2008: told apart with every kind of colour vision, and in print.
BLUE, ORANGE, GREEN, PINK = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
SKY, AMBER, GREY, BLACK = "#56B4E9", "#E69F00", "#8C8C8C", "#222222"
SERIES = [BLUE, ORANGE, GREEN, PINK, SKY, AMBER]
SVG = {"Date": None, "Creator": None}


def use() -> None:
    """Apply the style to all figures of this process (and to a notebook's inline pictures)."""
    mpl.rcParams.update(
        {
            "svg.hashsalt": "utilized-rank",
            "axes.prop_cycle": cycler(color=SERIES),
            "font.family": "DejaVu Sans",
            "text.color": BLACK,
            "axes.labelcolor": BLACK,
            "xtick.color": "#444444",
            "ytick.color": "#444444",
            "figure.constrained_layout.use": True,
            "font.size": 10,
            "axes.labelsize": 10,
            "axes.titlesize": 11,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "xtick.labelsize": 9,
            "ytick.labelsize": 9,
            "legend.fontsize": 9,
            "legend.frameon": False,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.color": "#E6E6E6",
            "grid.linewidth": 0.7,
            "axes.edgecolor": "#555555",
            "axes.axisbelow": True,
            "lines.linewidth": 1.8,
        }
    )
    try:
        from IPython import get_ipython
        from matplotlib_inline.backend_inline import set_matplotlib_formats
    except ImportError:
        return
    if get_ipython() is not None:
        set_matplotlib_formats("svg", metadata=SVG)


def epsilon_colours(epsilons: list[float]) -> dict[float, str]:
    """One colour for each epsilon, the same in all figures of a study."""
    many = [to_hex(colour) for colour in mpl.colormaps["viridis"](np.linspace(0, 0.95, len(epsilons)))]
    return dict(zip(sorted(epsilons), SERIES if len(epsilons) <= len(SERIES) else many, strict=False))


def epsilon_label(epsilon: float) -> str:
    """How an epsilon is written in legends."""
    return f"ε = {epsilon:g} points"


def layer_axis(axes: Axes, names: list[str]) -> None:
    """Label the horizontal axis with layers, in order; thinned out where there are many."""
    step = max(1, -(-len(names) // 24))
    axes.set_xticks(range(0, len(names), step), names[::step], rotation=90, fontsize=7)
    axes.set_xlim(-0.7, len(names) - 0.3)
    axes.grid(axis="x", visible=False)


def short(layer: str) -> str:
    """A layer's name without what all layers of its kind share."""
    for long, brief in (("features.", ""), ("blocks.", ""), ("layer", ""), ("patch_embed.proj", "patch")):
        layer = layer.replace(long, brief)
    return layer


def save(figure: Figure, path: Path) -> Figure:
    """Write ``figure`` as SVG, and give it back to be shown."""
    with whole(path) as partial:
        figure.savefig(partial, format="svg", metadata=SVG)
    return figure


def markup(figure: Figure) -> str:
    """``figure`` as SVG to stand in a page."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata=SVG)
    return text.getvalue()[text.getvalue().index("<svg") :]
