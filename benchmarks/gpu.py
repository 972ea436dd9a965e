"""What measuring costs on a GPU: images a second, as a ratio to plain forward passes, and peak memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from utilized_rank.base.runtime import device, device_name
from utilized_rank.compression.compressor import Compression
from utilized_rank.networks import cost
from utilized_rank.networks.attention import explicit
from utilized_rank.networks.evaluation import Labelled, outputs
from utilized_rank.ranks.layers import countable
from utilized_rank.ranks.measure import measure as measured
from utilized_rank.ranks.moments import Budget, input_moments
from utilized_rank.report.figures import style

from .setting import Setting

TITLE = "On a GPU"
NOTE = """ResNet-50 and ViT-B/16 with random weights on noise of 224 x 224, in float32 (TensorFloat-32 off): the time
that each work takes, over plain forward passes of as many images in the same batches."""
NETWORKS, BATCH, SIDE = ("resnet50", "vit_base_patch16_224"), 128, 224
COUNTS = {"cuda": 1024, "cpu": 8}
"""Images on a type of device."""


def measure(setting: Setting) -> pd.DataFrame:
    """One row a network and kind of work."""
    import timm

    here = device()
    count = COUNTS.get(here.type, 8)
    rows: list[dict[str, Any]] = []
    for name in NETWORKS:
        torch.manual_seed(0)
        network = explicit(timm.create_model(name), split=False).eval().to(here, memory_format=torch.channels_last)
        images = torch.randn(count, 3, SIDE, SIDE, device=here)
        flops = cost.flops(network, images[:1])
        forward = 0.0
        for work, run in _works(network, images).items():
            seconds, peak = _timed(run, here)
            forward = forward or seconds
            rows.append(
                {
                    "device": device_name(here),
                    "kind": here.type,
                    "network": name,
                    "work": work,
                    "images": count,
                    "seconds": seconds,
                    "images_a_second": count / seconds,
                    "ratio": seconds / forward,
                    "flops_a_second": count * flops / seconds if work == "forward" else float("nan"),
                    "peak_mib": peak,
                }
            )
            print(rows[-1], flush=True)
    return pd.DataFrame(rows)


def _works(network: nn.Module, images: Tensor) -> dict[str, Callable[[], Any]]:
    layers = countable(network).layers
    moments = input_moments(network, layers, images.split(BATCH), Budget(4, len(images)))
    search = Labelled(images, outputs(network, images, BATCH).argmax(1))
    middle = layers[len(layers) // 2]
    compression = Compression(network, moments, images[:256], search, forms=["channel"], losses="energy")
    one = {middle.name: ("channel", max(1, middle.width // 4))}
    return {
        "forward": lambda: outputs(network, images, BATCH),
        "moments": lambda: input_moments(network, layers, images.split(BATCH), Budget(4, len(images))),
        "search, all layers": lambda: measured(network, search, images[:BATCH], [1.0], criterion="utilized"),
        "compensation, one layer": lambda: compression.build("compensated", one),
    }


def _timed(run: Callable[[], Any], here: torch.device) -> tuple[float, float]:
    """Seconds, after a run that sets things up, and the peak of the device's memory in MiB."""
    if here.type == "cuda":
        run()
        torch.cuda.synchronize(here)
        torch.cuda.reset_peak_memory_stats(here)
    began = time.perf_counter()
    run()
    if here.type != "cuda":
        return time.perf_counter() - began, float("nan")
    torch.cuda.synchronize(here)
    return time.perf_counter() - began, torch.cuda.max_memory_allocated(here) / 2**20


def draw(table: pd.DataFrame) -> Figure:
    """The ratio of every kind of work to plain forward passes."""
    shown = table[table.work != "forward"].pivot(index="work", columns="network", values="ratio")
    figure, axes = plt.subplots(figsize=(7, 2.6))
    shown.plot.barh(ax=axes, color=style.SERIES)
    axes.set(xlabel="time, over plain forward passes of as many images", ylabel="")
    return figure
