"""Plain bisection: the reference that the package's search is measured against, and tested against.

Every candidate is put in place and the whole network evaluated on the whole search split; nothing is
reused, nothing is stopped early. Slow and obviously right.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from utilized_rank.ranks.layers import Layer
from utilized_rank.ranks.projection import projected, replaced
from utilized_rank.ranks.rank_search import Ranks, search
from utilized_rank.ranks.subspaces import Subspace


@dataclass
class Plain:
    """Verdicts of one network on one search split.

    Args:
        network: in evaluation mode.
        inputs: normalised images, (N, C, H, W).
        labels: int64, (N,).
        batch_size: images a forward pass.
    """

    network: nn.Module
    inputs: Tensor
    labels: Tensor
    batch_size: int = 256
    evaluations: int = 0
    """Passes over the whole split so far."""
    verdicts: dict[tuple[str, int, int], int] = field(default_factory=dict)
    """Correct images of each (layer, k_S, k_T) that was evaluated."""

    def __post_init__(self) -> None:
        self.correct = self._correct()

    @torch.inference_mode()
    def _correct(self) -> int:
        self.evaluations += 1
        pairs = zip(self.inputs.split(self.batch_size), self.labels.split(self.batch_size), strict=True)
        return sum(int((self.network(images).argmax(1) == labels).sum()) for images, labels in pairs)

    def correct_at(self, layer: Layer, s: Subspace, t: Subspace, k_s: int, k_t: int) -> int:
        """Images that stay correct with W' = P_S W P_T in ``layer``."""
        key = (layer.name, k_s, k_t)
        if key not in self.verdicts:
            with replaced({layer: projected(layer.weight(), s, t, k_s, k_t)}):
                self.verdicts[key] = self._correct()
        return self.verdicts[key]

    def ranks(self, layer: Layer, s: Subspace, t: Subspace, epsilon: float) -> Ranks:
        """The certified boundaries of one layer, by bisection."""
        needed = self.correct - epsilon / 100 * len(self.labels) - 1e-9
        return search(lambda k_s, k_t: self.correct_at(layer, s, t, k_s, k_t) >= needed, layer.m, layer.n)
