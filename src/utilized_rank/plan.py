"""What a study will take, before anything runs: images, forward passes, memory and disk, stage by stage."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

from . import models, sources
from .attention import explicit
from .config import Finetune, Frontier, Model, Recipe, Study
from .evaluation import BATCH
from .layers import countable
from .policies import STEPS
from .prepare import DESCRIBING, split_counts

PASSES = 2.0
"""Passes of the search split, by FLOPs, for each layer and tolerance: 1.4 to 2.7 on digits and CIFAR-10."""
BACKWARD = 3
"""A training step over a forward pass, by FLOPs."""
PROCESS = 900
"""MiB of a process with torch and timm."""
MIB = 2**20


@dataclass(frozen=True)
class Shape:
    """What decides the cost of one network."""

    layers: int
    parameters: int
    moments: int
    """Bytes of all layers' second moments, float64."""
    largest: int
    """Entries of the largest second moment."""
    inputs: int
    """Bytes of what flows into the layers for one image, float32, all together."""
    widest: int
    """Likewise, the most that flows into one layer."""


def network_shape(model: Model, shape: tuple[int, int, int], classes: int, split: bool) -> Shape:
    """Measure a network without memory for its weights."""
    with torch.device("meta"):
        network = explicit(models.build(model, shape, classes), split).eval()
        layers = countable(network).layers
        flows: list[int] = []

        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            flows.append(4 * args[0].numel())

        handles = [layer.module.register_forward_pre_hook(hook) for layer in layers]
        network(torch.empty(1, *shape))
        for handle in handles:
            handle.remove()
    return Shape(
        len(layers),
        sum(p.numel() for p in network.parameters()),
        sum(8 * layer.groups * layer.m**2 for layer in layers),
        max(layer.m**2 for layer in layers),
        sum(flows),
        max(flows),
    )


