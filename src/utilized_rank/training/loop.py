"""The one training loop, and the losses of supervised training and linear probing."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ..base.journal import NOTHING_KEPT, Entry, Journal, random_state, restore_random_state
from ..base.runtime import seeded
from ..datasets.data import Dataset
from ..datasets.images import Split
from ..datasets.sections import Augmentation
from ..networks.batches import Batches
from ..networks.each import Each, in_turn, ordered
from ..networks.evaluation import BATCH, features, is_correct
from ..networks.precision import Precision, autocast
from . import team
from .models import classifier
from .sections import Finetune, Recipe, Train
from .team import Loss, Together


def fit(
    parameters: Iterable[nn.Parameter],
    loss: Loss,
    split: Split,
    recipe: Recipe,
    generator: torch.Generator,
    precision: Precision = "float32",
    after_epoch: Callable[[], dict[str, float]] = dict,
    title: str = "training",
    modules: Iterable[nn.Module] = (),
    journal: Journal = NOTHING_KEPT,
) -> pd.DataFrame:
    """Minimise ``loss`` over ``parameters``, in this process or in all of its :mod:`team`.

    Args:
        parameters: what is trained.
        loss: of a batch.
        split: what batches are drawn from, without replacement in an epoch.
        recipe: epochs, batch size, optimiser and schedule.
        generator: orders the images.
        precision: of the autocast around ``loss``.
        after_epoch: further columns for the curve.
        title: of the progress bar, and of what the journal has of it.
        modules: all whose state changes, where there is a journal.
        journal: what it goes on from after an interruption, step by step as it would have.

    Returns the curve, one row an epoch: epoch (from 1), lr, loss, and the columns of ``after_epoch``.

    Raises:
        FloatingPointError: the loss is no longer finite; names the epoch.
        StudyError: a batch has no equal parts for all processes.
    """
    parameters = [p for p in parameters if p.requires_grad]
    device = parameters[0].device
    whole = nn.ModuleList(modules)
    optimizer = _optimizer(parameters, recipe)
    # The last, smaller batch is dropped (batch norm needs more than a few), unless it is the only one.
    batch_size = min(recipe.batch_size, len(split))
    steps = len(split) // batch_size
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _warmup_cosine(recipe, steps))
    first, step, curve = 1, 0, cast(list[dict[str, float]], [])
    order, sums, rate = torch.empty(0, dtype=torch.int64), torch.zeros((), dtype=torch.float64, device=device), 0.0
    kept = journal.get(title)
    if kept is not None:
        tensors, known = kept
        _restore(tensors, known, whole, optimizer, schedule, generator)
        first, step, rate = known["epoch"], known["step"], known["rate"]
        curve = [dict(row) for row in known["curve"]]
        order, sums = tensors["order"], tensors["sums"].to(device)
    team.set_apart(generator)
    loss = team.in_step(loss, whole)

    def put(epoch: int, where: str) -> None:
        if not journal.keeps or team.rank():
            return
        tensors, known = _state(whole, optimizer, schedule, generator)
        # In pairs: JSON's keys have no order, the columns of a curve do.
        at = {"epoch": epoch, "step": step, "rate": rate, "curve": [[*row.items()] for row in curve]}
        journal.put(title, tensors | {"order": order, "sums": sums.clone()}, known | at, f"{title}, {where}")

    for epoch in tqdm(range(first, recipe.epochs + 1), title, recipe.epochs, initial=first - 1, unit="epoch"):
        if step == 0:
            order = team.agreed(torch.randperm(len(split), generator=generator)[: steps * batch_size])
            sums, rate = torch.zeros_like(sums), optimizer.param_groups[0]["lr"]
        for images, labels in split.batches(team.parts(order.split(batch_size)[step:], batch_size)):
            with autocast(precision, device.type):
                value = loss(images, labels)
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            nn.utils.clip_grad_norm_(parameters, 5.0)
            optimizer.step()
            schedule.step()
            sums += value.detach()
            step += 1
            if journal.due:
                put(epoch, f"epoch {epoch} of {recipe.epochs}, step {step} of {steps}")
        total = team.mean(sums).item()  # once an epoch: a device is waited for
        if not math.isfinite(total):
            raise FloatingPointError(f"{title}: the loss is not finite in epoch {epoch}; try a smaller lr")
        curve.append({"epoch": epoch, "lr": rate, "loss": total / steps, **after_epoch()})
        step = 0
    put(recipe.epochs + 1, "trained")
    return pd.DataFrame(curve)


def _optimizer(parameters: list[nn.Parameter], recipe: Recipe) -> torch.optim.Optimizer:
    # Biases and the scales of normalisation are vectors: decaying them only shifts what they undo.
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=recipe.lr, momentum=0.9, nesterov=True)
    return torch.optim.AdamW(groups, lr=recipe.lr)


def _state(
    whole: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    generator: torch.Generator,
) -> Entry:
    """Copies of all that a training goes on from, beside its place in the epoch."""
    tensors = {f"network.{name}": its.clone() for name, its in whole.state_dict().items()}
    held = optimizer.state_dict()
    for number, its in held["state"].items():
        tensors |= {f"optimizer.{number}.{name}": torch.as_tensor(value).clone() for name, value in its.items()}
    known = {"groups": held["param_groups"], "schedule": schedule.state_dict()}
    return tensors | random_state(generator), known


def _restore(
    tensors: dict[str, Tensor],
    known: dict[str, Any],
    whole: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    generator: torch.Generator,
) -> None:
    """Go on from :func:`_state`."""
    whole.load_state_dict({name: tensors[f"network.{name}"] for name in whole.state_dict()})
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, number, part = name.split(".", 2)
            state.setdefault(int(number), {})[part] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": known["groups"]})
    schedule.load_state_dict(known["schedule"])
    restore_random_state(tensors, generator)


def _warmup_cosine(recipe: Recipe, steps: int) -> Callable[[int], float]:
    total = recipe.epochs * steps
    warmup = min(round(recipe.warmup_epochs * steps), total // 2)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))

    return factor


def train_supervised(
    network: nn.Module,
    dataset: Dataset,
    recipe: Recipe,
    generator: torch.Generator,
    precision: Precision,
    title: str,
    journal: Journal = NOTHING_KEPT,
) -> pd.DataFrame:
    """Train all of ``network`` on the labels; the curve has its accuracy (%) on the search split."""

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        network.train()
        changed = dataset.augmented(images, recipe.augmentation, generator)
        return F.cross_entropy(network(changed), labels, label_smoothing=recipe.label_smoothing)

    watch = _watch(network, dataset)
    train = dataset.splits["train"]
    how = recipe, generator, precision, watch, title
    return fit(network.parameters(), loss, train, *how, [network], journal)


@dataclass(frozen=True)
class Tuned:
    """A network that was trained on."""

    network: nn.Module
    lr: float
    curve: pd.DataFrame
    """As :func:`fit` returns it, with the accuracy (%) on the search split."""


TEMPERATURE = 4.0
"""Of distillation (Hinton et al. 2015)."""


def finetune(
    network: nn.Module,
    original: nn.Module,
    dataset: Dataset,
    recipe: Finetune,
    seed: int,
    purpose: str,
    precision: Precision,
    title: str,
    journal: Journal = NOTHING_KEPT,
    each: Each = in_turn,
) -> list[Tuned]:
    """Train copies of ``network`` on: one for each seed of ``recipe``.

    Args:
        network: what is trained on, never changed.
        original: whose predictions it also learns from, where ``recipe`` asks for distillation.
        dataset: of the training and the search split.
        recipe: of every copy. Of several learning rates the first seed takes the one that is best on the search
            split (one whose loss does not stay finite is out), and the others follow.
        seed: of the study.
        purpose: of the random numbers: those of one purpose and seed are the same for every network.
        precision: of the arithmetic.
        title: of the progress bar, and of what the journal has of it.
        journal: where it goes on after an interruption.
        each: where copies are trained.

    Raises:
        FloatingPointError: the loss of one stays finite at no learning rate, or that of another at the best.
    """
    sweep = _Sweep(network, original, dataset, recipe, seed, purpose, precision, title, journal)
    work = each(_tuner, sweep)

    def tuned(ways: list[tuple[float, int]]) -> list[Tuned | FloatingPointError]:
        named = {_way(*way): way for way in ways}
        return list(ordered(work(named, title, "network"), named))

    tried = tuned([(lr, 0) for lr in dict.fromkeys([recipe.lr, *recipe.lrs])])
    finite = [its for its in tried if isinstance(its, Tuned)]
    if not finite:
        raise cast(FloatingPointError, tried[-1])
    best = max(finite, key=lambda its: its.curve.search_accuracy.iloc[-1])
    others = tuned([(best.lr, copied) for copied in range(1, recipe.seeds)])
    if failed := [its for its in others if isinstance(its, FloatingPointError)]:
        raise failed[0]
    return [best, *cast(list[Tuned], others)]


@dataclass(frozen=True)
class _Sweep:
    """What networks have in common that are trained on: see :func:`finetune`."""

    network: nn.Module
    original: nn.Module
    dataset: Dataset
    recipe: Finetune
    seed: int
    purpose: str
    precision: Precision
    title: str
    journal: Journal


def _way(lr: float, copied: int) -> str:
    return f"seed {copied}, lr {lr:g}"


def _tuner(sweep: _Sweep) -> Callable[[tuple[float, int]], Tuned | FloatingPointError]:
    """Trains a copy on, by its learning rate and its number."""
    recipe, dataset = sweep.recipe, sweep.dataset
    teacher = copy.deepcopy(sweep.original).eval()

    def tuned(way: tuple[float, int]) -> Tuned | FloatingPointError:
        lr, copied = way
        student = copy.deepcopy(sweep.network)
        generator = seeded(sweep.seed, sweep.purpose if copied == 0 else f"{sweep.purpose} {copied}")

        def loss(images: Tensor, labels: Tensor) -> Tensor:
            student.train()
            changed = dataset.augmented(images, recipe.augmentation, generator)
            logits = student(changed)
            value = F.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing)
            if recipe.distillation:
                value = torch.lerp(value, distillation(logits, teacher, changed), recipe.distillation)
            return value

        its = recipe.model_copy(update={"lr": lr})
        how = its, generator, sweep.precision, _watch(student, dataset), f"{sweep.title}, {_way(*way)}"
        try:
            curve = fit(student.parameters(), loss, dataset.splits["train"], *how, [student], sweep.journal)
        except FloatingPointError as error:  # too large a step: another may do
            return error
        return Tuned(student, lr, curve)

    return tuned


def distillation(logits: Tensor, teacher: nn.Module, images: Tensor) -> Tensor:
    """T^2 times the divergence of softened predictions (B, classes) from the teacher's (Hinton et al. 2015)."""
    with torch.no_grad():
        wanted = (teacher(images).float() / TEMPERATURE).log_softmax(1)
    given = (logits.float() / TEMPERATURE).log_softmax(1)
    return TEMPERATURE**2 * F.kl_div(given, wanted, log_target=True, reduction="batchmean")


