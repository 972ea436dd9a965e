"""Verdicts on projected layers: is the network still good enough on the search split?

A score may be any function of a network. Of labelled images, those that are closest to another class come first,
and a trial stops as soon as the ones that remain cannot change its verdict, which is therefore that of the whole split.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from itertools import accumulate
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from ..networks.devices import device_of, looks
from ..networks.evaluation import Labelled, Score, outputs
from ..networks.precision import Precision, autocast, resolved
from ..networks.suffix import Suffix, Traced
from .layers import Layer
from .projection import projected, replaced
from .subspaces import Subspace

Recall = Callable[[Any, Callable[[], Any]], Any]
"""Gives the answer (JSON) to a question (JSON): one that is remembered, or what a function works out."""


def worked_out(question: Any, work_out: Callable[[], Any]) -> Any:
    """Nothing is remembered."""
    return work_out()


PROBE = 0.2
"""Part of the search split that a guess looks at: nearly all images that a projection turns are in it."""


@dataclass
class Trial:
    """What is known of one layer at one (k_S, k_T): grows as more images are looked at."""

    batches: int = 0
    """Looked at so far."""
    images: int = 0
    """Likewise."""
    correct: int = 0
    """Of those, classified correctly."""


@dataclass(frozen=True)
class Evaluation:
    """One question that images were looked at for."""

    layer: str
    epsilon: float
    k_s: int
    k_t: int
    certified: bool
    """Whether the verdict of the whole split was asked for, or a guess from its probe."""
    images: int
    """Looked at for it, beyond those known from earlier questions on the same ranks; 0 for a score without labels."""
    passes: bool
    """The verdict."""
    forwards: float
    """What it cost, in passes of the whole search split through the whole network, by FLOPs."""
    seconds: float


class Trials:
    """All trials on one network and one search split.

    Args:
        network: in evaluation mode from now on.
        search: inputs of the search split, and their labels.
        memory: MiB that intermediate values of the network may take.
        precision: of the network's arithmetic, the unaltered one's too.
        batch_size: images looked at before the next check whether the verdict is certain.
        certifies: whether verdicts are those of the whole split; else all are guesses, and only the probe is kept.
        recall: what was seen before an interruption.
    """

    def __init__(
        self,
        network: nn.Module,
        search: Labelled,
        memory: int,
        precision: Precision = "float32",
        batch_size: int = 64,
        certifies: bool = True,
        recall: Recall = worked_out,
    ) -> None:
        device = device_of(network)
        self._device, self._looks = device.type, looks(device)
        self.precision = resolved(precision, device.type)
        with autocast(self.precision, device.type):
            logits = outputs(network, search.inputs, batch_size)
        labels = search.labels.to(device)
        order = _order(_margin(logits, labels))
        self.images, self.certifies = len(labels), certifies
        if not certifies:
            order = order[: probe(self.images)]
        self._labels = labels[order].split(batch_size)
        right = logits.argmax(1) == labels
        by_batch = torch.stack([batch.sum() for batch in right[order].split(batch_size)])
        self._right_before = [0, *accumulate(by_batch.tolist())]
        self._suffix = Suffix(Traced(network), search.inputs, order.cpu().split(batch_size), memory * 2**20)
        self._recall = recall
        self._layer: Layer | None = None
        self._share = 1.0
        self.correct = int(right.sum())
        """Images that the unaltered network classifies correctly."""
        self._trials: dict[tuple[str, int, int], Trial] = {}
        self.evaluations: list[Evaluation] = []
        """Every question that images were looked at for, in order."""

    def forget(self) -> None:
        """Drop what was found so far: what is asked from now on costs as much as if it were asked first."""
        self._trials, self.evaluations = {}, []

    def needed(self, epsilon: float) -> int:
        """The fewest correct images that stay within ``epsilon`` percentage points."""
        # The nudge keeps, say, 0.5 points of 200 images at exactly one image.
        return math.ceil(self.correct - epsilon / 100 * self.images - 1e-9)

    def passes(self, layer: Layer, s: Subspace, t: Subspace, k_s: int, k_t: int, epsilon: float) -> bool:
        """Whether the network stays within ``epsilon`` points with W' = P_S W P_T in ``layer``: on the whole split.

        A guess (:meth:`likely`) where nothing is certified.
        """
        return self._ask(layer, s, t, k_s, k_t, epsilon, self.certifies)

    def likely(self, layer: Layer, s: Subspace, t: Subspace, k_s: int, k_t: int, epsilon: float) -> bool:
        """A guess of :meth:`passes` from the probe, the first images: the others are taken to stay as they are."""
        return self._ask(layer, s, t, k_s, k_t, epsilon, certified=False)

    def _ask(self, layer: Layer, s: Subspace, t: Subspace, k_s: int, k_t: int, epsilon: float, certified: bool) -> bool:
        if (k_s, k_t) == (layer.m, layer.n):
            return True
        trial = self._trials.setdefault((layer.name, k_s, k_t), Trial())
        verdict = self._verdict(trial, self.needed(epsilon), certified)
        if verdict is None:
            known = trial.images

            def looked() -> list[float]:
                began = time.perf_counter()
                self._turn_to(layer)
                with replaced({layer: projected(layer.weight(), s, t, k_s, k_t)}):
                    while self._verdict(trial, self.needed(epsilon), certified) is None:
                        self._look(trial)
                forwards = (trial.images - known) / self.images * self._share
                return [trial.batches, trial.images, trial.correct, forwards, time.perf_counter() - began]

            question = [layer.name, k_s, k_t, epsilon, certified]
            trial.batches, trial.images, trial.correct, forwards, seconds = self._recall(question, looked)
            verdict = self._verdict(trial, self.needed(epsilon), certified)
            assert verdict is not None
            self.evaluations.append(
                Evaluation(layer.name, epsilon, k_s, k_t, certified, trial.images - known, verdict, forwards, seconds)
            )
        return verdict

    def _verdict(self, trial: Trial, needed: int, certified: bool) -> bool | None:
        """Yes, no, or None where more images must be looked at."""
        if trial.correct >= needed:
            return True
        if trial.correct + self.images - trial.images < needed:
            return False
        if certified:
            return None
        lost = self._right_before[trial.batches] - trial.correct
        if lost > self.correct - needed:
            return False
        return True if trial.images >= PROBE * self.images else None

    def _turn_to(self, layer: Layer) -> None:
        if self._layer != layer:
            self._layer = layer
            with autocast(self.precision, self._device):
                self._suffix.move_to(layer.name)
                self._share = self._suffix.share

    @torch.inference_mode()
    def _look(self, trial: Trial) -> None:
        """Look at the next batches, as many as come before the device is asked."""
        some = range(trial.batches, min(trial.batches + self._looks, len(self._labels)))
        with autocast(self.precision, self._device):
            right = [(self._suffix.logits(i).argmax(1) == self._labels[i]).sum() for i in some]
        trial.correct += int(torch.stack(right).sum())
        trial.images += sum(len(self._labels[i]) for i in some)
        trial.batches = some.stop

    @property
    def score(self) -> float:
        """The accuracy of the unaltered network, in percent."""
        return 100 * self.correct / self.images


class Scored:
    """All trials on one network and any score of it: each is evaluated whole, and none is guessed.

    Args:
        network: in evaluation mode from now on.
        score: the higher the better.
        precision: of the network's arithmetic, the unaltered one's too.
        recall: what was found before an interruption.
    """

    likely = None
    """No part of a score tells the whole."""

    def __init__(
        self, network: nn.Module, score: Score, precision: Precision = "float32", recall: Recall = worked_out
    ) -> None:
        self.network = network.eval()
        self._score, self._recall = score, recall
        self._device = device_of(network).type
        self.precision = resolved(precision, self._device)
        self._found: dict[tuple[str, int, int], float] = {}
        self.evaluations: list[Evaluation] = []
        """Every question that the network was evaluated for, in order."""
        self.score = self._now()
        """Of the unaltered network."""

    def forget(self) -> None:
        """Drop what was found so far."""
        self._found, self.evaluations = {}, []

    @torch.inference_mode()
    def _now(self) -> float:
        with autocast(self.precision, self._device):
            return float(self._score(self.network))

    def passes(self, layer: Layer, s: Subspace, t: Subspace, k_s: int, k_t: int, epsilon: float) -> bool:
        """Whether the score stays within ``epsilon`` with W' = P_S W P_T in ``layer``."""
        if (k_s, k_t) == (layer.m, layer.n):
            return True
        key = (layer.name, k_s, k_t)
        known, seconds = key in self._found, 0.0

        def found() -> list[float]:
            began = time.perf_counter()
            with replaced({layer: projected(layer.weight(), s, t, k_s, k_t)}):
                return [self._now(), time.perf_counter() - began]

        if not known:
            self._found[key], seconds = self._recall([*key], found)
        # What is no number fails: NaN is not greater than anything.
        verdict = self._found[key] >= self.score - epsilon - 1e-9
        if not known:
            self.evaluations.append(Evaluation(layer.name, epsilon, k_s, k_t, True, 0, verdict, 1.0, seconds))
        return verdict


