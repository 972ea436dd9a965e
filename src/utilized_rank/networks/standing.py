"""The score of a network whose layers are being replaced, as it stands."""

from __future__ import annotations

import torch
from torch import nn

from .evaluation import Labelled, Score
from .suffix import Suffix, Traced

BATCH = 128


class Standing:
    """The score of ``network`` as often as it is asked for; of labelled inputs it is run from one layer on.

    Args:
        network: in evaluation mode from now on.
        score: the higher the better.
        memory: MiB that intermediate values may take.
    """

    def __init__(self, network: nn.Module, score: Score, memory: int) -> None:
        self.network, self.score = network.eval(), score
        self._suffix: Suffix | None = None
        if isinstance(score, Labelled):
            self._batches = torch.arange(len(score)).split(BATCH)
            self._suffix = Suffix(Traced(network), score.inputs, self._batches, memory * 2**20)
            self._labels = score.labels

    def turn_to(self, name: str) -> None:
        """Layer ``name`` is the one that will change from now on."""
        if self._suffix is not None:
            self._suffix.move_to(name)

    @torch.inference_mode()
    def now(self) -> float:
        """The score of the network as it stands."""
        if self._suffix is None:
            return self.score(self.network)
        found = [self._suffix.logits(i).argmax(1) for i in range(len(self._batches))]
        right = torch.cat(found) == self._labels.to(found[0].device)
        return 100 * float(right.double().mean())
