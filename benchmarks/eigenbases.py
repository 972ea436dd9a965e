"""The leading eigenvectors of large second moments against all of them."""

from __future__ import annotations

import time

import matplotlib.pyplot as plt
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from utilized_rank.ranks.layers import countable
from utilized_rank.ranks.moments import input_moments
from utilized_rank.ranks.subspaces import principal
from utilized_rank.report.figures import style

from .setting import SEED, Setting

TITLE = "Eigenbases: the leading eigenvectors against all of them"
NOTE = """All eigenvectors are torch.linalg.eigh in float64. The moments of VGG11 are of real images; the two others
have random eigenvectors and eigenvalues that fall as k to the power −1.5, like those. Sine of the largest principal
angle between the two subspaces. Where more than an eighth of the eigenvectors is asked for, all are computed: block
Lanczos is not faster there."""


def measure(setting: Setting) -> pd.DataFrame:
    """One row a matrix: fastest of two, in turns."""
    network = setting.network("VGG11")
    layers = [layer for layer in countable(network).layers if layer.m >= 2304]
    moments = input_moments(network, layers, setting.calibration().split(128))
    matrices = {f"VGG11, {la.name}": (moments[la.name].second[0], la.n) for la in layers}
    matrices |= {"power law": (_power_law(4608), 512), "power law, as ViT-L's MLP": (_power_law(4096), 1024)}
    rows = []
    for name, (matrix, count) in matrices.items():
        ours, full = [], []
        for _ in range(2):
            began = time.perf_counter()
            few = principal(matrix, count).vectors
            ours.append(time.perf_counter() - began)
            began = time.perf_counter()
            exact = torch.linalg.eigh(matrix).eigenvectors.flip(1)[:, :count]
            full.append(time.perf_counter() - began)
        angle = torch.linalg.matrix_norm(few - exact @ (exact.mT @ few), 2)
        rows.append(
            {
                "matrix": name,
                "m": len(matrix),
                "n": count,
                "ours, s": min(ours),
                "all, s": min(full),
                "ours / all": min(ours) / min(full),
                "angle": f"{float(angle):.1e}",
            }
        )
        print(rows[-1], flush=True)
    return pd.DataFrame(rows)


def _power_law(order: int) -> Tensor:
    generator = torch.Generator().manual_seed(SEED)
    vectors = torch.linalg.qr(torch.randn(order, order, generator=generator, dtype=torch.float64)).Q
    matrix = vectors * torch.arange(1, order + 1, dtype=torch.float64) ** -1.5 @ vectors.mT
    return (matrix + matrix.mT) / 2


def draw(table: pd.DataFrame) -> Figure:
    """Seconds for each matrix."""
    figure, axes = plt.subplots(figsize=(8, 3))
    labels = [f"{row.matrix}\n{row.n:,} of {row.m:,}" for row in table.itertuples()]
    for offset, column, colour, label in (
        (-0.2, "ours, s", style.BLUE, "ours"),
        (0.2, "all, s", style.GREY, "all eigenvectors"),
    ):
        bars = axes.barh([i + offset for i in range(len(table))], table[column], 0.36, color=colour, label=label)
        axes.bar_label(bars, fmt="%.1f s", padding=3, fontsize=8)
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set(xlabel="seconds", xlim=(0, 1.15 * table["all, s"].max()))
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