def trials(
    network: nn.Module,
    score: Score,
    memory: int,
    precision: Precision,
    certifies: bool = True,
    recall: Recall = worked_out,
) -> Trials | Scored:
    """All trials on one network: of labels, with an exact early stop; of any other score, evaluated whole."""
    if isinstance(score, Labelled):
        return Trials(network, score, memory, precision, certifies=certifies, recall=recall)
    return Scored(network, score, precision, recall)


def evaluations_table(evaluations: list[Evaluation]) -> pd.DataFrame:
    """Every evaluation, one row each, columns as in :class:`Evaluation`."""
    columns = [field.name for field in fields(Evaluation)]
    return pd.DataFrame([asdict(evaluation) for evaluation in evaluations], columns=columns)


def _margin(logits: Tensor, labels: Tensor) -> Tensor:
    """How far the true class leads the best other one, negative where it does not, (N,)."""
    true = logits.gather(1, labels[:, None]).squeeze(1)
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return true - others.amax(1)


def _order(margin: Tensor) -> Tensor:
    """The order in which images are looked at: the probe, closest to another class first; then the wrong ones.

    After the probe, those that were wrong already come first: a trial fails when too many are.
    """
    closest = margin.abs().argsort(stable=True)
    rest = closest[probe(len(margin)) :]
    return torch.cat([closest[: probe(len(margin))], rest[margin[rest].argsort(stable=True)]])


def probe(images: int) -> int:
    """How many of them a guess looks at."""
    return math.ceil(PROBE * images)
