"""The utilized rank of every layer of a network, as one sees it."""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

from ..ranks.moments import Moments

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, GREY = "#0072B2", "#8C8C8C"
"""Of Okabe and Ito 2008: told apart with every kind of colour vision."""


@dataclass(frozen=True)
class Utilization:
    """What :func:`utilized_rank.measure` found: shown as a table, in a terminal and in a notebook."""

    layers: pd.DataFrame
    """One row a layer: layer, shape (of its weight), m, n, groups, weight_rank, k_s, k_t, r, utilization.

    Predicted ranks have a range too: r_low, r_high.
    """
    left_out: dict[str, str]
    """Layers that do not count, and why."""
    moments: dict[str, Moments]
    """Of what flows into each layer."""
    calibration: int
    """Inputs that the moments were taken over."""
    energy: float | None = None
    """The fraction of the variance that is kept, where ranks follow from that."""
    epsilon: float | None = None
    """The tolerated loss of the score, where ranks were searched."""
    score: float | None = None
    """Of the unaltered network: the accuracy in percent, or what the score gave."""
    search: int | None = None
    """Labelled inputs that ranks were searched on."""

    @property
    def mlu(self) -> float:
        """Mean layer utilization: the mean of r / min(m, n) over the layers that count."""
        return float(self.layers.utilization.mean())

    @property
    def predicted(self) -> bool:
        """Whether the ranks are what a search is predicted to find, none of them certified."""
        return "r_low" in self.layers

    @property
    def mlu_range(self) -> tuple[float, float]:
        """The mean layer utilization at the low and at the high end of every predicted rank; twice itself of others."""
        if not self.predicted:
            return self.mlu, self.mlu
        low, high = (float((self.layers[r] / self._width).mean()) for r in ("r_low", "r_high"))
        return low, high

    @property
    def _width(self) -> pd.Series:
        return self.layers[["m", "n"]].min(axis=1)

    def to_frame(self) -> pd.DataFrame:
        """The layers, a copy."""
        return self.layers.copy()

    def record(self) -> dict[str, Any]:
        """All of it but the moments, as JSON takes it."""
        told = ("energy", "epsilon", "score", "search", "calibration", "left_out")
        rows = self.layers.astype(object).where(self.layers.notna(), None).to_dict("records")
        about = {"mlu": self.mlu, "predicted": self.predicted}
        return {**about, **{name: getattr(self, name) for name in told}, "layers": rows}

    def plot(self, axes: Axes | None = None) -> Axes:
        """Draw the utilization of each layer, and its mean; ``axes`` are made where none are given.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
        """
        import matplotlib.pyplot as plt

        if axes is None:
            width = min(16.0, 3 + 0.18 * len(self.layers))
            _, axes = plt.subplots(figsize=(max(6.0, width), 3.6), layout="constrained")
        places = range(len(self.layers))
        axes.bar(places, 100 * self.layers.utilization, color=BLUE, width=0.75)
        if self.predicted:
            low, high = (100 * self.layers[r] / self._width for r in ("r_low", "r_high"))
            axes.vlines(places, low, high, color=GREY, lw=1.2, label="range of the prediction")
        axes.axhline(100 * self.mlu, color=GREY, ls="--", lw=1.2, label=self._mean())
        step = max(1, -(-len(self.layers) // 60))
        axes.set_xticks(list(places)[::step], list(self.layers.layer)[::step], rotation=90, fontsize=7)
        axes.set(ylabel="utilization r / min(m, n) (%)", ylim=(0, 100), xlim=(-0.7, len(self.layers) - 0.3))
        axes.set_title(self._how(), loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), frameon=False)
        return axes

    def _how(self) -> str:
        if self.energy is not None:
            return f"at {self.energy:g} of the variance of {self.calibration:,} inputs"
        unit = "" if self.search is None else f" points of {self.score:.2f}%, on {self.search:,} inputs"
        return f"{'predicted, not certified: ' if self.predicted else ''}within {self.epsilon:g}{unit}"

    def _mean(self) -> str:
        low, high = self.mlu_range
        return f"MLU {self.mlu:.1%}" + (f" ({low:.1%} to {high:.1%})" if self.predicted else "")

    def _shown(self) -> pd.DataFrame:
        shown = self.layers.drop(columns=["m", "n", "groups"]).rename(
            columns={"weight_rank": "rank of W", "k_s": "k_S", "k_t": "k_T", "r_low": "r from", "r_high": "to"}
        )
        return shown.assign(utilization=[f"{100 * share:.1f}%" for share in shown.utilization])

    def _left(self) -> list[str]:
        return [f"{name}: {why}" for name, why in self.left_out.items()]

    def __repr__(self) -> str:
        lines = [self._shown().to_string(index=False), "", f"{self._mean()}, {self._how()}"]
        return "\n".join([*lines, *([f"left out ({len(self.left_out)}):", *self._left()] if self.left_out else [])])

    def _repr_html_(self) -> str:
        left = "".join(f"<li>{html.escape(line)}</li>" for line in self._left())
        left = f"<details><summary>{len(self.left_out)} left out</summary><ul>{left}</ul></details>" if left else ""
        table = self._shown().to_html(index=False, border=0, max_rows=200)
        return f"<p><b>{self._mean()}</b>, {html.escape(self._how())}</p>{table}{left}"
