"""What W' = P_S W P_T in one layer costs, predicted from the curvature: where a search begins, and what it would find.

The divergence is predicted as tr(D^T C_S D G) / 2 nats, D = W - P_S W P_T and C_S uncentred (no bias is corrected). Of
k_S and k_T it is known in closed form, without an image. Which divergence a tolerance of accuracy stands for is not:
a threshold is fitted to the ranks of a few layers. What the others are asked depends on those alone, in any order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import stdev

import torch
from torch import Tensor, nn

from ..networks.batches import Batches, call, some_of
from ..networks.devices import placed
from ..networks.each import Each, in_turn
from ..networks.evaluation import logits_of
from .curvature import Curvature, curvature
from .layers import Layer
from .rank_search import Ranks, search
from .subspaces import Subspace

INPUTS = 500
"""Of how many inputs the curvature is taken. One with a large gradient may make a third of it: a sample of them, drawn
by their predictions, can miss that one."""
WIDEST = 8192
"""No curvature is taken of more outputs, whose matrix would not fit into memory: such a layer is searched plainly."""
START, LEAST = 0.01, 1e-6
"""Nats that are expected to be tolerated before any verdict is known (only the time of the first searches follows), and
the least that are told apart."""


class Prediction:
    """The predicted divergence of the network with W' = P_S W P_T in one layer, summed over its groups.

    With B = W^T P_S C_S W = sum_{i <= k_S} sigma_i w_i w_i^T, w_i = W^T v_i, it is D^T C_S D = C_T - B P_T - P_T B +
    P_T B P_T. In the basis of C_T, P_T cuts rows and columns off: of each i, what all k_T keep is a sum along them, so
    that one product with G tells all ranks at once.

    Args:
        layer: of a network.
        s: principal subspace of C_S; it need not hold more than min(m, n) dimensions.
        t: principal subspace of C_T, all dimensions that are not zero.
        curvature: G of the layer's outputs, (g, n, n).
    """

    def __init__(self, layer: Layer, s: Subspace, t: Subspace, curvature: Tensor) -> None:
        basis = t.vectors
        self._whole = layer.m, layer.n
        g = basis.mT @ curvature.to(basis) @ basis  # (g, K_T, K_T)
        w = basis.mT @ layer.weight().to(basis).mT @ s.vectors  # the w_i, (g, K_T, K_S)
        diagonal = g.diagonal(dim1=-2, dim2=-1)
        # Of each i, 2 tr(w w^T P_T G) - tr(P_T w w^T P_T G) is kept. By the rows of P_T the first trace grows by
        # w (G w), the second by w (2 L w + diag(G) w), G = L + diag(G) + L^T: a product with L^T is left.
        kept = w * (2 * g.triu(1) @ w + diagonal.unsqueeze(-1) * w)  # (g, K_T, K_S)
        kept = (kept * s.values[:, None, : s.vectors.shape[-1]]).sum(0)
        everything = (t.values[:, : basis.shape[-1]] * diagonal).sum(0)  # C_T itself, which is diagonal: (K_T,)
        self._total = everything.sum().cpu()
        # (K_T + 1, K_S + 2), the last column of no projection of the inputs.
        self._kept = torch.cat([_from_zero(_from_zero(kept, 1), 0), _from_zero(everything[:, None], 0)], 1).cpu()

    @property
    def whole(self) -> float:
        """Of the layer giving nothing at all; 0 of one that gives nothing anyway."""
        return self(0, 0)

    def __call__(self, k_s: int, k_t: int) -> float:
        """In nats; k_S = m stands for no projection of the inputs, k_T = n of the outputs."""
        kept = self._kept[min(k_t, len(self._kept) - 1), -1 if k_s == self._whole[0] else k_s]
        return max(0.0, float(self._total - kept) / 2)  # rounding may leave less than nothing

    def ranks(self, threshold: float) -> Ranks:
        """The ranks that a search would find, did a layer pass up to a divergence of ``threshold`` nats."""
        return search(lambda k_s, k_t: self(k_s, k_t) <= threshold, *self._whole)


def _from_zero(values: Tensor, dimension: int) -> Tensor:
    """Cumulative sums along a dimension, of none at first."""
    return torch.cat([torch.zeros_like(values.narrow(dimension, 0, 1)), values], dimension).cumsum(dimension)


class Guide:
    """Where the search of one layer begins: as its curvature says, and the verdicts on it so far.

    Args:
        prediction: of the layer.
        thresholds: to begin with, by tolerance; :data:`START` where there is none.
    """

    def __init__(self, prediction: Prediction, thresholds: dict[float, float] | None = None) -> None:
        self._prediction = prediction
        self._thresholds = dict(thresholds or {})

    def threshold(self, epsilon: float) -> float:
        """The predicted divergence, in nats, up to which a verdict at this tolerance is expected to pass."""
        return self._thresholds.get(epsilon, START)

    def predicted(self, k_s: int, k_t: int, epsilon: float) -> bool:
        """The verdict that is expected, from no image."""
        return self._prediction(k_s, k_t) <= self.threshold(epsilon)

    def learn(self, k_s: int, k_t: int, epsilon: float, passes: bool) -> None:
        """Move the threshold half of the way (of its logarithm) to the divergence of a verdict that it got wrong."""
        divergence, threshold = self._prediction(k_s, k_t), self.threshold(epsilon)
        if passes is not (divergence <= threshold):
            self._thresholds[epsilon] = math.sqrt(threshold * max(divergence, LEAST))


def predictable(
    network: nn.Module, layers: list[Layer], inputs: Batches, batch_size: int, each: Each = in_turn
) -> Curvature:
    """The curvature of layers whose ranks can be predicted, over the first :data:`INPUTS` of some inputs.

    They are best none that the network was trained on: of those it is too sure, and the gradient of a few is all there
    is.
    """
    few = some_of(inputs, slice(INPUTS))
    there = [layer for layer in layers if layer.n <= WIDEST] if predicts(network, few) else []
    # A pass back keeps the values on the way: fewer inputs at a time.
    return curvature(network, there, few, batch_size=max(1, batch_size // 4), each=each) if there else {}


@torch.inference_mode()
def predicts(network: nn.Module, inputs: Batches) -> bool:
    """Whether what a network gives can be logits: numbers, along a dimension of classes."""
    found = logits_of(call(network.eval(), placed(inputs[:1], network)))
    return found.is_floating_point() and found.ndim > 1


DEPTHS = (0.5, 0.6, 0.7, 0.8, 0.9)
"""Where in the network the layers are that a threshold is fitted to: in its latter half, where a trial costs little."""


def handful(layers: Sequence[Layer]) -> list[Layer]:
    """The layers that a threshold is fitted to, of all in their order."""
    return [layers[at] for at in dict.fromkeys(int(depth * len(layers)) for depth in DEPTHS)]


@dataclass(frozen=True)
class Fitted:
    """The predicted divergence, in nats, up to which layers pass at one tolerance."""

    threshold: float
    low: float
    """One standard deviation (of the logarithm) of the layers' own thresholds below it."""
    high: float
    """Likewise above it."""


