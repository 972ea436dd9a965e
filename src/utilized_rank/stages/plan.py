"""What a study will take, before anything runs: images, forward passes, memory and disk, stage by stage."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pandas as pd
import torch
from torch import nn

from ..compression.policies import ROUNDS, STEPS
from ..datasets import sources
from ..datasets.prepare import DESCRIBING, split_counts
from ..networks import cost
from ..networks.evaluation import BATCH, received
from ..ranks.layers import countable
from ..ranks.moments import CHUNK
from ..study.config import Study
from ..study.sections import Frontier, Measure
from ..training import models
from ..training.sections import Finetune, Model, Pretrained, Recipe, Train

PASSES = 2.0
"""Passes of the search split, by FLOPs, for each layer and tolerance: 1.4 to 2.7 on digits and CIFAR-10."""
BACKWARD = 3
"""A training step over a forward pass, by FLOPs."""
PROCESS = 900
"""MiB of a process with torch and timm."""
DESCENT = 3
"""Networks that a joint search builds for each layer, until none can be made smaller."""
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


def network_shape(model: Model, shape: tuple[int, int, int], classes: int, qkv: str) -> Shape:
    """Measure a network without memory for its weights."""
    with torch.device("meta"):
        network = models.callable_layers(models.build(model, shape, classes), shape, qkv)
        layers = countable(network).layers
        modules: list[nn.Module] = [layer.module for layer in layers]
        flows = [4 * inputs.numel() for _, inputs in received(network, modules, torch.empty(1, *shape))]
    return Shape(
        len(layers),
        cost.parameters(network),
        sum(8 * layer.groups * layer.m**2 for layer in layers),
        max(layer.m**2 for layer in layers),
        sum(flows),
        max(flows),
    )


@dataclass(frozen=True)
class Scale:
    """What decides the cost of every stage."""

    train: int
    search: int
    test: int
    shape: tuple[int, int, int]
    """Channels, height, width."""
    classes: int
    kept: int
    """Bytes of the images, where they are kept as one array."""

    def searching_test(self) -> Scale:
        """Of a run whose search split is half of the test images."""
        return replace(self, search=self.test // 2, test=self.test - self.test // 2)

    @property
    def base(self) -> float:
        """MiB of a process that holds the images."""
        return PROCESS + self.kept / MIB

    def optimised(self, recipe: Recipe, of: Shape) -> float:
        """MiB while training: weights, gradients and moments; activations of a batch, and their gradients."""
        return self.base + (16 * of.parameters + 4 * recipe.batch_size * of.inputs) / MIB


@dataclass(frozen=True)
class Need:
    """What one stage takes for one run."""

    images: float
    """That are read, each time again."""
    passes: float
    """Forward passes of one image through the whole network, a training step counting :data:`BACKWARD`."""
    memory: float
    """MiB, at the peak."""
    disk: float
    """MiB."""


def plan(study: Study, root: Path) -> pd.DataFrame:
    """One row a stage and run: stage, run, and the fields of :class:`Need`.

    Raises:
        StudyError: a folder or an architecture is not there.
    """
    everything = scale_of(study, root)
    study = study.model_copy(update={"measure": study.measure.resolved(everything.search)})
    scales = {
        name: everything.searching_test() if study.search_from(name) == "test" else everything for name in study.runs
    }
    needs = {("prepare", ""): _prepare(everything)}
    for name, made in study.pretrained.items():
        of = network_shape(made.model, everything.shape, everything.classes, "fused")
        needs["pretrain", name] = _pretrain(made, of, everything)
    of_images = everything.shape, everything.classes
    shapes = {name: network_shape(run.model, *of_images, study.measure.qkv) for name, run in study.runs.items()}
    for name, run in study.runs.items():
        of, scale = shapes[name], scales[name]
        needs["train", name] = _train(run.train, of, scale)
        needs["measure", name] = _measure(study.measure, of, scale)
        needs["decompose", name] = _decompose(study, of, scale)
        needs["finetune", name] = _finetune(study, run.finetune, of, scale)
    for name, asked in study.frontier.items():
        needs["frontier", name] = _frontier(asked, study.measure.memory, shapes[name], scales[name])
    return pd.DataFrame([{"stage": stage, "run": run, **asdict(need)} for (stage, run), need in needs.items()])


def scale_of(study: Study, root: Path) -> Scale:
    """How many images of which kind a study has.

    Raises:
        StudyError: a folder is not there.
    """
    size = sources.size(study.data, root)
    counts = split_counts(size.images, size.classes, study.data, size.test > 0)
    test = counts.get("test", min(study.data.limit or size.test, size.test))
    shape = (size.channels, study.data.image_size, study.data.image_size)
    everything = counts["train"] + counts["search"] + test
    kept = everything * math.prod(shape) if study.data.image_size <= sources.SMALL else 0
    return Scale(counts["train"], counts["search"], test, shape, size.classes, kept)


def _prepare(scale: Scale) -> Need:
    decoded = scale.train + scale.search + scale.test if scale.kept else min(scale.train, DESCRIBING)
    return Need(decoded, 0, PROCESS + 2 * scale.kept / MIB, scale.kept / MIB)


def _pretrain(made: Pretrained, of: Shape, scale: Scale) -> Need:
    here = made.method in ("simclr", "mae")
    seen = scale.train * made.epochs * here
    views = {"simclr": 2.0, "mae": 1 - made.mask_ratio}.get(made.method, 0.0)
    memory = scale.optimised(made, of) if here else scale.base + 8 * of.parameters / MIB
    return Need(seen, BACKWARD * seen * views, memory, 4 * of.parameters / MIB)


def _train(recipe: Train, of: Shape, scale: Scale) -> Need:
    epochs = recipe.epochs if recipe.method == "supervised" else 0
    probed = (scale.train + scale.search) * (recipe.method == "linear")
    watched = epochs * scale.search + scale.search + scale.test + probed
    steps = epochs * scale.train
    memory = scale.optimised(recipe, of) if epochs else scale.base + 4 * (of.parameters + BATCH * of.widest) / MIB
    return Need(steps + watched, BACKWARD * steps + watched, memory, 4 * of.parameters / MIB)


def _measure(asked: Measure, of: Shape, scale: Scale) -> Need:
    searched = PASSES * of.layers * len(asked.epsilons) * scale.search
    calibration = min(asked.calibration_images, scale.train)
    seen = calibration + 2 * scale.search + searched
    frontier = min(asked.memory, scale.search * of.widest / MIB)
    sums = 1 + (calibration > CHUNK)  # those of a chunk, beside those of all before it
    moments = (sums * of.moments + 4 * 8 * of.largest + 4 * BATCH * of.widest) / MIB
    return Need(seen, seen, scale.base + frontier + moments, of.moments / MIB)


def _decompose(study: Study, of: Shape, scale: Scale) -> Need:
    asked, epsilons = study.decompose, len(study.measure.epsilons)
    methods = len(asked.methods)
    swept = min(asked.sweep_images, scale.search) * (1 + 5 * asked.sweep_points + 2 * epsilons)
    seen = scale.test * (2 + epsilons * (1 + methods)) + swept
    memory = scale.base + (2 * of.moments + (4 + methods) * 4 * of.parameters + 4 * BATCH * of.widest) / MIB
    return Need(seen, seen, memory, 4 * of.parameters * epsilons * methods / MIB)


def _finetune(study: Study, recipe: Recipe, of: Shape, scale: Scale) -> Need:
    variants = 1 + len(study.measure.epsilons) * len(study.decompose.finetuned)
    epochs = recipe.epochs * variants
    steps, watched = epochs * scale.train, epochs * scale.search + (variants + 1) * scale.test
    disk = 4 * of.parameters * variants / MIB
    return Need(steps + watched, BACKWARD * steps + watched, scale.optimised(recipe, of), disk)


def _frontier(asked: Frontier, most: int, of: Shape, scale: Scale) -> Need:
    images, networks, trained = min(asked.images, scale.train), len(asked.ranks) * len(asked.methods), _trained(asked)
    epochs = sum(recipe.epochs * copies for recipe, copies in trained)
    watched = (
        (networks + 1) * (scale.search + scale.test)
        + _made(asked, of.layers, images, scale.search)
        + min(asked.loss_images, images) * (BACKWARD + ROUNDS * _budgets(asked) * of.layers / 2)
        + epochs * scale.search
        + sum(copies for _, copies in trained) * scale.test
        + networks * min(asked.statistics, scale.train)
    )
    steps = epochs * scale.train
    taught = sum(recipe.epochs * copies for recipe, copies in trained if recipe.distillation) * scale.train
    frontier = min(most, max(scale.search, 2 * images) * of.widest / MIB)
    memory = frontier + (3 * of.moments + networks * 4 * of.parameters) / MIB + scale.optimised(asked.finetune, of)
    disk = 4 * of.parameters * (networks + len(trained)) / MIB
    return Need(steps + watched, BACKWARD * steps + taught + watched, memory, disk)


def _made(asked: Frontier, layers: int, images: int, search: int) -> float:
    """Passes in which ranks are chosen and networks built, fitting one being two: of the original and of itself."""
    fitted = "compensated" in asked.methods
    passes = float(len(asked.ranks) * 2 * images * fitted)
    for policy in asked.ranks:
        once = 2 * images * (policy.weights == "compensated")
        if policy.search == "joint":
            passes += (math.log2(STEPS) + DESCENT * layers) * (once + search)
        if policy.search == "cumulative":  # bisection, each time from the layer on
            passes += once + layers * 5 * search / 2
    return passes


def _budgets(asked: Frontier) -> float:
    """Budgets for which layers are measured, from each of them on: those of a joint search, too."""
    return sum(math.log2(STEPS) if policy.search == "joint" else policy.search is None for policy in asked.ranks)


def _trained(asked: Frontier) -> list[tuple[Finetune, int]]:
    """Every network that is trained on, with its recipe and how often."""
    recipes = [asked.finetune]
    for policy in asked.ranks:
        recipes += [asked.finetune] * len(policy.finetuned)
        recipes += [asked.scratch] * bool(policy.finetuned) if asked.scratch else []
    return [(recipe, len({recipe.lr, *recipe.lrs}) + recipe.seeds - 1) for recipe in recipes]


def text(table: pd.DataFrame) -> str:
    """The plan to be read: thousands apart, and its totals (the largest, of memory)."""
    total = table[[name for name in ("images", "passes", "disk", "hours") if name in table]].sum()
    last = {"stage": "all", "run": "", **total, "memory": table.memory.max()}
    shown = pd.concat([table, pd.DataFrame([last])], ignore_index=True).rename(
        columns={"images": "images read", "passes": "forward passes", "memory": "peak memory, MiB", "disk": "disk, MiB"}
    )
    if "hours" in shown:
        shown["hours"] = [f"{value:,.2f}" for value in shown.hours]
    return shown.to_string(index=False, float_format=lambda value: f"{value:,.0f}")