@torch.no_grad()
def with_statistics(
    network: nn.Module, dataset: Dataset, images: int, augmentation: Augmentation, generator: torch.Generator
) -> nn.Module:
    """A copy of ``network`` whose batch norms have the statistics of training images, as they flow through it.

    Args:
        network: never changed.
        dataset: of the images.
        images: how many of the training split, the first ones; a last, smaller batch is left out.
        augmentation: that of training: without it the statistics are those of other images.
        generator: of the changes.
    """
    other = copy.deepcopy(network).eval()
    for module in other.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
            module.momentum = None  # the mean over all batches
            module.train()
    train = dataset.splits["train"]
    count = min(images, len(train))
    whole = max(1, count // BATCH) * BATCH  # every batch counts as much as the others
    for batch, _ in train.batches(torch.arange(count)[:whole].split(BATCH)):
        other(dataset.augmented(batch, augmentation, generator))
    return other.eval()


def train_linear(
    network: nn.Module,
    dataset: Dataset,
    recipe: Recipe,
    generator: torch.Generator,
    precision: Precision,
    title: str,
    journal: Journal = NOTHING_KEPT,
) -> pd.DataFrame:
    """Train the classifier alone on the features of the frozen rest (a linear probe).

    The images are not augmented, so the features are computed once.
    """
    head = classifier(network)
    split = Split(features(network, head, dataset.inputs("train")), dataset.labels("train"))

    def loss(seen: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(head(seen), labels, label_smoothing=recipe.label_smoothing)

    watch = _watch(head, dataset, features(network, head, dataset.inputs("search")))
    return fit(head.parameters(), loss, split, recipe, generator, precision, watch, title, [head], journal)


def leave_as_given(
    network: nn.Module,
    dataset: Dataset,
    recipe: Recipe,
    generator: torch.Generator,
    precision: Precision,
    title: str,
    journal: Journal = NOTHING_KEPT,
) -> pd.DataFrame:
    """No training: an empty curve."""
    return pd.DataFrame(columns=["epoch", "lr", "loss", "search_accuracy"])


METHODS = {"supervised": train_supervised, "linear": train_linear, "as_given": leave_as_given}


def train(
    network: nn.Module,
    dataset: Dataset,
    recipe: Train,
    generator: torch.Generator,
    precision: Precision,
    title: str,
    journal: Journal = NOTHING_KEPT,
    together: Together = team.alone,
) -> pd.DataFrame:
    """Train ``network`` by its recipe's method, in the processes that ``together`` starts; returns the curve.

    Arguments else as of :func:`fit`.
    """
    work = partial(_trained, network, dataset, recipe, generator, precision, title, journal)
    state, curve = together(work, recipe.batch_size)
    network.load_state_dict(state)  # what another process trained is a copy
    return curve


def _trained(network: nn.Module, dataset: Dataset, recipe: Train, *how: Any) -> tuple[dict[str, Tensor], pd.DataFrame]:
    curve = METHODS[recipe.method](network, dataset, recipe, *how)
    return network.state_dict(), curve


def _watch(network: nn.Module, dataset: Dataset, inputs: Batches | None = None) -> Callable[[], dict[str, float]]:
    """Accuracy on the search split, after an epoch."""
    inputs = dataset.inputs("search") if inputs is None else inputs
    labels = dataset.labels("search")
    return lambda: {"search_accuracy": 100 * float(is_correct(network, inputs, labels).mean())}
