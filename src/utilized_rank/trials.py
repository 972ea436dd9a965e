"""Verdicts on projected layers: is the network still accurate enough on the search split?

The images come hardest first, and a trial stops as soon as those that remain cannot change its
verdict, which is therefore that of the whole split.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass

import pandas as pd
import torch
from torch import Tensor, nn

from .evaluation import outputs
from .layers import Layer
from .projection import projected, replaced
from .subspaces import Subspace
from .suffix import Suffix, Traced

HARDEST = 0.15
"""Part of the search split that a quick verdict looks at: most errors of a projected layer are among it."""


@dataclass
class Trial:
    """What is known of one layer at one (k_S, k_T): grows as more images are looked at."""

    layer: str
    k_s: int
    k_t: int
    images: int = 0
    """Looked at so far."""
    batches: int = 0
    """Likewise."""
    correct: int = 0
    """Of those, classified correctly."""
    seconds: float = 0.0


class Trials:
    """All trials on one network and one search split.

    Args:
        network: in evaluation mode from now on.
        inputs: the normalised images of the search split, (N, C, H, W).
        labels: int64 (N,).
        memory: MiB that intermediate values of the network may take.
        batch_size: images looked at before the next check whether the verdict is certain.
    """

    def __init__(self, network: nn.Module, inputs: Tensor, labels: Tensor, memory: int, batch_size: int = 64) -> None:
        logits = outputs(network, inputs)
        margin = _margin(logits, labels)
        order = margin.argsort(stable=True)
        self.labels = labels[order].split(batch_size)
        self.images = len(labels)
        self._suffix = Suffix(Traced(network), list(inputs[order].split(batch_size)), memory * 2**20)
        self._layer: Layer | None = None
        self.correct = int((logits.argmax(1) == labels).sum())
        """Images that the unaltered network classifies correctly."""
        self._trials: dict[tuple[str, int, int], Trial] = {}

    def needed(self, epsilon: float) -> int:
        """The fewest correct images that stay within ``epsilon`` percentage points."""
        # The nudge keeps, say, 0.5 points of 200 images at exactly one image.
        return math.ceil(self.correct - epsilon / 100 * self.images - 1e-9)

    def passes(
        self, layer: Layer, s: Subspace, t: Subspace, k_s: int, k_t: int, needed: int, quick: bool = False
    ) -> bool:
        """Whether at least ``needed`` images stay correct with W' = P_S W P_T in ``layer``.

        A ``quick`` verdict looks at the hardest images only, and takes the others to be correct: its no
        is final, its yes is not.
        """
        if (k_s, k_t) == (layer.m, layer.n):
            return self.correct >= needed
        trial = self._trials.setdefault((layer.name, k_s, k_t), Trial(layer.name, k_s, k_t))
        if not self._certain(trial, needed):
            self._turn_to(layer)
            with replaced({layer: projected(layer.weight(), s, t, k_s, k_t)}):
                self._look(trial, needed, HARDEST if quick else 1)
        wrong = trial.images - trial.correct
        return wrong <= self.images - needed if quick else trial.correct >= needed

    def _certain(self, trial: Trial, needed: int) -> bool:
        wrong = trial.images - trial.correct
        return trial.correct >= needed or wrong > self.images - needed

    def _turn_to(self, layer: Layer) -> None:
        if self._layer != layer:
            self._layer = layer
            self._suffix.move_to(layer.name)

    @torch.inference_mode()
    def _look(self, trial: Trial, needed: int, part: float) -> None:
        began = time.perf_counter()
        while not self._certain(trial, needed) and trial.images < part * self.images:
            logits, labels = self._suffix.logits(trial.batches), self.labels[trial.batches]
            trial.correct += int((logits.argmax(1) == labels).sum())
            trial.images += len(labels)
            trial.batches += 1
        trial.seconds += time.perf_counter() - began

    def table(self) -> pd.DataFrame:
        """Every trial, one row each: layer, k_s, k_t, images, correct, seconds."""
        return pd.DataFrame([asdict(trial) for trial in self._trials.values()])


def _margin(logits: Tensor, labels: Tensor) -> Tensor:
    """How far the true class leads the best other one, negative where it does not, (N,)."""
    true = logits.gather(1, labels[:, None]).squeeze(1)
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return true - others.amax(1)
