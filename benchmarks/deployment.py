"""Latency of layers in two against the layers that they replace, beside the ratio of FLOPs; and of whole networks."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from utilized_rank.compression.decomposition import Decomposition
from utilized_rank.compression.pairs import pair
from utilized_rank.networks import cost
from utilized_rank.ranks.layers import Layer, countable
from utilized_rank.ranks.moments import input_moments
from utilized_rank.ranks.projection import bases
from utilized_rank.ranks.subspaces import energy_rank
from utilized_rank.report.figures import style

from .setting import Setting

TITLE = "Deployment: latency beside FLOPs"
BATCHES = (1, 64)
ENERGY = 0.97
NOTE = f"""Medians of calls in turns, float32. A point above the diagonal has lost part of what its FLOPs promise;
above 1, the two layers are slower than the one, and `objective: latency` keeps it dense. Networks: the optimum at the
ranks of {ENERGY:.0%} of the energy; "where faster" keeps a layer dense where its two are slower at
batch {BATCHES[-1]}."""


def _layers() -> dict[str, tuple[nn.Linear | nn.Conv2d, tuple[int, ...]]]:
    """Layers and the shape of one image's inputs."""

    def convolution(channels: int, kernel: int) -> nn.Conv2d:
        made = nn.Conv2d(channels, channels, kernel, padding=kernel // 2, bias=False)
        return made.to(memory_format=torch.channels_last)

    return {
        "linear 768 to 3,072, 197 tokens": (nn.Linear(768, 3072), (197, 768)),
        "linear 512 to 512": (nn.Linear(512, 512), (512,)),
        "1×1, 256 channels, 14×14": (convolution(256, 1), (256, 14, 14)),
        "3×3, 16 channels, 32×32": (convolution(16, 3), (16, 32, 32)),
        "3×3, 64 channels, 8×8": (convolution(64, 3), (64, 8, 8)),
        "3×3, 256 channels, 14×14": (convolution(256, 3), (256, 14, 14)),
        "3×3, 512 channels, 4×4": (convolution(512, 3), (512, 4, 4)),
    }


def measure(setting: Setting) -> pd.DataFrame:
    """One row a layer (or network), rank and batch size."""
    return pd.concat([_single_layers(), _networks(setting)], ignore_index=True)


def _single_layers() -> pd.DataFrame:
    rows = []
    for name, (module, shape) in _layers().items():
        layer = Layer(name, module)
        for kept in (0.1, 0.25, 0.5, 0.75):
            rank = max(1, round(kept * layer.m * layer.n / (layer.m + layer.n)))
            two = pair(module, "channel", rank, module.bias is not None).to(memory_format=torch.channels_last).eval()
            for batch in BATCHES:
                inputs = torch.randn(batch, *shape)
                if len(shape) == 3:
                    inputs = inputs.contiguous(memory_format=torch.channels_last)
                dense, decomposed = cost.latencies([module, two], inputs)
                rows.append(
                    {
                        "what": name,
                        "form": f"rank {rank}",
                        "batch": batch,
                        "FLOPs ratio": cost.flops_of(two, inputs) / cost.flops_of(module, inputs),
                        "dense, ms": 1000 * dense,
                        "decomposed, ms": 1000 * decomposed,
                        "latency ratio": decomposed / dense,
                    }
                )
    return pd.DataFrame(rows)


def _networks(setting: Setting) -> pd.DataFrame:
    rows = []
    for name in ("ResNet-20", "VGG11"):
        network = setting.network(name)
        images = setting.search(BATCHES[-1])[0]
        for label, faster in (("where it saves weights", False), ("where faster", True)):
            small = _decomposed(setting, network, images, faster)
            for batch in BATCHES:
                dense, decomposed = cost.latencies([network, small], images[:batch], 1.0)
                rows.append(
                    {
                        "what": name,
                        "form": label,
                        "batch": batch,
                        "parameters kept": cost.parameters(small) / cost.parameters(network),
                        "FLOPs ratio": cost.flops(small, images[:1]) / cost.flops(network, images[:1]),
                        "dense, ms": 1000 * dense,
                        "decomposed, ms": 1000 * decomposed,
                        "latency ratio": decomposed / dense,
                    }
                )
    return pd.DataFrame(rows)


def _decomposed(setting: Setting, network: nn.Module, images: Tensor, faster: bool) -> nn.Module:
    layers = countable(network).layers
    moments = input_moments(network, layers, setting.calibration()[:512].split(128))
    rows = []
    for layer in layers:
        _, t = bases(layer, moments[layer.name], 1)
        rows.append({"layer": layer.name, "epsilon": 0.0, "k_s": layer.m, "k_t": energy_rank(t.values, ENERGY)})
    return Decomposition(network, pd.DataFrame(rows), moments, images, faster).build("optimal", 0.0).network.eval()


def draw(table: pd.DataFrame) -> Figure:
    """Latency ratio against FLOPs ratio, a panel for each batch size."""
    figure, panels = plt.subplots(1, len(BATCHES), figsize=(11, 4), sharey=True)
    single = table[table.form.str.startswith("rank")]
    for axes, batch in zip(panels, BATCHES, strict=True):
        for (name, rows), marker in zip(
            single[single.batch == batch].groupby("what", sort=False), "osD^vPX", strict=True
        ):
            colour = {"line": style.BLUE, "1×1,": style.GREEN, "3×3,": style.ORANGE}[name[:4]]
            shade = 0.55 if marker in "sD" else 1.0
            axes.plot(rows["FLOPs ratio"], rows["latency ratio"], marker=marker, color=colour, alpha=shade, label=name)
        axes.plot([0, 1], [0, 1], ":", color=style.GREY)
        axes.axhline(1, color=style.BLACK, lw=1, ls="--")
        axes.set(xlabel="FLOPs, decomposed / dense", title=f"batch {batch}", xlim=(0, 1))
    panels[0].set(ylabel="latency, decomposed / dense", ylim=(0, None))
    panels[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