def plan(study: Study, root: Path) -> pd.DataFrame:
    """One row a stage and run: stage, run, images, passes, memory, disk.

    ``images`` are those that are read, each time again; ``passes`` are forward passes of one image through the whole
    network, a training step counting :data:`BACKWARD`; memory (the peak) and disk are in MiB.

    Raises:
        StudyError: a folder or an architecture is not there.
    """
    size = sources.size(study.data, root)
    counts = split_counts(size.images, size.classes, study.data, size.test > 0)
    train, search = counts["train"], counts["search"]
    test = counts.get("test", min(study.data.limit or size.test, size.test))
    everything = train + search + test
    shape = (size.channels, study.data.image_size, study.data.image_size)
    kept = everything * shape[0] * shape[1] ** 2 if study.data.image_size <= sources.SMALL else 0
    base = PROCESS + kept / MIB
    rows: list[dict[str, object]] = []

    def add(stage: str, run: str, images: float, passes: float, memory: float, disk: float) -> None:
        rows.append(
            {"stage": stage, "run": run, "images": images, "passes": passes, "memory": memory, "disk": disk / MIB}
        )

    def optimised(recipe: Recipe, of: Shape) -> float:
        """MiB while training: weights, gradients and moments; activations of a batch, and their gradients."""
        return base + (16 * of.parameters + 4 * recipe.batch_size * of.inputs) / MIB

    decoded = everything if kept else min(train, DESCRIBING)
    add("prepare", "", decoded, 0, PROCESS + 2 * kept / MIB, kept)
    for name, made in study.pretrained.items():
        of = network_shape(made.model, shape, size.classes, split=False)
        here = made.method in ("simclr", "mae")
        seen = train * made.epochs * here
        views = {"simclr": 2.0, "mae": 1 - made.mask_ratio}.get(made.method, 0.0)
        memory = optimised(made, of) if here else base + 8 * of.parameters / MIB
        add("pretrain", name, seen, BACKWARD * seen * views, memory, 4 * of.parameters)
    for name, run in study.runs.items():
        of = network_shape(run.model, shape, size.classes, study.measure.qkv == "split")
        epochs = {"supervised": run.train.epochs, "linear": 0, "as_given": 0}[run.train.method]
        watched = epochs * search + search + test + (train + search if run.train.method == "linear" else 0)
        add(
            "train",
            name,
            epochs * train + watched,
            BACKWARD * epochs * train + watched,
            optimised(run.train, of) if epochs else base + 4 * (of.parameters + BATCH * of.widest) / MIB,
            4 * of.parameters,
        )
        epsilons, methods = len(study.measure.epsilons), len(study.decompose.methods)
        calibration = min(study.measure.calibration_images, train)
        searched = PASSES * of.layers * epsilons * search
        frontier = min(study.measure.memory, search * of.widest / MIB)
        add(
            "measure",
            name,
            calibration + 2 * search + searched,
            calibration + 2 * search + searched,
            base + frontier + (of.moments + 4 * 8 * of.largest + 4 * BATCH * of.widest) / MIB,
            of.moments,
        )
        assessed = test * (2 + epsilons * (1 + methods))
        looked = min(study.decompose.sweep_images, search)
        swept = looked * (1 + 5 * study.decompose.sweep_points + 2 * epsilons)
        add(
            "decompose",
            name,
            assessed + swept,
            assessed + swept,
            base + (2 * of.moments + (4 + methods) * 4 * of.parameters + 4 * BATCH * of.widest) / MIB,
            4 * of.parameters * epsilons * methods,
        )
        variants = 1 + epsilons * len(study.decompose.finetuned)
        tuned = run.finetune.epochs * variants
        add(
            "finetune",
            name,
            tuned * (train + search) + (variants + 1) * test,
            tuned * (BACKWARD * train + search) + (variants + 1) * test,
            optimised(run.finetune, of),
            4 * of.parameters * variants,
        )
    for name, asked in study.frontier.items():
        of = network_shape(study.runs[name].model, shape, size.classes, study.measure.qkv == "split")
        chosen, trained = _made(asked, of.layers, min(asked.images, train), search), _trained(asked)
        networks = len(asked.ranks) * len(asked.methods)
        passed: float = (
            (networks + 1) * (search + test) + chosen + min(asked.loss_images, train) * LOSSES * of.layers / 2
        )
        steps = sum(recipe.epochs * copies for recipe, copies in trained)
        passed += steps * search + sum(copies for _, copies in trained) * test
        frontier = min(study.measure.memory, max(search, 2 * min(asked.images, train)) * of.widest / MIB)
        add(
            "frontier",
            name,
            passed + steps * train,
            passed + BACKWARD * steps * train,
            frontier + (3 * of.moments + networks * 4 * of.parameters) / MIB + optimised(asked.finetune, of),
            4 * of.parameters * (networks + len(trained)),
        )
    return pd.DataFrame(rows)


LOSSES = 8
"""Looks at each layer to measure what a budget loses by it, from that layer on."""


def _made(asked: Frontier, layers: int, images: int, search: int) -> float:
    """Passes in which ranks are chosen and networks built, fitting one being two: of the original and of itself."""
    fitted = "compensated" in asked.methods
    passes = float(len(asked.ranks) * 2 * images * fitted)
    for policy in asked.ranks:
        once = 2 * images * (policy.weights == "compensated")
        if policy.search == "joint":
            passes += math.log2(STEPS) * (once + search)
        if policy.search == "cumulative":  # bisection, each time from the layer on
            passes += once + layers * 5 * search / 2
    return passes


def _trained(asked: Frontier) -> list[tuple[Finetune, int]]:
    """Every network that is trained on, with its recipe and how often."""
    recipes = [asked.finetune]
    for policy in asked.ranks:
        recipes += [asked.finetune] * len(policy.finetuned)
        recipes += [asked.scratch] * bool(policy.finetuned) if asked.scratch else []
    return [(recipe, len({recipe.lr, *recipe.lrs}) + recipe.seeds - 1) for recipe in recipes]


def text(table: pd.DataFrame) -> str:
    """The plan to be read: thousands apart, and its totals (the largest, of memory)."""
    total = table[["images", "passes", "disk"]].sum()
    last = {"stage": "all", "run": "", **total, "memory": table.memory.max()}
    shown = pd.concat([table, pd.DataFrame([last])], ignore_index=True).rename(
        columns={"images": "images read", "passes": "forward passes", "memory": "peak memory, MiB", "disk": "disk, MiB"}
    )
    return shown.to_string(index=False, float_format=lambda value: f"{value:,.0f}")