Curve = Callable[[float], float]
"""The predicted utilization of a layer at each threshold: the higher that is, the lower."""


def fitted(curves: Sequence[Curve], found: Sequence[float]) -> Fitted:
    """The threshold at which the mean utilization of some layers is that which was found, and how far theirs differ."""
    own = [math.log(crossing(curve, its)) for curve, its in zip(curves, found, strict=True)]
    threshold = crossing(lambda at: sum(curve(at) for curve in curves), sum(found))
    spread = math.exp(stdev(own)) if len(own) > 1 else 1.0
    return Fitted(threshold, threshold / spread, threshold * spread)


MOST, STEPS = 10.0, 14
"""Nats beyond which no threshold is looked for, and bisections: to a part in a thousand."""


def crossing(curve: Curve, level: float) -> float:
    """The smallest threshold at which a falling curve is at a level, or below.

    Of several that are at it, the largest may be none: layers that keep one dimension pass beyond any threshold.
    """
    low, high = math.log(LEAST), math.log(MOST)
    for _ in range(STEPS):
        middle = (low + high) / 2
        # Sums of quotients: equal ones may differ in their last digits.
        low, high = (low, middle) if curve(math.exp(middle)) <= level + 1e-9 else (middle, high)
    return math.exp((low + high) / 2)
